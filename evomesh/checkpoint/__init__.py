"""Save, find, verify and load the state of a run, in any parallel layout."""
