"""Put the parameters of a model together from the parts that DeepSpeed's ranks hold.

ZeRO 1 and 2 put the parameters of an optimizer group end to end and split the whole into
one part for each rank, so a parameter may continue on the next rank:

    rank 0: a a a a b b | rank 1: b b c c c .       (. is padding)

ZeRO 3 shards each parameter into equal parts, padded on the last rank, and puts a rank's
parts end to end:

    rank 0: a a b b c c | rank 1: a a b . c .

The order is that of ``param_shapes`` in the model's file.

Source: deepspeed/utils/zero_to_fp32.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from evomesh.checkpoint.deepspeed.shards import ZeroFolder
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.stored_tensor import StoredTensor

Shape = tuple[int, ...]
GROUPS = {  # where the master weights are, by stage
    1: "single_partition_of_fp32_groups",
    2: "single_partition_of_fp32_groups",
    3: "fp32_flat_groups",
}


class Weight(Protocol):
    """A parameter on disk."""

    @property
    def shape(self) -> Shape: ...

    def read(self) -> Tensor: ...


@dataclass(frozen=True)
class FlatParts:
    """Flat tensors that count as one, end to end."""

    parts: tuple[StoredTensor, ...]

    @property
    def numel(self) -> int:
        return sum(part.numel for part in self.parts)

    def read(self, start: int, stop: int) -> list[Tensor]:
        """Return the numbers of a range, in as many pieces as parts hold some of them."""
        pieces = []
        first = 0
        for part in self.parts:
            last = first + part.numel
            if start < last and stop > first:
                numbers = part.read().reshape(-1)
                # Of the wanted range, what this part has of it.
                begin = max(start - first, 0)
                end = min(stop, last) - first
                pieces.append(numbers[begin:end])
            first = last
        return pieces


@dataclass(frozen=True)
class GatheredWeight:
    """A parameter of which each of ``sources`` holds the numbers ``start`` to ``stop``; padding follows the last."""

    shape: Shape
    sources: tuple[FlatParts, ...]
    start: int
    stop: int

    def read(self) -> Tensor:
        pieces: list[Tensor] = []
        for source in self.sources:
            pieces += source.read(self.start, self.stop)
        if not pieces:
            return torch.empty(self.shape)
        padded = torch.cat(pieces)
        # The last part may end with padding.
        numel = math.prod(self.shape)
        numbers = padded[:numel]
        return numbers.view(self.shape)


def gather_weights(folder: ZeroFolder) -> dict[str, Weight]:
    """Return all parameters and buffers of a checkpoint by name, none of them read.

    Raises:
        CheckpointError: the sizes of the parts are not those of the parameters.
    """
    model = _tensors(folder, folder.first, "module")
    if folder.stage == 0:
        return dict(model)
    buffers = folder.first.get("buffer_names") or ()
    weights: dict[str, Weight] = {
        name: model[name] for name in buffers if name in model
    }
    weights |= _frozen(folder)
    weights |= _trained(folder)
    # Parameters that are one tensor under several names were trained as one.
    shared = folder.first.get("shared_params") or {}
    for alias, name in shared.items():
        if name in weights:
            weights[alias] = weights[name]
    return weights


def _tensors(
    folder: ZeroFolder, model: Mapping[str, Any], key: str
) -> dict[str, StoredTensor]:
    """Return the named tensors under a key of a model's file."""
    found = model.get(key) or {}
    if not isinstance(found, Mapping):
        raise _unreadable(folder, key, "named tensors")
    return {
        name: value for name, value in found.items() if isinstance(value, StoredTensor)
    }


def _unreadable(folder: ZeroFolder, key: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{key} in *_states.pt is not what DeepSpeed writes",
        where=str(folder.path),
        expected=expected,
        code="EVO-CKPT-020",
    )


def _shapes(folder: ZeroFolder, key: str) -> list[dict[str, Shape]]:
    """Return the shapes by name under a key, in their order: one dict for each optimizer group."""
    stored = folder.first.get(key) or []
    # Those of frozen parameters, which are in no group, are one dict.
    groups = [stored] if isinstance(stored, Mapping) else stored
    shapes = []
    for group in groups:
        if not isinstance(group, Mapping):
            raise _unreadable(folder, key, "shapes by name")
        named = {}
        for name, shape in group.items():
            if not _is_shape(shape):
                raise _unreadable(folder, key, "shapes by name")
            named[name] = tuple(shape)
        shapes.append(named)
    return shapes


def _is_shape(value: Any) -> bool:
    if not isinstance(value, tuple | list):
        return False
    return all(type(size) is int and size >= 0 for size in value)


def _trained(folder: ZeroFolder) -> dict[str, Weight]:
    """Return the parameters that were trained, from the master weights."""
    shapes = _shapes(folder, "param_shapes")
    flat = [_flat_groups(folder, state) for state in folder.optimizers]  # [rank][group]
    if folder.stage == 3:
        gathered = _from_equal_parts(folder, shapes, flat)
        return dict(gathered)
    counts = sorted({len(groups) for groups in flat})
    if counts != [len(shapes)]:
        raise CheckpointError(
            f"{len(shapes)} optimizer groups in the model's file, {counts} in *_optim_states.pt",
            where=str(folder.path),
            expected="the files of one checkpoint",
            code="EVO-CKPT-020",
        )
    weights: dict[str, Weight] = {}
    for number, group in enumerate(shapes):
        parts = tuple(groups[number] for groups in flat)  # of each rank
        gaps = _gaps(folder, number, len(group))
        weights |= _from_whole(folder, number, group, FlatParts(parts), gaps)
    return weights


def _flat_groups(folder: ZeroFolder, state: Mapping[str, Any]) -> list[StoredTensor]:
    """Return one rank's part of the master weights, a flat tensor for each group."""
    key = GROUPS[folder.stage]
    groups = state.get(key)
    if not isinstance(groups, list):
        raise _unreadable(folder, key, "a list of flat tensors")
    for group in groups:
        if not isinstance(group, StoredTensor):
            raise _unreadable(folder, key, "a list of flat tensors")
    return groups


def _gaps(folder: ZeroFolder, group: int, count: int) -> Sequence[int]:
    """Return the padding after each parameter of a group; older versions have none."""
    key = "param_alignment_paddings"
    stated = folder.optimizers[0].get(key)
    if stated is None:
        return [0] * count
    gaps: Any = None
    if isinstance(stated, list) and group < len(stated):
        gaps = stated[group]
    if not _is_shape(gaps):
        raise _unreadable(folder, key, f"{count} numbers for group {group}")
    if not any(gaps):
        # Files of version 0.19 may list those of this rank's parameters alone.
        return [0] * count
    if len(gaps) != count:
        raise _unreadable(folder, key, f"{count} numbers for group {group}")
    return list(gaps)


def _from_whole(
    folder: ZeroFolder,
    number: int,
    group: Mapping[str, Shape],
    whole: FlatParts,
    gaps: Sequence[int],
) -> Iterator[tuple[str, Weight]]:
    """Yield the parameters of a group that the ranks hold as one flat tensor (ZeRO 1 and 2)."""
    needed = sum(map(math.prod, group.values())) + sum(gaps)
    # The whole is padded to a multiple of two numbers for each rank.
    padding = whole.numel - needed
    ranks = len(folder.optimizers)
    if not 0 <= padding < 2 * ranks:
        raise CheckpointError(
            f"the {len(group)} parameters of optimizer group {number} have {needed:,} numbers, the parts of "
            f"{ranks} ranks {whole.numel:,}",
            where=str(folder.path),
            expected=f"as many, and less than {2 * ranks} of padding",
            fix="copy the files of one checkpoint",
            code="EVO-CKPT-020",
        )
    start = 0
    for (name, shape), gap in zip(group.items(), gaps, strict=True):
        stop = start + math.prod(shape)
        yield name, GatheredWeight(shape, (whole,), start, stop)
        start = stop + gap


def _from_equal_parts(
    folder: ZeroFolder,
    shapes: Sequence[Mapping[str, Shape]],
    flat: Sequence[Sequence[StoredTensor]],
) -> Iterator[tuple[str, Weight]]:
    """Yield the parameters of which each rank holds an equal part (ZeRO 3)."""
    ranks = len(flat)
    # The groups of a rank continue one another, so a part may be in two of them.
    sources = tuple(FlatParts(tuple(groups)) for groups in flat)
    merged = _merged(shapes)
    parts = {}
    for name, shape in merged.items():
        numel = math.prod(shape)
        parts[name] = -(-numel // ranks)
    needed = sum(parts.values())
    for rank, source in enumerate(sources):
        if source.numel != needed:
            raise CheckpointError(
                f"the {len(merged)} parameters have {needed:,} numbers on each of {ranks} ranks, the file of "
                f"rank {rank} has {source.numel:,}",
                where=str(folder.path),
                expected="as many in each",
                fix="copy the files of one checkpoint",
                code="EVO-CKPT-020",
            )
    start = 0
    for name, shape in merged.items():
        stop = start + parts[name]
        yield name, GatheredWeight(shape, sources, start, stop)
        start = stop


def _merged(groups: Sequence[Mapping[str, Shape]]) -> dict[str, Shape]:
    """Return the shapes of all groups in one dict, in their order."""
    shapes: dict[str, Shape] = {}
    for group in groups:
        shapes.update(group)
    return shapes


def _frozen(folder: ZeroFolder) -> Iterator[tuple[str, Weight]]:
    """Yield the parameters that were not trained: whole in the model's file, or in a part for each rank (ZeRO 3)."""
    shapes = _merged(_shapes(folder, "frozen_param_shapes"))
    key = "frozen_param_fragments"
    parts_by_rank = [_tensors(folder, model, key) for model in folder.models]
    ranks = len(parts_by_rank)
    for name, shape in shapes.items():
        numel = math.prod(shape)
        part_size = -(-numel // ranks)  # rounded up
        expected_sizes = [part_size] * ranks
        held = [parts[name] for parts in parts_by_rank if name in parts]
        sizes = [part.numel for part in held]
        if sizes != expected_sizes:
            raise CheckpointError(
                f"frozen parameter {name} of {numel:,} numbers has parts of {sizes}",
                where=str(folder.path),
                expected=f"{ranks} parts of {part_size:,}",
                code="EVO-CKPT-020",
            )
        sources = tuple(FlatParts((part,)) for part in held)
        yield name, GatheredWeight(shape, sources, 0, part_size)
