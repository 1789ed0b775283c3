"""The optimizers, and float32 masters of what trains."""
