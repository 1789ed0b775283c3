"""From what the user names to a model: which folders belong together, and the model opened from them."""
