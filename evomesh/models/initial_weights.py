"""The initial weight of each parameter of a decoder: InternEvo's standard deviations by kind of matrix."""

from __future__ import annotations

import math

from evomesh.config.model import ModelConfig
from evomesh.layers.init import InitialWeight
from evomesh.models.family import DecoderFamily

# Matrices with a row for each token, whose initial values muP leaves as they are.
OF_VOCABULARY = ("embedding.weight", "head.weight")


def initial_weight(
    name: str, config: ModelConfig, family: DecoderFamily
) -> InitialWeight:
    """Return the distribution of the initial values of the parameter with this global name."""
    part = ".".join(name.split(".")[-2:])  # such as wqkv.weight
    if part.endswith(".bias"):
        return InitialWeight("constant", 0.0)
    if "norm." in part:
        return InitialWeight("constant", 0.0 if config.add_unit_offset else 1.0)
    writes_to_residual = part in ("wo.weight", "w2.weight")
    if writes_to_residual:
        std = _residual_std(part, name, config, family)
    else:
        std = _input_std(part, config, family)
    if part not in OF_VOCABULARY:
        # Each sum over a width keeps its variance.
        std /= math.sqrt(config.width_multiplier)
    return InitialWeight(config.init_type, std)


def _input_std(part: str, config: ModelConfig, family: DecoderFamily) -> float:
    """Return the standard deviation of a weight that does not write to the residual stream."""
    # What the config says, else what the family does.
    up_std = (config.ffn_uplayer_init_std, family.up_std)
    choices = {
        "embedding.weight": (config.embedding_init_std, family.embedding_std),
        "head.weight": (config.out_head_init_std, family.head_std),
        "wqkv.weight": (config.attn_wqkv_init_std, family.wqkv_std),
        "w1.weight": up_std,
        "w3.weight": up_std,
    }
    given, default = choices[part]
    return _first(given, default)


def _residual_std(
    part: str, name: str, config: ModelConfig, family: DecoderFamily
) -> float:
    """Return the standard deviation of wo or w2, which write to the residual stream.

    ``use_scaled_init`` keeps its variance from growing with depth (Radford et al., 2019).
    """
    if part == "wo.weight":
        configured = config.attn_other_init_std
        default = family.wo_std
    else:
        configured = config.ffn_other_init_std
        default = family.down_std
    if not config.use_scaled_init:
        return _first(configured, family.unscaled_std)
    # GPT-2 divides by the depth of the whole model, InternEvo by that of the layer:
    # after layer l the stream is a sum of 2 (l + 1) such terms.
    _, layer, *_ = name.split(".")
    num_terms = 2 * (int(layer) + 1)
    return _first(configured, default) / math.sqrt(num_terms)


def _first(configured: float | None, default: float) -> float:
    return default if configured is None else configured
