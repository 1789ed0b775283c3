"""Dataset formats: one row of a file in, one conversation out."""
