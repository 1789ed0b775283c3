"""Adapter folders, in the format of PEFT or in our own: written, read, put onto a model."""
