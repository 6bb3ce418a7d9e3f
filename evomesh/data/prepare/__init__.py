"""Turn raw records into token files."""
