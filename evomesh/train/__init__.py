"""Builds every object from the config in one visible order, and runs the loop."""
