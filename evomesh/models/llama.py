"""Llama 2 (Touvron et al., 2023) and, by rope base, grouped heads and vocabulary in the config, Llama 3."""

from __future__ import annotations

from evomesh.models.family import DecoderFamily

LLAMA = DecoderFamily(
    embedding_std=0.02,
    wqkv_std=0.02,
    wo_std=0.02,
    up_std=0.02,
    down_std=0.02,
    head_std=0.02,
    unscaled_std=0.02,
    recompute_rounding="ceil",
    post_norm=False,
)
