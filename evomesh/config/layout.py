"""The layout of a run: the sizes of all axes, and which sizes fit the model, the data and each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from evomesh.config.data import DataConfig
from evomesh.config.finding import ConfigFinding, nearest
from evomesh.config.schema import Config, ModelConfig, ParallelConfig
from evomesh.config.zero_size import best_zero, sharded_share, zero_warnings
from evomesh.errors import ConfigError, UserError
from evomesh.quantities import counted

RESHARDS_EARLY = (
    "FSDP2 reshards a block and reduces its gradients as soon as the input gradients are ready, "
    "but zbv computes weight gradients later"
)
CHUNKS = {
    "1f1b": "num_chunks=1",
    "interleaved": "num_chunks of 2 or more",
    "zbv": "num_chunks=2",
}


@dataclass(frozen=True)
class AxisSizes:
    """Sizes of all axes; ``dp * tp == replica * zero * (wp or tp)`` ranks in each of ``pp`` stages."""

    pp: int
    dp: int
    tp: int
    wp: int
    zero: int
    replica: int
    isp: bool

    @property
    def ranks_per_stage(self) -> int:
        return self.dp * self.tp


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return how many ranks see different data: world / pipeline / tensor, as InternEvo documents it."""
    return world_size // parallel.pipeline.size // parallel.tensor.size


def smallest_world(parallel: ParallelConfig) -> int:
    """Return the fewest processes that the sizes of the axes divide: those of one copy of the weights."""
    is_isp = parallel.tensor.mode == "isp"
    weight = parallel.weight.size if is_isp else 1
    ranks_per_stage = math.lcm(parallel.tensor.size, weight)
    return parallel.pipeline.size * ranks_per_stage


def axis_sizes(parallel: ParallelConfig, world_size: int) -> AxisSizes:
    """Return the sizes of all axes for ``world_size`` processes.

    ``zero1.size`` <= 0 is the whole data-parallel group (for isp: world / pipeline / weight), and so is a larger one.

    Raises:
        UserError: the sizes do not divide; with the nearest that do.
    """
    for problem in _size_problems(parallel, world_size):
        raise problem
    # 16 processes with pipeline 2 and tensor 2: 8 ranks a stage, of which 4 hold the same
    # shard of the weights. With zero1 size 2 the optimizer state is sharded over 2 of
    # these 4, and there are 2 replicas of it.
    is_isp = parallel.tensor.mode == "isp"
    group = _zero_group(parallel, world_size)
    zero = group
    if parallel.zero1.size > 0:
        zero = min(parallel.zero1.size, group)
    return AxisSizes(
        pp=parallel.pipeline.size,
        dp=data_parallel_size(parallel, world_size),
        tp=parallel.tensor.size,
        wp=parallel.weight.size if is_isp else 1,
        zero=zero,
        replica=group // zero,
        isp=is_isp,
    )


def run_sizes(config: Config, world_size: int) -> AxisSizes:
    """Return the sizes of all axes of a run: as ``axis_sizes``, where a size of all ranks is the best of theirs.

    Raises:
        UserError: the sizes do not divide.
    """
    return axis_sizes(run_parallel(config, world_size), world_size)


def run_parallel(config: Config, world_size: int) -> ParallelConfig:
    """Return the parallel section with the size of zero1 that a run has.

    A size <= 0 asks for all data-parallel ranks. Where that leaves more state on a rank
    than a divisor of their number does, it is the divisor with the least state.

    Raises:
        UserError: the sizes do not divide.
    """
    parallel = config.parallel
    if parallel.zero1.size > 0:
        return parallel
    sizes = axis_sizes(parallel, world_size)
    best = best_zero(config, sizes)
    if best == sizes.zero:
        return parallel
    zero = parallel.zero1.model_copy(update={"size": best})
    return parallel.model_copy(update={"zero1": zero})


def zero_note(config: Config, world_size: int) -> str | None:
    """Return a sentence if fewer ranks than all share the state, though the config asks for all.

    Raises:
        UserError: the sizes do not divide.
    """
    group = axis_sizes(config.parallel, world_size).zero
    sizes = run_sizes(config, world_size)
    if config.parallel.zero1.size > 0 or sizes.zero == group:
        return None
    share = sharded_share(config, sizes, group)
    return (
        f"parallel.zero1.size: {sizes.zero} ranks share the optimizer's state, in {group // sizes.zero} groups; "
        f"all {group} data-parallel ranks would shard {share:.0%} of it only, because they do not divide the rows of "
        "the other matrices"
    )


def check_world(config: Config, world_size: int) -> list[str]:
    """Check that the layout fits ``world_size`` processes, and return warnings.

    Raises:
        ConfigError: the sizes do not divide; with the nearest that do.
    """
    problems = list(_size_problems(config.parallel, world_size))
    if problems:
        raise ConfigError(problems)
    asked = config.parallel.zero1.size
    group = _zero_group(config.parallel, world_size)
    warnings = []
    if asked > group:
        warnings.append(
            f"parallel.zero1.size: {asked} is more than the {counted(group, 'data-parallel rank')}; {group} is used"
        )
    sizes = run_sizes(config, world_size)
    warnings += _unsharded_warnings(config, sizes.zero)
    return warnings + zero_warnings(config, sizes)


def pipeline_schedule(config: Config) -> str:
    """Return the schedule's name: the one that is set, else by the number of chunks a rank holds."""
    if config.parallel.pipeline.schedule is not None:
        return config.parallel.pipeline.schedule
    return "interleaved" if config.model.num_chunks > 1 else "1f1b"


def layout_findings(config: Config) -> Iterator[ConfigFinding]:
    """Yield every problem of the parallel sizes that does not depend on the number of processes."""
    yield from _tensor_findings(config)
    yield from _weight_findings(config)
    if config.parallel.pipeline.size > 1:
        yield from _stage_findings(config)
        yield from _schedule_findings(config)


def data_stage_layout_findings(config: Config) -> Iterator[ConfigFinding]:
    """Yield the problems of the parallel sizes that only a data stage has."""
    whole_run = layout_findings(config)
    known = [finding.found for finding in whole_run]
    for number, item in enumerate(config.data.stages, 1):
        section = item.section(config.data)
        of_stage = config.model_copy(update={"data": section})
        for finding in layout_findings(of_stage):
            if finding.found in known:
                continue
            found = f"data stage {number}: {finding.found}"
            yield ConfigFinding(
                ("data.stages",), found, finding.expected, code=finding.code
            )


def _zero_group(parallel: ParallelConfig, world_size: int) -> int:
    """Return the largest zero axis: the ranks of a stage that hold the same shard of the weights."""
    ranks_per_stage = world_size // parallel.pipeline.size
    is_isp = parallel.tensor.mode == "isp"
    weight_shards = parallel.weight.size if is_isp else parallel.tensor.size
    return ranks_per_stage // weight_shards


def _size_problems(parallel: ParallelConfig, world_size: int) -> Iterator[UserError]:
    # In isp the ranks of a stage are arranged twice, as dp x tp for the data and as
    # replica x zero x wp for the weights: both products must divide the world.
    pp = parallel.pipeline.size
    zero = parallel.zero1.size
    products = {"pipeline.size * tensor.size": pp * parallel.tensor.size}
    if parallel.tensor.mode == "isp":
        products["pipeline.size * weight.size"] = pp * parallel.weight.size
    fits = True
    for name, size in products.items():
        if world_size % size:
            fits = False
            processes = nearest(world_size, multiples_of=size)
            sizes = nearest(size, world_size)
            yield UserError(
                f"{counted(world_size, 'process')} cannot be divided by {name} = {size}",
                where="parallel",
                expected=f"{processes} processes, or a product of {sizes}",
                code="EVO-PARALLEL-001",
            )
    group = _zero_group(parallel, world_size)
    if fits and 1 < zero <= group and group % zero:
        yield UserError(
            f"zero1.size = {zero} does not divide the {group} data-parallel ranks",
            where="parallel.zero1.size",
            expected=nearest(zero, group),
            code="EVO-PARALLEL-001",
        )


def _unsharded_warnings(config: Config, zero: int) -> list[str]:
    """Return a warning of the weights that ``parallel.zero1.fsdp`` cannot shard over ``zero`` ranks."""
    model = config.model
    tp = config.parallel.tensor.size
    if not config.parallel.zero1.fsdp:
        return []
    if zero == 1:
        return [
            "parallel.zero1.fsdp: has no effect, because there is only one rank to share the weights"
        ]
    # FSDP2 shards a weight by its rows. Where the ranks do not divide these, their shares
    # would not be equal, as a shard spec has them: such a weight is not sharded.
    rows_per_tensor_rank = {
        "query, key and value": model.qkv_width // tp,
        "output projections": model.hidden_size,
        **_head_norm_rows(model, tp),
        "feed-forward inputs": model.mlp_width // tp,
        "embedding and head": math.ceil(model.vocab_size / tp),
    }
    if model.tie_word_embeddings:
        del rows_per_tensor_rank["embedding and head"]
    uneven = [
        f"{name} ({rows} rows per tensor rank)"
        for name, rows in rows_per_tensor_rank.items()
        if rows % zero
    ]
    warnings = []
    if uneven:
        warnings.append(
            f"parallel.zero1.fsdp: {zero} ranks do not divide {', '.join(uneven)}; these stay replicated"
        )
    if model.tie_word_embeddings:
        warnings.append(
            "parallel.zero1.fsdp: the tied embedding stays replicated, because the beginning and the end of the model "
            "use it; its optimizer state is sharded"
        )
    return warnings


def _head_norm_rows(model: ModelConfig, tp: int = 1) -> dict[str, int]:
    """Return the weights that a tensor rank has of the norms of queries and of keys, by a name for messages."""
    if not model.qk_norm:
        return {}
    if model.qk_norm_over == "head":
        return {"width of a head, which qk_norm has weights for": model.head_dim}
    queries, keys = model.qk_norm_widths
    return {"norm of queries": queries // tp, "norm of keys": keys // tp}


def _tensor_findings(config: Config) -> Iterator[ConfigFinding]:
    model = config.model
    data = config.data
    tp = config.parallel.tensor.size
    mode = config.parallel.tensor.mode
    key = "parallel.tensor.size"
    # Every mode gives each rank whole heads, with their keys and values.
    heads = {
        "num_attention_heads": model.num_attention_heads,
        "num_kv_attention_heads": model.kv_heads,
    }
    for name, count in heads.items():
        if count % tp:
            yield ConfigFinding(
                (key, f"model.{name}"),
                f"{tp} does not divide {name}={count}",
                expected=f"size={nearest(tp, count)}",
                code="EVO-CONFIG-008",
            )
    if model.tie_word_embeddings and model.embed_split_hidden and tp > 1:
        yield ConfigFinding(
            ("model.tie_word_embeddings", "model.embed_split_hidden"),
            "embed_split_hidden shards the embedding by columns, and the head that is tied to it by rows",
            expected="one of them",
            fix="remove model.embed_split_hidden",
            code="EVO-CONFIG-007",
        )
    # All modes but mtp shard the sequence; isp alone leaves the feed-forward width whole.
    if mode != "mtp" and data.packed_length % tp:
        yield ConfigFinding(
            (key, "data.seq_len", "data.micro_bsz"),
            f"{tp} does not divide the packed length {data.packed_length}, which {mode} shards",
            expected=f"size={nearest(tp, data.packed_length)}",
            code="EVO-CONFIG-008",
        )
    if mode != "isp" and model.mlp_width % tp:
        yield ConfigFinding(
            (key, "model.mlp_ratio", "model.multiple_of"),
            f"{tp} does not divide the feed-forward width {model.mlp_width}",
            expected=f"size={nearest(tp, model.mlp_width)}",
            code="EVO-CONFIG-008",
        )


def _weight_findings(config: Config) -> Iterator[ConfigFinding]:
    model = config.model
    parallel = config.parallel
    size = parallel.weight.size
    if parallel.zero1.fsdp and parallel.tensor.mode == "isp":
        yield ConfigFinding(
            ("parallel.zero1.fsdp", "parallel.tensor.mode"),
            "zero1.fsdp is redundant with tensor mode isp, which shards the weights over parallel.weight.size",
            fix="remove parallel.zero1.fsdp and set parallel.weight=dict(size=...)",
            code="EVO-CONFIG-007",
        )
    if size > 1 and parallel.tensor.mode != "isp":
        yield ConfigFinding(
            ("parallel.weight.size", "parallel.tensor.mode"),
            f"weight.size={size} needs tensor mode isp, found {parallel.tensor.mode}",
            fix='set parallel.tensor=dict(size=..., mode="isp"), or weight.size=1',
            code="EVO-CONFIG-007",
        )
        return
    # Weights are sharded by rows. Those of wo and w2 are hidden_size, as of the norms.
    rows = {
        "hidden_size": model.hidden_size,
        "width of q, k and v": model.qkv_width,
        **_head_norm_rows(model),
        "feed-forward width": model.mlp_width,
    }
    for name, length in rows.items():
        if length % size:
            yield ConfigFinding(
                ("parallel.weight.size",),
                f"{size} does not divide the {name}, {length}",
                expected=f"size={nearest(size, length)}",
                code="EVO-CONFIG-008",
            )


def _stage_findings(config: Config) -> Iterator[ConfigFinding]:
    layers = config.model.num_layers
    pp = config.parallel.pipeline.size
    chunks = config.model.num_chunks
    # Each chunk needs a layer, or a stage would have nothing to compute.
    needed = pp * chunks
    if needed > layers:
        largest = max(layers // chunks, 1)
        yield ConfigFinding(
            ("parallel.pipeline.size", "model.num_chunks", "model.num_layers"),
            f"{counted(pp, 'stage')} of {counted(chunks, 'chunk')} need {needed} layers, num_layers={layers}",
            expected=f"pipeline.size at most {largest}",
            code="EVO-CONFIG-008",
        )


def _schedule_findings(config: Config) -> Iterator[ConfigFinding]:
    chunks = config.model.num_chunks
    schedule = pipeline_schedule(config)
    key = ("parallel.pipeline.schedule", "model.num_chunks")
    fits = {"1f1b": chunks == 1, "interleaved": chunks > 1, "zbv": chunks == 2}
    if not fits[schedule]:
        yield ConfigFinding(
            key,
            f"schedule {schedule} with num_chunks={chunks}",
            expected=f"{schedule} has {CHUNKS[schedule]}",
            code="EVO-CONFIG-007",
        )
    elif schedule == "interleaved":
        yield from _interleaved_findings(config.data, config.parallel.pipeline.size)
    elif schedule == "zbv":
        yield from _zero_bubble_findings(config, key)


def _interleaved_findings(data: DataConfig, pp: int) -> Iterator[ConfigFinding]:
    """Yield micro-batch counts, in a rampup too, that are not a multiple of the stages.

    An interleaved pipeline takes micro-batches in groups of one per stage.
    """
    if data.micro_num % pp:
        yield ConfigFinding(
            ("data.micro_num", "parallel.pipeline.size", "model.num_chunks"),
            f"micro_num={data.micro_num} is not a multiple of the {pp} stages of an interleaved pipeline",
            expected=f"micro_num={nearest(data.micro_num, multiples_of=pp)}",
            code="EVO-CONFIG-008",
        )
    # All sizes of the ramp are multiples of the stages if start and increment are.
    rampup = data.rampup_batch_size
    if rampup is not None and math.gcd(rampup.start, rampup.increment) % pp:
        yield ConfigFinding(
            ("data.rampup_batch_size", "parallel.pipeline.size", "model.num_chunks"),
            f"rampup_batch_size={rampup} is not a multiple of the {pp} stages of an interleaved pipeline",
            expected=f"start and increment multiples of {pp}",
            code="EVO-CONFIG-008",
        )


def _zero_bubble_findings(
    config: Config, key: tuple[str, ...]
) -> Iterator[ConfigFinding]:
    """Yield settings that zbv excludes: it computes the gradients of inputs and of weights at different times."""
    obstacles = {}
    if config.parallel.weight.size > 1:
        obstacles["parallel.weight.size"] = RESHARDS_EARLY
    if config.parallel.zero1.fsdp:
        obstacles["parallel.zero1.fsdp"] = RESHARDS_EARLY
    if config.model.compile is True:
        obstacles["model.compile"] = "a compiled block computes both together"
    for other, reason in obstacles.items():
        yield ConfigFinding(
            (key[0], other),
            f"schedule zbv cannot be combined with {other.split('.')[-1]}: {reason}",
            fix='set parallel.pipeline.schedule="interleaved"',
            code="EVO-CONFIG-007",
        )
