"""The facts of a built-in family of decoders that are not in its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DecoderFamily:
    """The differences between the built-in families that are not in their configs.

    Attributes:
        embedding_std .. head_std: default standard deviations of the initial weights.
        unscaled_std: standard deviation of ``wo`` and ``w2`` when ``use_scaled_init`` is off.
        recompute_rounding: how (layers * ``checkpoint`` fraction) is rounded.
        post_norm: ``apply_post_layer_norm`` moves each norm after the residual addition; else the key has no effect.
    """

    embedding_std: float
    wqkv_std: float
    wo_std: float
    up_std: float
    down_std: float
    head_std: float
    unscaled_std: float
    recompute_rounding: Literal["floor", "ceil"]
    post_norm: bool
