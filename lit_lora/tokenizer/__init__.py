"""Tokenizer: text to ids, conversations to ids and the part of them that is learned."""
