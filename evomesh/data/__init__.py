"""From files to batches. Needs no process group.

The law: which packs make up step s is a pure function of (manifest, data.seed, s,
global batch). Ranks, workers and interruptions change nothing, so a checkpoint stores a
position of a few integers and any layout resumes exactly.

    file  ->  documents  ->  stream  ->  packs  ->  order  ->  batch
         bin_dataset     packs       packs      sampler    loader     (token_files/bin_dataset, then packing/)

``packing/corpus`` holds the packs of all files, ``build`` opens what the config names, ``prepare`` makes token files
from the text that ``records`` reads, and ``packing/streaming`` goes from text to batches without token files.
"""
