"""Pack documents into sequences of equal length, and order the packs of a run."""
