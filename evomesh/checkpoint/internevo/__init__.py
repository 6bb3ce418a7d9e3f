"""Read and write InternEvo's checkpoint files."""
