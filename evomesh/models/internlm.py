"""InternLM (2023): attention biases, one key/value head a query head, small fixed initial deviations."""

from __future__ import annotations

from evomesh.models.family import DecoderFamily

# apply_post_layer_norm is accepted and has no effect in this family.
INTERNLM = DecoderFamily(
    embedding_std=0.0052,
    wqkv_std=0.006,
    wo_std=0.006,
    up_std=0.006,
    down_std=0.006,
    head_std=0.0052,
    unscaled_std=0.0015,
    recompute_rounding="floor",
    post_norm=False,
)
