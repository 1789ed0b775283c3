"""Training: the one loop, its loss, optimizers, schedules, metrics and checkpoints."""
