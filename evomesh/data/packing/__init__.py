"""Pack documents into sequences of equal length and deal the packs to steps and ranks.

    documents  ->  packs  ->  corpus  ->  numbers of a step  ->  batch
              packs     corpus      sampler, mixture       loader

``streaming`` does all of it for text that is tokenized during training, ``validation`` packs held-out data without an
order, ``synthetic`` replaces files, and ``report`` describes the corpus to the user and to a checkpoint.
"""
