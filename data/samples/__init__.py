"""Bundled rows for the quickstart, written by scripts/generate_samples.py."""
