"""In which order micro-batches pass through the stages."""
