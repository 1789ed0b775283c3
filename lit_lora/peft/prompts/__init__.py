"""Tokens, keys or values before every document: prefix and prompt tuning, P-tuning, LLaMA-Adapter."""
