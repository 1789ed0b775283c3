"""Shipped configs, with only the settings that differ from the defaults."""
