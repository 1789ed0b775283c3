"""What every method is built from: settings, own modules, matching by name, counting, updates of the base."""
