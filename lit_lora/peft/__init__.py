"""Finetuning methods: which modules a method wraps, and which parameters then train."""
