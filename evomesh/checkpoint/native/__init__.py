"""Save, find, verify, load and reshard checkpoints in the native format."""
