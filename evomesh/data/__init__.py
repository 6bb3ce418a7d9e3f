"""From files to batches: reading, packing, sampling, streaming, tokenising. Needs no process group."""
