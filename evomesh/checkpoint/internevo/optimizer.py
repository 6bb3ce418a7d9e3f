"""Convert InternEvo's optimizer, counters and data position where it can be proved what they mean.

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
from typing import Any

import torch
from torch import Tensor

from evomesh.checkpoint.internevo.model import (
    HeadCounts,
    InternEvoFolder,
    W2Role,
    find_model_files,
    merge_folder,
)
from evomesh.checkpoint.internevo.pickles import read_pickle
from evomesh.checkpoint.native.format import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)
HALF = (torch.float16, torch.bfloat16)
FIX = 'load the weights alone: --weights-only, or load_ckpt_info content=("model",)'
StateDict = dict[str, Tensor]
_LocalStates = dict[str, dict[tuple[int, int], StateDict]]  # by kind, then by (pp, tp)


def read_optimizer(
    path: str,
    heads: HeadCounts,
    w2: W2Role = "auto",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return unsharded optimizer tensors under our names, and {"optimizer": ..., "scaler": ...} as we save them.

    Raises:
        CheckpointError: a file is missing, is of isp, or contradicts the rule in the module's docstring; names it.
    """
    folder = find_model_files(path)
    if folder.isp:
        raise CheckpointError(
            "how the optimizer files of isp are sharded is not known",
            where=path,
            fix=FIX,
        )
    # 1. Split the flat tensors of every rank of the tp x pp grid into local tensors.
    local, steps, scaler = _read_local(folder)
    if len(steps) != 1:
        raise CheckpointError(
            f"the optimizer files are of steps {sorted(steps)}",
            where=path,
            fix=FIX,
        )

    # 2. Merge them over the grid like the weights. Our checkpoints have masters of half-precision weights only.
    half = {
        name for name, tensor in merge_folder(folder, heads, w2) if tensor.dtype in HALF
    }
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


def _read_local(
    folder: InternEvoFolder,
) -> tuple[_LocalStates, set[int], dict[str, Any]]:
    """Return local optimizer tensors by kind and (pp, tp), the step counts of all files, and the scaler's state."""
    local: _LocalStates = {kind: {} for kind in KINDS}
    steps: set[int] = set()
    scaler: dict[str, Any] = {}
    for pp in range(folder.pp_size):
        for tp, weights in enumerate(folder.stage_states(pp)):
            files = _zero_files(folder.path, tp, pp)
            contents = [_read_content(file) for file in files]
            by_kind, rank_steps = _unflatten(weights, contents, files)
            for kind, tensors in by_kind.items():
                local[kind][pp, tp] = tensors
            steps |= rank_steps
            # Every file has the state of the same scaler.
            first_content = contents[0]
            scaler = first_content.get("grad_scaler", {})
    return local, steps, scaler


def read_counters(path: str) -> dict[str, Any]:
    """Return {"train": ..., "sampler": ...} of context.pt, schedulder.pt (InternEvo's spelling) and sampler.pt.

    Raises:
        CheckpointError: one of them is missing, or they contradict one another; names it.
    """
    context = _read_dict(path, "context.pt")
    sampler = _read_dict(path, "sampler.pt")
    schedule = _read_dict(path, "schedulder.pt")
    # Theirs is the number of the last batch.
    step = _integer(context, "batch_count", path, "context.pt") + 1
    updates = int(context.get("step_count", step))
    if "last_epoch" in schedule and int(schedule["last_epoch"]) != updates:
        raise CheckpointError(
            f"the schedule is at {schedule['last_epoch']} updates, the counters at {updates}",
            where=os.path.join(path, "schedulder.pt"),
            fix=FIX,
        )
    train: dict[str, Any] = {
        "num_consumed_tokens": _integer(
            context, "num_consumed_tokens", path, "context.pt"
        ),
        "inf_nan_skip_batches": _integer(
            context, "inf_nan_skip_batches", path, "context.pt"
        ),
        "step": step,
        "step_count": updates,
        "consecutive_skips": 0,
        "run_folder": "",
    }
    data_ranks = _integer(sampler, "data_world_size", path, "sampler.pt")
    position = {
        "step": step,
        "seed": _integer(sampler, "seed", path, "sampler.pt"),
        "global_batch": _integer(sampler, "batch_size", path, "sampler.pt")
        * data_ranks,
        "offset": _integer(sampler, "num_consumed_samples_in_epoch", path, "sampler.pt")
        * data_ranks,
    }
    return {"train": train, "sampler": {"internevo": position}, "data": None}


def _read_dict(path: str, name: str) -> dict[str, Any]:
    file = os.path.join(path, name)
    content = read_pickle(file)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"holds a {type(content).__name__}", where=file, expected="a dict", fix=FIX
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
        )
    return value


def _zero_files(path: str, tp: int, pp: int) -> list[str]:
    """Return the optimizer files of all ZeRO ranks at one position of the tensor x pipeline grid."""
    pattern = re.compile(rf"^optimizer_tp{tp}_pp{pp}_zo(\d+)\.pt$")
    names: dict[int, str] = {}
    for name in os.listdir(path):
        match = pattern.match(name)
        if match:
            names[int(match[1])] = name
    if not names or sorted(names) != list(range(len(names))):
        have = ", ".join(sorted(names.values())) or "none"
        raise CheckpointError(
            f"optimizer_tp{tp}_pp{pp}_zo*.pt is incomplete; the folder has: {have}",
            where=path,
            expected="zo0, zo1, ...",
            fix=FIX,
        )
    return [os.path.join(path, names[zero]) for zero in sorted(names)]


def _read_content(file: str) -> dict[str, Any]:
    content = read_pickle(file)
    for key in ("base_optim_states", "flat_fp32_weights"):
        if not isinstance(content, dict) or not isinstance(content.get(key), dict):
            raise CheckpointError(
                f"has no {key}",
                where=file,
                expected="InternEvo's optimizer state",
                fix=FIX,
            )
    checked: dict[str, Any] = content
    return checked


def _unflatten(
    weights: StateDict, contents: list[dict[str, Any]], files: list[str]
) -> tuple[dict[str, StateDict], set[int]]:
    """Split the flat tensors of all ZeRO ranks at one grid position.

    Returns:
        Local tensors by kind and name, in the order of ``weights``; and the step counts of the moments.
    """
    groups = _parameter_groups(weights)
    stored: set[int] = set()
    for content in contents:
        stored.update(map(int, content["flat_fp32_weights"]))
    numbers = sorted(stored)
    if len(numbers) != len(groups):
        raise CheckpointError(
            f"holds parameter groups {numbers}, but the weights form {len(groups)}",
            where=files[0],
            fix=FIX,
        )
    tensors: dict[str, StateDict] = {kind: {} for kind in KINDS}
    steps: set[int] = set()
    for number, names in zip(numbers, groups, strict=True):
        assigned = _assign_to_ranks(weights, names, len(files))
        for content, file, owned in zip(contents, files, assigned, strict=True):
            if not owned:  # a group with fewer parameters than there are ranks
                continue
            flats, step = _flat_tensors(content, number, file)
            steps.add(step)
            own_weights = {name: weights[name] for name in owned}
            for kind, flat in flats.items():
                tensors[kind] |= _split_flat(
                    flat, own_weights, f"{kind} of group {number}", file
                )
            _prove_masters(tensors["master"], own_weights, file)
    in_order: dict[str, StateDict] = {}
    for kind, found in tensors.items():
        in_order[kind] = {name: found[name] for name in weights}
    return in_order, steps


def _parameter_groups(weights: StateDict) -> list[list[str]]:
    """Return the parameter names of each group: half precision first, then what stays in float32 (norms)."""
    half = [name for name, tensor in weights.items() if tensor.dtype in HALF]
    wide = [name for name, tensor in weights.items() if tensor.dtype not in HALF]
    return [names for names in (half, wide) if names]


def _assign_to_ranks(
    weights: StateDict,
    names: list[str],
    ranks: int,
) -> list[list[str]]:
    """Return the parameters of each ZeRO rank, in the order in which it joins them: InternEvo's greedy rule.

    The largest parameter first, each one to the rank with the fewest elements so far:
    sizes 8, 5, 4 and 3 on two ranks give 8 + 3 and 5 + 4.
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
    """Return the flat master and moments of a parameter group by kind, and the step of the moments."""
    base = content["base_optim_states"]
    try:
        (number,) = base["param_groups"][group]["params"]
        moments = base["state"][number]
        flats = {"master": content["flat_fp32_weights"][group]}
        flats |= {kind: moments[kind] for kind in MOMENTS}
        return flats, int(moments["step"])
    except (KeyError, IndexError, TypeError, ValueError):
        raise CheckpointError(
            f"lacks AdamW's state of parameter group {group}", where=file, fix=FIX
        ) from None


def _split_flat(
    flat: object,
    weights: StateDict,
    described: str,
    file: str,
) -> StateDict:
    """Split one flat tensor into tensors of the names and shapes of ``weights``, which it joins in this order."""
    sizes = [weight.numel() for weight in weights.values()]
    elements = flat.numel() if isinstance(flat, Tensor) else 0
    if not isinstance(flat, Tensor) or elements != sum(sizes):
        raise CheckpointError(
            f"{described} has {elements} elements, its parameters have {sum(sizes)}",
            where=file,
            fix=FIX,
        )
    parts = torch.split(flat.flatten(), sizes)
    tensors: StateDict = {}
    for (name, weight), part in zip(weights.items(), parts, strict=True):
        tensors[name] = part.view(weight.shape)
    return tensors


def _prove_masters(masters: StateDict, weights: StateDict, file: str) -> None:
    """Check that the rounded masters are the weights, which proves the order in which parameters were joined.

    Raises:
        CheckpointError: one is not.
    """
    for name, weight in weights.items():
        if not torch.equal(masters[name].to(weight.dtype), weight):
            raise CheckpointError(
                f"the master of {name} is not its weight: the parameters were not joined in the known order",
                where=file,
                fix=FIX,
            )


def _merge_kind(
    folder: InternEvoFolder,
    states: dict[tuple[int, int], StateDict],
    heads: HeadCounts,
    w2: W2Role,
) -> Iterator[tuple[str, Tensor]]:
    """Merge the local tensors of one kind, by (pp, tp), like the weights."""

    def stage_states(pp: int) -> list[StateDict]:
        return [states[pp, tp] for tp in range(folder.tp_size)]

    yield from merge_folder(folder, heads, w2, stage_states)
