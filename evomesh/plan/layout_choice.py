"""The layouts that a search tries: every combination of sizes that the rules of the config allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from evomesh.config.layout import (
    AxisSizes,
    check_world,
    layout_findings,
    run_sizes,
)
from evomesh.config.schema import Config
from evomesh.config.zero_size import best_zero
from evomesh.errors import UserError

# Fractions of layers to recompute. More recomputing than a layout needs to fit makes it
# slower, and nothing better.
RECOMPUTE = (0.0, 0.25, 0.5, 0.75, 1.0)
# Of a tensor axis that is to be larger, of micro-batches that are to be smaller.
_FACTORS = (2, 4, 8)
_MOST_TENSOR = 8
# Stages of one rank of a pipeline.
CHUNKS = (1, 2, 4)
Mode = Literal["mtp", "msp", "fsp", "isp"]


@dataclass(frozen=True)
class LayoutChoice:
    """Sizes of one layout, and how a step is divided into micro-batches.

    Attributes:
        zero: size of the zero axis.
        recompute: fraction of the layers whose activations are recomputed.
        chunks: stages of a pipeline rank.
    """

    mode: Mode
    tensor: int
    weight: int
    pipeline: int
    chunks: int
    zero: int
    fsdp: bool
    recompute: float
    micro_bsz: int
    micro_num: int

    def sections(self) -> dict[str, dict[str, Any]]:
        """Return the keys of a config that make this layout, by section."""
        zero1: dict[str, Any] = {"size": self.zero}
        if self.fsdp:
            zero1["fsdp"] = True
        parallel: dict[str, Any] = {
            "zero1": zero1,
            "tensor": {"size": self.tensor, "mode": self.mode},
            "pipeline": {"size": self.pipeline},
        }
        if self.mode == "isp":
            parallel["weight"] = {"size": self.weight, "overlap": True}
        return {
            "parallel": parallel,
            "model": {
                "checkpoint": self.recompute,
                "num_chunks": self.chunks,
            },
            "data": {
                "micro_bsz": self.micro_bsz,
                "micro_num": self.micro_num,
            },
        }

    def __str__(self) -> str:
        parts = [f"{self.mode} {self.tensor}"]
        if self.mode == "isp":
            parts.append(f"weight {self.weight}")
        if self.pipeline > 1:
            chunks = f" x {self.chunks} chunks" if self.chunks > 1 else ""
            parts.append(f"pipeline {self.pipeline}{chunks}")
        parts.append(f"zero1 {self.zero}{' fsdp' if self.fsdp else ''}")
        if self.recompute:
            parts.append(f"recompute {self.recompute:g}")
        parts.append(f"{self.micro_num} x {self.micro_bsz}")
        return ", ".join(parts)


def choice_of(config: Config, world_size: int) -> LayoutChoice:
    """Return the layout that a config has."""
    sizes = run_sizes(config, world_size)
    parallel = config.parallel
    return LayoutChoice(
        mode=parallel.tensor.mode,
        tensor=sizes.tp,
        weight=sizes.wp,
        pipeline=sizes.pp,
        chunks=config.model.num_chunks,
        zero=sizes.zero,
        fsdp=parallel.zero1.fsdp,
        recompute=float(config.model.checkpoint),
        micro_bsz=config.data.micro_bsz,
        micro_num=config.data.micro_num,
    )


def with_choice(config: Config, choice: LayoutChoice) -> Config:
    """Return the config with a layout."""
    values = choice.sections()
    parallel = config.parallel
    changes = values["parallel"]
    updated = {}
    for name, keys in changes.items():
        updated[name] = getattr(parallel, name).model_copy(update=keys)
    if choice.mode != "isp":
        updated["weight"] = parallel.weight.model_copy(update={"size": 1})
    return config.model_copy(
        update={
            "parallel": parallel.model_copy(update=updated),
            "model": config.model.model_copy(update=values["model"]),
            "data": config.data.model_copy(update=values["data"]),
        }
    )


def is_allowed(config: Config, choice: LayoutChoice, world_size: int) -> bool:
    """Return whether a run would start with this layout, and have the tokens of the config in a step."""
    ranks = world_size // choice.pipeline // choice.tensor
    sequences = choice.micro_bsz * choice.micro_num * ranks
    if sequences != sequences_of(config, world_size):
        return False
    changed = with_choice(config, choice)
    try:
        check_world(changed, world_size)
    except UserError:
        return False
    return next(layout_findings(changed), None) is None


def every_choice(
    config: Config, world_size: int, gpus_per_node: int
) -> Iterator[LayoutChoice]:
    """Yield layouts without recomputing, whether or not a run would start with them.

    Tensor and weight axes stay inside a node. The tokens of a step are those of the
    config: layouts with fewer data-parallel ranks have more micro-batches.
    """
    now = choice_of(config, world_size)
    most = min(gpus_per_node, world_size)
    for mode, tensor, weight in _tensor_choices(most):
        for pipeline in _powers_of_two(min(world_size, config.model.num_layers)):
            ranks_per_stage = world_size // pipeline
            shards = weight if mode == "isp" else tensor
            group = ranks_per_stage // shards
            if group == 0:
                continue
            layout = replace(
                now,
                mode=mode,
                tensor=tensor,
                weight=weight,
                pipeline=pipeline,
                chunks=1,
                zero=group,
                fsdp=False,
                recompute=0.0,
            )
            for zero, fsdp in _zero_choices(config, layout, gpus_per_node):
                layout = replace(layout, zero=zero, fsdp=fsdp)
                yield from _step_choices(config, layout, world_size)


def _step_choices(
    config: Config, layout: LayoutChoice, world_size: int
) -> Iterator[LayoutChoice]:
    """Yield a layout with each size of micro-batches, and each number of chunks."""
    ranks_per_stage = world_size // layout.pipeline
    data_ranks = max(ranks_per_stage // layout.tensor, 1)
    sequences = sequences_of(config, world_size)
    chunks: tuple[int, ...] = (1,)
    if layout.pipeline > 1:
        chunks = CHUNKS
    for micro_bsz in micro_batch_sizes(config.data.micro_bsz):
        # Where these do not divide, a step would have other tokens: see "is_allowed".
        micro_num = sequences // (data_ranks * micro_bsz)
        for count in chunks:
            yield replace(
                layout,
                chunks=count,
                micro_bsz=micro_bsz,
                micro_num=micro_num,
            )


def sequences_of(config: Config, world_size: int) -> int:
    """Return the sequences of one step."""
    sizes = run_sizes(config, world_size)
    data = config.data
    return data.micro_bsz * data.micro_num * sizes.dp


def micro_batch_sizes(now: int) -> list[int]:
    """Return the sizes that a search tries: that of the config, half and double."""
    if now % 2:
        return [now, 2 * now]
    return [now // 2, now, 2 * now]


def single_changes(
    config: Config, choice: LayoutChoice, world_size: int
) -> Iterator[list[LayoutChoice]]:
    """Yield for each thing that saves memory the allowed layouts that differ in it alone, the smallest change first."""
    present = with_choice(config, choice)
    sizes = run_sizes(present, world_size)
    most_shared = best_zero(present, sizes)
    several: list[list[dict[str, Any]]] = [
        [{"recompute": fraction} for fraction in RECOMPUTE],
        [_with_tensor(choice, factor) for factor in _FACTORS],
        [{"fsdp": True}],
        [{"zero": most_shared}],
        [_with_smaller_micro_batches(choice, factor) for factor in _FACTORS],
    ]
    for changes in several:
        allowed = []
        for change in changes:
            changed = replace(choice, **change)
            is_new = changed != choice and changed not in allowed
            is_less = is_new and changed.recompute >= choice.recompute
            if is_less and is_allowed(config, changed, world_size):
                allowed.append(changed)
        if allowed:
            yield allowed


def _with_tensor(choice: LayoutChoice, factor: int) -> dict[str, Any]:
    """Return a larger tensor axis, inside a node, with the tokens of a step as before."""
    tensor = min(choice.tensor * factor, _MOST_TENSOR)
    larger = max(tensor // choice.tensor, 1)
    return {
        "tensor": choice.tensor * larger,
        "micro_num": choice.micro_num * larger,
    }


def _with_smaller_micro_batches(choice: LayoutChoice, factor: int) -> dict[str, Any]:
    if choice.micro_bsz % factor:
        return {}
    return {
        "micro_bsz": choice.micro_bsz // factor,
        "micro_num": choice.micro_num * factor,
    }


def least_changes(
    several: Iterable[list[LayoutChoice]], fits: Callable[[LayoutChoice], bool]
) -> Iterator[LayoutChoice]:
    """Yield of each list of ever larger changes the first with which a layout fits."""
    for changes in several:
        # Where the largest does not suffice none does.
        if not fits(changes[-1]):
            continue
        for change in changes:
            if fits(change):
                yield change
                break


def difference(before: LayoutChoice, after: LayoutChoice) -> str:
    """Return the keys in which a layout differs from another."""
    keys = {
        "tensor": "parallel.tensor.size",
        "zero": "parallel.zero1.size",
        "fsdp": "parallel.zero1.fsdp",
        "recompute": "model.checkpoint",
        "micro_bsz": "data.micro_bsz",
        "micro_num": "data.micro_num",
    }
    parts = []
    for name, key in keys.items():
        value = getattr(after, name)
        if value != getattr(before, name):
            parts.append(f"{key}={value}")
    return ", ".join(parts)


def _tensor_choices(most: int) -> Iterator[tuple[Mode, int, int]]:
    """Yield mode, tensor size and weight size."""
    yield "mtp", 1, 1
    modes: tuple[Mode, ...] = ("mtp", "msp", "fsp")
    for tensor in _powers_of_two(most):
        for mode in modes:
            if tensor > 1:
                yield mode, tensor, 1
        for weight in _powers_of_two(most):
            if weight > 1:
                yield "isp", tensor, weight


def _zero_choices(
    config: Config, layout: LayoutChoice, gpus_per_node: int
) -> Iterator[tuple[int, bool]]:
    """Yield the size of the zero axis, and whether weights are sharded too: over the most ranks, a node, or none.

    Args:
        layout: with all data-parallel ranks in the zero axis.
    """
    group = layout.zero
    axes = AxisSizes(
        pp=layout.pipeline,
        dp=group,
        tp=layout.tensor,
        wp=layout.weight,
        zero=group,
        replica=1,
        isp=layout.mode == "isp",
    )
    sizes = {best_zero(config, axes), min(group, gpus_per_node), 1}
    for size in sorted(sizes, reverse=True):
        if group % size:
            continue
        yield size, False
        if size > 1 and layout.mode != "isp":
            yield size, True


def _powers_of_two(most: int) -> list[int]:
    powers = []
    power = 1
    while power <= most:
        powers.append(power)
        power *= 2
    return powers
