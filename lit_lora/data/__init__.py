"""Data: files of rows in, token ids with their learned targets out."""
