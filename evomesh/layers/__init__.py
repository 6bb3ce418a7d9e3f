"""Modules on local tensors: they know their shard, and no rank but through collectives.

    ids -> embedding -> [norm -> attention (rotary) -> norm -> mlp] x layers -> loss
                          linear     products          linear

``placement`` says where a parameter is stored and over which axis it is sharded,
``init`` gives it the same values in every layout, and ``sequence_bounds`` keeps
attention and positions inside the documents of a pack.
"""
