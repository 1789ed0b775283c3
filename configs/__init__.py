"""Shipped configs: only what differs from the defaults."""
