"""Read and write model folders in the Hugging Face layout."""
