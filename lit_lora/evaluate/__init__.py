"""Evaluation: loss, exact match, JSON fields and option likelihood on a user's own rows."""
