"""Convert InternEvo's optimizer, counters and data position where their meaning is proved.

A rank's optimizer file holds one flat float32 tensor per parameter group, with its two
moments. InternEvo's rule tells which parameters were joined in it: whole parameters,
the largest first, each to the rank with the fewest elements so far. The master weights
prove it: rounded to the dtype of the weights they must be the weights, bit for bit;
otherwise nothing is converted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evomesh.checkpoint.internevo.model import (
    HeadCounts,
    InternEvoFolder,
    W2Role,
    find_model_files,
    merge_folder,
)
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.pickles import read_pickle

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)
HALF = (torch.float16, torch.bfloat16)
FIX = 'load the weights alone: --weights-only, or load_ckpt_info content=("model",)'
StateDict = dict[str, Tensor]
_RankStates = dict[tuple[int, int], StateDict]  # by (pp, tp)
_LocalStates = dict[str, _RankStates]  # by kind


def read_optimizer(
    path: str,
    heads: HeadCounts,
    w2: W2Role = "auto",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read optimizer state from a folder of InternEvo.

    Returns:
        unsharded optimizer tensors under our names, and {"optimizer": ..., "scaler": ...}
        as we save them.

    Raises:
        CheckpointError: a file is missing, is of isp, or contradicts the rule in the
            module's docstring; names it.
    """
    folder = find_model_files(path)
    if folder.isp:
        raise CheckpointError(
            "how the optimizer files of isp are sharded is not known",
            where=path,
            fix=FIX,
            code="EVO-CKPT-018",
        )
    # 1. Split the flat tensors of every rank of the tp x pp grid into local tensors.
    local, steps, scaler = _read_local(folder)
    if len(steps) != 1:
        raise CheckpointError(
            f"the optimizer files are of steps {sorted(steps)}",
            where=path,
            fix=FIX,
            code="EVO-CKPT-018",
        )

    # 2. Merge them over the grid like the weights. Our checkpoints have masters of
    #    half-precision weights only.
    half = set()
    for name, tensor in merge_folder(folder, heads, w2):
        if tensor.dtype in HALF:
            half.add(name)
    merged: dict[str, Tensor] = {}
    for kind, states in local.items():
        for name, tensor in _merge_kind(folder, states, heads, w2):
            if kind != "master" or name in half:
                merged[f"optim.{kind}.{name}"] = tensor

    # 3. Translate the scalars.
    optimizer = {"steps": steps.pop()}
    scale = {
        "scale": float(scaler.get("_scale", 1.0)),
        "good_steps": int(scaler.get("_growth_step", 0)),
        "overflows": int(scaler.get("_hysteresis_step", 0)),
    }
    return merged, {"optimizer": optimizer, "scaler": scale}


class _LocalOptimizer(NamedTuple):
    """The optimizer state of all files, not yet merged over the grid.

    Attributes:
        states: local tensors by kind and (pp, tp).
        steps: the step counts of all files.
        scaler: state of the loss scaler.
    """

    states: _LocalStates
    steps: set[int]
    scaler: dict[str, Any]


def _read_local(folder: InternEvoFolder) -> _LocalOptimizer:
    states: _LocalStates = {kind: {} for kind in KINDS}
    steps = set()
    scaler = {}
    for pp in range(folder.pp_size):
        weights_of_ranks = folder.stage_states(pp)
        for tp, weights in enumerate(weights_of_ranks):
            files = _zero_files(folder.path, tp, pp)
            contents = [_read_content(file) for file in files]
            by_kind, rank_steps = _unflatten(weights, contents, files)
            for kind, tensors in by_kind.items():
                of_kind = states[kind]
                of_kind[pp, tp] = tensors
            steps |= rank_steps
            # Every file has the state of the same scaler.
            first_content = contents[0]
            scaler = first_content.get("grad_scaler", {})
    return _LocalOptimizer(states, steps, scaler)


def read_counters(path: str) -> dict[str, Any]:
    """Return {"train": ..., "sampler": ...} of InternEvo's counters.

    They are in context.pt, sampler.pt and schedulder.pt (InternEvo's spelling).

    Raises:
        CheckpointError: one of them is missing, or they contradict one another; names it.
    """
    context = _read_dict(path, "context.pt")
    sampler = _read_dict(path, "sampler.pt")
    schedule = _read_dict(path, "schedulder.pt")

    def of_context(name: str) -> int:
        return _integer(context, name, path, "context.pt")

    def of_sampler(name: str) -> int:
        return _integer(sampler, name, path, "sampler.pt")

    # ``batch_count`` is the number of the last batch, ``step_count`` counts updates: a
    # batch whose gradient overflowed is in the first only. Their learning rate follows
    # the second.
    step = of_context("batch_count") + 1
    updates = int(context.get("step_count", step))
    if "last_epoch" in schedule and int(schedule["last_epoch"]) != updates:
        raise CheckpointError(
            f"the schedule is at {schedule['last_epoch']} updates, the counters at {updates}",
            where=os.path.join(path, "schedulder.pt"),
            fix=FIX,
            code="EVO-CKPT-018",
        )
    train: dict[str, Any] = {
        "num_consumed_tokens": of_context("num_consumed_tokens"),
        "inf_nan_skip_batches": of_context("inf_nan_skip_batches"),
        "step": step,
        "step_count": updates,
        "consecutive_skips": 0,
        "run_folder": "",
    }
    # Each data-parallel rank has a sampler of its share, so all of theirs is per rank.
    data_ranks = of_sampler("data_world_size")
    position = {
        "step": step,
        "seed": of_sampler("seed"),
        "global_batch": of_sampler("batch_size") * data_ranks,
        "offset": of_sampler("num_consumed_samples_in_epoch") * data_ranks,
    }
    return {"train": train, "sampler": {"internevo": position}, "data": None}


def _read_dict(path: str, name: str) -> dict[str, Any]:
    file = os.path.join(path, name)
    content = read_pickle(file)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"holds a {type(content).__name__}",
            where=file,
            expected="a dict",
            fix=FIX,
            code="EVO-CKPT-018",
        )
    return content


def _integer(record: dict[str, Any], name: str, path: str, file: str) -> int:
    value = record.get(name)
    if not isinstance(value, int):
        raise CheckpointError(
            f"{name} is {value!r}",
            where=os.path.join(path, file),
            expected="an integer",
            fix=FIX,
            code="EVO-CKPT-018",
        )
    return value


def _zero_files(path: str, tp: int, pp: int) -> list[str]:
    """Return the optimizer files of all ZeRO ranks at one grid position."""
    pattern = re.compile(rf"^optimizer_tp{tp}_pp{pp}_zo(\d+)\.pt$")
    files: dict[int, str] = {}
    for name in os.listdir(path):
        match = pattern.match(name)
        if match:
            zero_rank = int(match[1])
            files[zero_rank] = os.path.join(path, name)
    ranks = sorted(files)
    if not files or ranks != list(range(len(files))):
        names = sorted(os.path.basename(file) for file in files.values())
        have = ", ".join(names) or "none"
        raise CheckpointError(
            f"optimizer_tp{tp}_pp{pp}_zo*.pt is incomplete; the folder has: {have}",
            where=path,
            expected="zo0, zo1, ...",
            fix=FIX,
            code="EVO-CKPT-018",
        )
    return [files[rank] for rank in ranks]


def _read_content(file: str) -> dict[str, Any]:
    content = read_pickle(file)
    for key in ("base_optim_states", "flat_fp32_weights"):
        if not isinstance(content, dict) or not isinstance(content.get(key), dict):
            raise CheckpointError(
                f"has no {key}",
                where=file,
                expected="InternEvo's optimizer state",
                fix=FIX,
                code="EVO-CKPT-018",
            )
    checked: dict[str, Any] = content
    return checked


def _unflatten(
    weights: StateDict, contents: list[dict[str, Any]], files: list[str]
) -> tuple[dict[str, StateDict], set[int]]:
    """Split the flat tensors of all ZeRO ranks at one grid position.

    Returns:
        Local tensors by kind and name, in the order of ``weights``; and the step counts
        of the moments.
    """
    # The flat master of a rank, by a layer with a wqkv of 12, a w1 of 8 and a norm of 4
    # elements on two ranks, all of one group:
    #
    #     zo0   wqkv wqkv wqkv ...                  12 elements
    #     zo1   w1 w1 ... norm norm ...              8 + 4
    #
    # No file says where one parameter ends: the rule of ``_assign_to_ranks`` does.
    groups = _parameter_groups(weights)
    numbers = _group_numbers(contents)
    if len(numbers) != len(groups):
        raise CheckpointError(
            f"holds parameter groups {numbers}, but the weights form {len(groups)}",
            where=files[0],
            fix=FIX,
            code="EVO-CKPT-018",
        )
    tensors: dict[str, StateDict] = {kind: {} for kind in KINDS}
    steps: set[int] = set()
    for number, names in zip(numbers, groups, strict=True):
        assigned = _assign_to_ranks(weights, names, len(files))
        for rank, owned in enumerate(assigned):
            if not owned:  # a group with fewer parameters than there are ranks
                continue
            own_weights = {name: weights[name] for name in owned}
            parts, step = _unflatten_rank(
                contents[rank], number, own_weights, files[rank]
            )
            steps.add(step)
            for kind, part in parts.items():
                tensors[kind] |= part
    in_order = {}
    for kind, found in tensors.items():
        in_order[kind] = {name: found[name] for name in weights}
    return in_order, steps


def _unflatten_rank(
    content: dict[str, Any], number: int, own_weights: StateDict, file: str
) -> tuple[dict[str, StateDict], int]:
    """Split one rank's flat tensors of a group; return them by kind and name, with their step."""
    flats, step = _flat_tensors(content, number, file)
    parts: dict[str, StateDict] = {}
    group = f"group {number}"
    for kind, flat in flats.items():
        described = f"{kind} of {group}"
        part = _split_flat(flat, own_weights, described, file)
        parts[kind] = part
    masters = parts["master"]
    _prove_masters(masters, own_weights, file)
    return parts, step


def _group_numbers(contents: list[dict[str, Any]]) -> list[int]:
    """Return the numbers of the parameter groups that any rank's file has."""
    numbers: set[int] = set()
    for content in contents:
        masters = content["flat_fp32_weights"]
        numbers.update(int(number) for number in masters)
    return sorted(numbers)


def _parameter_groups(weights: StateDict) -> list[list[str]]:
    """Return the parameter names of each group.

    Half precision comes first, then what stays in float32 (norms).
    """
    half: list[str] = []
    wide: list[str] = []
    for name, tensor in weights.items():
        group = half if tensor.dtype in HALF else wide
        group.append(name)
    return [names for names in (half, wide) if names]


def _assign_to_ranks(
    weights: StateDict,
    names: list[str],
    ranks: int,
) -> list[list[str]]:
    """Return the parameters of each ZeRO rank, in the order in which it joins them.

    This is InternEvo's greedy rule: the largest parameter first, each one to the rank
    with the fewest elements so far. Sizes 8, 5, 4 and 3 on two ranks give 8 + 3 and
    5 + 4.
    """
    assigned: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    sizes = {name: weights[name].numel() for name in names}
    # Stable: equal sizes keep their order.
    largest_first = sorted(names, key=lambda name: -sizes[name])
    for name in largest_first:
        smallest_load = min(loads)
        lightest = loads.index(smallest_load)
        assigned[lightest].append(name)
        loads[lightest] += sizes[name]
    return assigned


def _flat_tensors(
    content: dict[str, Any], group: int, file: str
) -> tuple[dict[str, Any], int]:
    """Return the flat master and moments of a parameter group by kind, and their step."""
    masters = content["flat_fp32_weights"]
    base = content["base_optim_states"]
    try:
        # A group has one parameter, the flat tensor; AdamW knows it by its number.
        groups = base["param_groups"]
        (number,) = groups[group]["params"]
        moments = base["state"][number]
        flats = {"master": masters[group]}
        for kind in MOMENTS:
            flats[kind] = moments[kind]
        return flats, int(moments["step"])
    except (KeyError, IndexError, TypeError, ValueError):
        raise CheckpointError(
            f"lacks AdamW's state of parameter group {group}",
            where=file,
            fix=FIX,
            code="EVO-CKPT-018",
        ) from None


def _split_flat(
    flat: object,
    weights: StateDict,
    described: str,
    file: str,
) -> StateDict:
    """Split one flat tensor into tensors of the names and shapes of ``weights``.

    It joins them in this order.
    """
    sizes = [weight.numel() for weight in weights.values()]
    elements = flat.numel() if isinstance(flat, Tensor) else 0
    if not isinstance(flat, Tensor) or elements != sum(sizes):
        raise CheckpointError(
            f"{described} has {elements} elements, its parameters have {sum(sizes)}",
            where=file,
            fix=FIX,
            code="EVO-CKPT-018",
        )
    parts = torch.split(flat.flatten(), sizes)
    tensors: StateDict = {}
    for (name, weight), part in zip(weights.items(), parts, strict=True):
        tensors[name] = part.view(weight.shape)
    return tensors


def _prove_masters(masters: StateDict, weights: StateDict, file: str) -> None:
    """Check that the rounded masters are the weights.

    This proves the order in which parameters were joined.

    Raises:
        CheckpointError: one is not.
    """
    # Two parameters of equal size can change places without a sign in any shape. Their
    # values tell them apart: after any training no two are equal bit for bit.
    for name, weight in weights.items():
        rounded = masters[name].to(weight.dtype)
        if not torch.equal(rounded, weight):
            raise CheckpointError(
                f"the master of {name} is not its weight: the parameters were not joined in the known order",
                where=file,
                fix=FIX,
                code="EVO-CKPT-018",
            )


def _merge_kind(
    folder: InternEvoFolder, states: _RankStates, heads: HeadCounts, w2: W2Role
) -> Iterator[tuple[str, Tensor]]:
    """Merge the local tensors of one kind, by (pp, tp), like the weights."""

    def stage_states(pp: int) -> list[StateDict]:
        return [states[pp, tp] for tp in range(folder.tp_size)]

    yield from merge_folder(folder, heads, w2, stage_states)
