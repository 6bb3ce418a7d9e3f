"""InternLM2 (Cai et al., 2024): grouped key/value heads, optional output normalization and post-norm blocks."""

from __future__ import annotations

from evomesh.models.family import DecoderFamily

INTERNLM2 = DecoderFamily(
    embedding_std=0.02,
    wqkv_std=0.02,
    wo_std=0.02,
    up_std=0.02,
    down_std=0.02,
    head_std=0.02,
    unscaled_std=0.02,
    recompute_rounding="ceil",
    post_norm=True,
)
