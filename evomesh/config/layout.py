"""Which parallel sizes fit the model, the data and each other, and which fit a number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from evomesh.config.finding import ConfigFinding, nearest
from evomesh.config.schema import Config, DataConfig
from evomesh.errors import ConfigError, UserError

CUT_AGAIN = (
    "FSDP2 cuts a block's weights again, and sums their gradients, when the gradients of its inputs are there; "
    "zbv makes those of the weights only later"
)


def layout_findings(config: Config) -> Iterator[ConfigFinding]:
    """Every problem of the parallel sizes that needs no number of processes."""
    yield from _tensor(config)
    yield from _weights(config)
    if config.parallel.pipeline.size > 1:
        yield from _stages(config)
        yield from _schedule(config)


def _tensor(config: Config) -> Iterator[ConfigFinding]:
    model, data, parallel = config.model, config.data, config.parallel
    tp, mode = parallel.tensor.size, parallel.tensor.mode
    t = "parallel.tensor.size"
    for heads, key in (
        (model.num_attention_heads, "num_attention_heads"),
        (model.kv_heads, "num_kv_attention_heads"),
    ):
        if heads % tp:
            yield ConfigFinding(
                (t, f"model.{key}"),
                f"{tp} does not divide {key}={heads}",
                expected=f"size={nearest(tp, heads)}",
            )
    if mode != "mtp" and data.packed_length % tp:
        yield ConfigFinding(
            (t, "data.seq_len", "data.micro_bsz"),
            f"{tp} does not divide the packed length {data.packed_length}, which {mode} splits",
            expected=f"size={nearest(tp, data.packed_length)}",
        )
    if mode != "isp" and model.mlp_width % tp:
        yield ConfigFinding(
            (t, "model.mlp_ratio", "model.multiple_of"),
            f"{tp} does not divide the feed-forward width {model.mlp_width}",
            expected=f"size={nearest(tp, model.mlp_width)}",
        )


def _weights(config: Config) -> Iterator[ConfigFinding]:
    model, parallel = config.model, config.parallel
    size = parallel.weight.size
    if parallel.zero1.fsdp and parallel.tensor.mode == "isp":
        yield ConfigFinding(
            ("parallel.zero1.fsdp", "parallel.tensor.mode"),
            "fsdp with tensor mode isp: two keys for one thing, since isp cuts weights over parallel.weight.size",
            fix="remove parallel.zero1.fsdp and set parallel.weight=dict(size=...)",
        )
    if size > 1 and parallel.tensor.mode != "isp":
        yield ConfigFinding(
            ("parallel.weight.size", "parallel.tensor.mode"),
            f"weight.size={size} needs tensor mode isp, found {parallel.tensor.mode}",
            fix='set parallel.tensor=dict(size=..., mode="isp"), or weight.size=1',
        )
        return
    qkv = (model.num_attention_heads + 2 * model.kv_heads) * model.head_dim
    rows = {
        "hidden_size": model.hidden_size,
        "width of q, k and v": qkv,
        "feed-forward width": model.mlp_width,
    }
    for name, length in rows.items():
        if length % size:
            yield ConfigFinding(
                ("parallel.weight.size",),
                f"{size} does not divide the {name}, {length}",
                expected=f"size={nearest(size, length)}",
            )


def _stages(config: Config) -> Iterator[ConfigFinding]:
    model, pp, chunks = config.model, config.parallel.pipeline.size, config.model.num_chunks
    if pp * chunks > model.num_layers:
        yield ConfigFinding(
            ("parallel.pipeline.size", "model.num_chunks", "model.num_layers"),
            f"{pp} stages of {chunks} chunks need {pp * chunks} layers, num_layers={model.num_layers}",
            expected=f"pipeline.size at most {max(model.num_layers // chunks, 1)}",
        )


def _schedule(config: Config) -> Iterator[ConfigFinding]:
    data, chunks, pp = config.data, config.model.num_chunks, config.parallel.pipeline.size
    kind = config.parallel.pipeline.schedule or ("interleaved" if chunks > 1 else "1f1b")
    key = ("parallel.pipeline.schedule", "model.num_chunks")
    wanted = {"1f1b": chunks == 1, "interleaved": chunks > 1, "zbv": chunks == 2}
    if not wanted[kind]:
        number = {"1f1b": "num_chunks=1", "interleaved": "num_chunks of 2 or more", "zbv": "num_chunks=2"}[
            kind
        ]
        yield ConfigFinding(key, f"schedule {kind} with num_chunks={chunks}", expected=f"{kind} has {number}")
    elif kind == "interleaved":
        yield from _micro_batches(data, pp)
    elif kind == "zbv":
        yield from _zero_bubble(config, key)


def _micro_batches(data: DataConfig, pp: int) -> Iterator[ConfigFinding]:
    counts: dict[str, int] = {"micro_num": data.micro_num}
    if len(parts := data.rampup_batch_size.split()) == 3 and all(part.isdigit() for part in parts):
        counts |= {"rampup_batch_size": math.gcd(int(parts[0]), int(parts[1]))}  # start and increment
    for name, count in counts.items():
        if count % pp:
            yield ConfigFinding(
                (f"data.{name}", "parallel.pipeline.size", "model.num_chunks"),
                f"{name}={getattr(data, name)} is not a multiple of the {pp} stages of an interleaved pipeline",
                expected=f"{name}={nearest(count, multiples_of=pp)}"
                if name != "rampup_batch_size"
                else f"start and increment multiples of {pp}",
            )


def _zero_bubble(config: Config, key: tuple[str, ...]) -> Iterator[ConfigFinding]:
    """zbv makes the gradients of inputs and of weights apart."""
    reasons = {
        "parallel.weight.size": config.parallel.weight.size > 1 and CUT_AGAIN,
        "parallel.zero1.fsdp": config.parallel.zero1.fsdp and CUT_AGAIN,
        "model.compile": config.model.compile is True and "a compiled block has no separate gradients",
    }
    for other, reason in reasons.items():
        if reason:
            yield ConfigFinding(
                (key[0], other),
                f"schedule zbv does not go with {other.split('.')[-1]}: {reason}",
                fix='set parallel.pipeline.schedule="interleaved"',
            )


def check_world(config: Config, world_size: int) -> list[str]:
    """Whether the layout fits so many processes.

    Returns:
        Warnings.
    Raises:
        ConfigError: the sizes do not divide; with the nearest that do.
    """
    parallel = config.parallel
    isp = parallel.tensor.mode == "isp"
    pp, tp, wp, zero = parallel.pipeline.size, parallel.tensor.size, parallel.weight.size, parallel.zero1.size
    problems = [
        UserError(
            f"{world_size} processes cannot be divided by {name} = {size}",
            where="parallel",
            expected=f"{nearest(world_size, multiples_of=size)} processes, or a product of {nearest(size, world_size)}",
        )
        for size, name in (
            (pp * tp, "pipeline.size * tensor.size"),
            (pp * wp if isp else 1, "pipeline.size * weight.size"),
        )
        if world_size % size
    ]
    dp = world_size // pp // (wp if isp else tp)
    warnings = []
    if not problems and zero > dp:
        warnings.append(
            f"parallel.zero1.size: {zero} is more than the {dp} data-parallel ranks; {dp} is used"
        )
    elif not problems and zero > 1 and dp % zero:
        problems.append(
            UserError(
                f"{zero} does not divide the {dp} data-parallel ranks",
                where="parallel.zero1.size",
                expected=nearest(zero, dp),
            )
        )
    if problems:
        raise ConfigError(problems)
    return warnings + _uncut(config, dp if zero <= 0 else min(zero, dp))


def _uncut(config: Config, zero: int) -> list[str]:
    """Says which weights ``parallel.zero1.fsdp`` leaves whole over ``zero`` ranks."""
    model, tp = config.model, config.parallel.tensor.size
    if not config.parallel.zero1.fsdp:
        return []
    if zero == 1:
        return ["parallel.zero1.fsdp: has no effect with one rank to share the weights"]
    qkv = (model.num_attention_heads + 2 * model.kv_heads) * model.head_dim
    rows = {
        "query, key and value": qkv // tp,
        "output products": model.hidden_size,
        "feed-forward inputs": model.mlp_width // tp,
        "embedding and head": -(-model.vocab_size // tp),
    }
    whole = [f"{name} ({count} rows a tensor rank)" for name, count in rows.items() if count % zero]
    return (
        [f"parallel.zero1.fsdp: {zero} ranks do not divide {', '.join(whole)}; these stay whole"]
        if whole
        else []
    )
