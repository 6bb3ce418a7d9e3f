"""Text from a trained model: sampling parameters, the key/value cache, continuous batching, and beam search."""
