"""Models: one decoder that all built-in families share, a small file per family, and a registry for custom models."""
