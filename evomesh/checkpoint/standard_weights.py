"""The weights of a plain model that computes what one with ``model.mup`` does: other systems know no muP.

The factor of the logits goes into the last norm, that of attention scores into the
queries, or into their norm where they have one. Powers of two change no digit.
"""

from __future__ import annotations

import math

from torch import Tensor

from evomesh.config.model import ModelConfig
from evomesh.config.mup import MupConfig
from evomesh.layers.dtype import promote

LAST_NORM = ("norm.weight", "norm.bias")


def without_mup(model: ModelConfig) -> ModelConfig:
    """Return the model section of the plain model."""
    return model.model_copy(update={"mup": MupConfig()})


def rounds(model: ModelConfig) -> bool:
    """Return whether the factors change digits of 16-bit weights."""
    factors = (model.width_multiplier, model.query_multiplier)
    mantissas = {math.frexp(factor)[0] for factor in factors}
    return mantissas != {0.5}


def standard_weight(name: str, weight: Tensor, model: ModelConfig) -> Tensor:
    """Return a weight of the plain model; in at least float32 where it differs.

    Args:
        name: its global name.
        weight: the whole tensor in our layout.
    """
    if name in LAST_NORM and model.width_multiplier != 1:
        return _scaled_norm(weight, 1 / model.width_multiplier, model)
    if model.query_multiplier == 1:
        return weight
    if name.endswith("attention.q_norm.weight"):
        return _scaled_norm(weight, model.query_multiplier, model)
    is_projection = name.endswith(("attention.wqkv.weight", "attention.wqkv.bias"))
    if is_projection and not model.qk_norm:
        return _with_scaled_queries(weight, model)
    return weight


def _scaled_norm(weight: Tensor, factor: float, model: ModelConfig) -> Tensor:
    wide = weight.to(promote(weight.dtype))
    if model.add_unit_offset:
        # The norm multiplies by 1 + weight.
        return (1 + wide) * factor - 1
    return wide * factor


def _with_scaled_queries(weight: Tensor, model: ModelConfig) -> Tensor:
    """Scale the query rows of each key/value head, whose key and value follow them."""
    wide = weight.to(promote(weight.dtype), copy=True)
    queries = model.num_attention_heads // model.kv_heads
    heads = wide.view(model.kv_heads, queries + 2, model.head_dim, -1)
    heads[:, :queries] *= model.query_multiplier
    return wide
