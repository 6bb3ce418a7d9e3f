"""Sizes computed from a config alone: parameters of the model, tokens of a step."""

from __future__ import annotations

from evomesh.config.reading.spellings import BUILT_IN
from evomesh.config.schema import Config, ModelConfig


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Return elements per part: embedding, attention, feed_forward, norms, head (all layers together, nothing padded).

    For a custom model type, whose parts only the builder knows: {}.
    """
    if model.model_type not in BUILT_IN:
        return {}
    hidden = model.hidden_size
    layers = model.num_layers
    qkv = model.qkv_width

    # wqkv [qkv, hidden] and wo [hidden, width of all heads], each with its bias.
    attention = hidden * qkv + model.attention_width * hidden
    if model.has_qkv_bias:
        attention += qkv
    if model.has_o_bias:
        attention += hidden

    # w1 and, with SwiGLU, w3 [width, hidden], and w2 [hidden, width].
    matrices = 3 if model.use_swiglu else 2
    feed_forward = matrices * hidden * model.mlp_width
    if model.mlp_bias:
        feed_forward += (matrices - 1) * model.mlp_width + hidden

    # Layernorm has a bias.
    norm = 2 * hidden if model.norm_type == "layernorm" else hidden
    norms_of_layer = 4 if model.norm_placement == "both" else 2
    num_norms = norms_of_layer * layers
    # A model whose last block ends with a norm has no other one before the head.
    post_norm = model.apply_post_layer_norm and model.model_type == "INTERNLM2_PUBLIC"
    if not post_norm:
        num_norms += 1
    qk_norms = layers * sum(model.qk_norm_widths)
    ends = model.vocab_size * hidden
    return {
        "embedding": ends,
        "attention": layers * attention,
        "feed_forward": layers * feed_forward,
        "norms": num_norms * norm + qk_norms,
        "head": 0 if model.tie_word_embeddings else ends,
    }


def parameter_count(model: ModelConfig) -> int | None:
    """Return the number of parameters; None for a custom model type."""
    counts = parameter_counts(model)
    return sum(counts.values()) if counts else None


def tokens_per_step(config: Config, data_parallel: int = 1) -> int:
    """Return the tokens of one optimizer step over ``data_parallel`` ranks."""
    return config.data.packed_length * config.data.micro_num * data_parallel
