"""Open a model from any folder that a user names: a checkpoint, a run or an adapter."""
