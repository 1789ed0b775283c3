"""Adapter folders, in PEFT's format or our own: read, written and loaded into a model."""
