"""Read a config file: execute it, apply overrides, and record where each value came from."""
