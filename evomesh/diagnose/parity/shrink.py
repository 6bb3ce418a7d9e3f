"""A config in small: the same features, layout and divisibility, in sizes that train in a second.

One rule for every size: ``shrunk(size, unit, most)`` keeps the remainder by ``unit`` and
lowers the quotient to ``most``. With the sizes of the axes in the unit, what an axis
divides it still divides, and what it does not is still uneven:

    hidden_size  4096 over 4 ranks, unit 8     -> 64     divisible, as before
    vocab_size   32001 over 2 ranks, unit 8    -> 129    one row more than the ranks divide, as before
    num_layers   33 in 4 stages                -> 9      two layers a stage, and one stage has three
"""

from __future__ import annotations

import math
from typing import Any

from evomesh.config.layout import AxisSizes, pipeline_schedule, run_sizes
from evomesh.config.schema import Config, ModelConfig, ParallelConfig

TOKENS = 64  # of a pack, about
ROWS = 128  # of the vocabulary, about
ALIGNMENT = 8  # kernels of 16 bits want widths of heads in multiples of this
LAYERS_PER_STAGE = 2
BUCKET = 4096  # elements: several buckets also in a small model
# Wide enough that every part of the model matters to its output, as in a trained one.
INITIAL_STDS = {
    "embedding_init_std": 0.5,
    "attn_wqkv_init_std": 0.2,
    "attn_other_init_std": 0.2,
    "ffn_uplayer_init_std": 0.2,
    "ffn_other_init_std": 0.2,
    "out_head_init_std": 0.3,
}


def shrunk(size: int, unit: int, most: int) -> int:
    """Return ``size`` with its quotient by ``unit`` lowered to ``most``; the remainder stays."""
    quotient, remainder = divmod(size, unit)
    return unit * min(quotient, most) + remainder


def shrink(config: Config, world_size: int) -> Config:
    """Return the config in small, for ``world_size`` processes.

    Compilation is off: it takes longer than everything else, and changes no
    communication.
    """
    sizes = run_sizes(config, world_size)
    model = _small_model(config, sizes)
    tokens = _tokens(config, sizes)
    data = config.data.model_copy(
        update={
            "seq_len": tokens,
            "micro_bsz": 1,
            "micro_num": _micro_batches(config),
            "rampup_batch_size": None,
        }
    )
    zero = config.hybrid_zero_optimizer.model_copy(
        update={"reduce_bucket_size": BUCKET, "all_gather_size": BUCKET}
    )
    # Adam divides by the root of its second moment: near zero that turns the last bit of
    # a gradient into a difference of order one, which a large epsilon does not.
    adam = config.adam.model_copy(update={"adam_eps": 1.0})
    return config.model_copy(
        update={
            "model": model,
            "data": data,
            "hybrid_zero_optimizer": zero,
            "adam": adam,
        }
    )


def in_one_process(config: Config, dp_size: int) -> Config:
    """Return the same training for a single process: one micro-batch for each of all ranks together."""
    model = config.model.model_copy(update={"num_chunks": 1})
    micro_num = config.data.micro_num * dp_size
    data = config.data.model_copy(update={"micro_num": micro_num})
    return config.model_copy(
        update={"model": model, "data": data, "parallel": ParallelConfig()}
    )


def with_dtype(config: Config, dtype: str) -> Config:
    """Return the config with another dtype of the model."""
    model = config.model.model_copy(update={"dtype": dtype})
    return config.model_copy(update={"model": model})


def _unit(sizes: AxisSizes) -> int:
    """Return what the unit of widths is a multiple of: every axis over which a tensor may be sharded."""
    return math.lcm(ALIGNMENT, sizes.tp, sizes.wp, sizes.zero)


def _small_model(config: Config, sizes: AxisSizes) -> ModelConfig:
    model = config.model
    unit = _unit(sizes)
    # 1. Heads: fewer and narrower, but shared by queries as in the large model.
    head_dim = _shrunk_to(2 * ALIGNMENT, model.head_dim, unit)
    kv_heads = _kv_heads(model, head_dim, sizes)
    group = model.num_attention_heads // model.kv_heads
    heads = kv_heads * min(group, 2)

    # 2. Widths. That of the model is that of its heads, unless it is so in the large
    #    model neither.
    hidden = heads * head_dim
    if model.hidden_size != model.num_attention_heads * model.head_dim:
        hidden = _shrunk_to(TOKENS, model.hidden_size, unit)
    width = _shrunk_to(TOKENS, model.mlp_width, unit)
    rows = max(ROWS // unit, 2)
    vocab_size = shrunk(model.vocab_size, unit, rows)

    # 3. Layers, some of which may have a special kind.
    layers = _layers(config)
    nope_layers = [layer for layer in model.nope_layers if layer < layers]
    lengths = _small_lengths(config, _tokens(config, sizes), head_dim)
    values = model.model_dump()
    values |= INITIAL_STDS
    values |= lengths
    values |= {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        # int(hidden * ratio) is the width, whatever its last binary digit.
        "mlp_ratio": (width + 0.5) / hidden,
        "multiple_of": 1,
        "vocab_size": vocab_size,
        "nope_layers": tuple(nope_layers),
        "compile": False,
        "attention_kernel": "auto",
    }
    if model.num_kv_attention_heads is not None:
        values["num_kv_attention_heads"] = kv_heads
    if model.layer_types is not None:
        values["layer_types"] = model.layer_types[:layers]
    return ModelConfig.model_validate(values)


def _shrunk_to(size: int, large: int, unit: int) -> int:
    """Return a width of about ``size`` that the axes divide as they divide ``large``."""
    units = max(size // unit, 1)
    return shrunk(large, unit, units)


def _kv_heads(model: ModelConfig, head_dim: int, sizes: AxisSizes) -> int:
    """Return the fewest key/value heads, two for each tensor rank if there are as many, that keep what divides."""
    group = model.num_attention_heads // model.kv_heads
    small_group = min(group, 2)
    per_rank = model.kv_heads // sizes.tp
    fewest = min(2, per_rank)
    for count in range(fewest, per_rank):
        kv_heads = count * sizes.tp
        width = kv_heads * small_group * head_dim
        if _axes_divide(sizes, width, model.attention_width):
            return kv_heads
    return model.kv_heads


def _axes_divide(sizes: AxisSizes, small: int, large: int) -> bool:
    """Return whether each axis over which weights are sharded divides both widths or none of them."""
    axes = (sizes.tp, sizes.wp, sizes.zero)
    return all(_divides(axis, small, large) for axis in axes)


def _divides(axis: int, small: int, large: int) -> bool:
    """Return whether an axis divides both sizes or none of them."""
    return (small % axis == 0) == (large % axis == 0)


def _layers(config: Config) -> int:
    """Return the number of layers: two in each stage, or as many more as it takes to have one of every kind."""
    model = config.model
    stages = config.parallel.pipeline.size * model.num_chunks
    if config.parallel.pipeline.size == 1:
        stages = 1
    kinds = [_kind_of(model, layer) for layer in range(model.num_layers)]
    most = LAYERS_PER_STAGE
    layers = shrunk(model.num_layers, stages, most)
    while set(kinds[:layers]) != set(kinds):
        most += 1
        layers = shrunk(model.num_layers, stages, most)
    return layers


def _kind_of(model: ModelConfig, layer: int) -> tuple[bool, bool]:
    """Return what may differ between layers: whether one has a window, and rotary positions."""
    return model.window_of(layer) is not None, model.rotates(layer)


def _tokens(config: Config, sizes: AxisSizes) -> int:
    """Return the tokens of a pack, of which every tensor rank may have a share."""
    unit = math.lcm(ALIGNMENT, sizes.tp)
    return shrunk(config.data.packed_length, unit, max(TOKENS // unit, 1))


def _small_lengths(config: Config, tokens: int, head_dim: int) -> dict[str, Any]:
    """Return the lengths inside the model that a pack may exceed, as the same share of the small pack."""
    model = config.model
    share = tokens / config.data.packed_length

    def small(length: int) -> int:
        return max(round(length * share), 1)

    values: dict[str, Any] = {
        "max_position_embeddings": small(model.max_position_embeddings)
    }
    if model.sliding_window is not None:
        values["sliding_window"] = small(model.sliding_window)
    # longrope has one factor for each pair of a head's columns, and the small head has
    # fewer.
    scaling = model.rope_scaling
    if scaling is not None and scaling.type == "longrope":
        frequencies = head_dim // 2
        longrope = scaling.model_dump()
        for name in ("short_factor", "long_factor"):
            longrope[name] = longrope[name][:frequencies]
        original = longrope["original_max_position_embeddings"]
        longrope["original_max_position_embeddings"] = small(original)
        values["rope_scaling"] = longrope
    return values


def _micro_batches(config: Config) -> int:
    """Return the micro-batches of a rank: two rounds through a pipeline, or two."""
    stages = config.parallel.pipeline.size
    if stages == 1 or pipeline_schedule(config) == "interleaved":
        return shrunk(config.data.micro_num, stages, 2)
    # As many as there are, where they do not even fill the pipeline.
    return min(config.data.micro_num, 2 * stages)
