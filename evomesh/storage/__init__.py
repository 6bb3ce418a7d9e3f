"""Bytes at a path: the one place that touches checkpoint files, on a disk or in an object store."""
