"""InternEvo's optimizer, counters and data position, brought into ours where what they mean can be proved.

A rank's optimizer file holds one flat float32 tensor a parameter group, with its two moments. Which parameters it joins
follows from InternEvo's rule: whole parameters, largest first, each to the rank with the fewest elements so far. The
masters prove it: rounded to the weights' dtype they must be the weights, bit for bit, else nothing is converted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from evomesh.checkpoint.internevo.model import W2, HeadCounts, InternEvoFolder, find_folder, merge_folder
from evomesh.checkpoint.internevo.pickles import read_pickle
from evomesh.checkpoint.native.format import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
HALF = (torch.float16, torch.bfloat16)
FIX = 'take the weights alone: --weights-only, or load_ckpt_info content=("model",)'
StateDict = dict[str, Tensor]


def read_optimizer(path: str, heads: HeadCounts, w2: W2 = "auto") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole optimizer tensors under our names, and {"optimizer": ..., "scaler": ...} as our checkpoints hold them.

    Raises:
        CheckpointError: a file is missing, of isp, or holds something else than the rule above says; it is named.
    """
    folder = find_folder(path)
    if folder.isp:
        raise CheckpointError(
            "optimizer files of isp are cut in ways that are not known", where=path, fix=FIX
        )
    local: dict[str, dict[tuple[int, int], StateDict]] = {kind: {} for kind in ("master", *MOMENTS)}
    steps, scaler = set(), {}
    for pp in range(folder.sizes[0]):
        for tp, weights in enumerate(folder.states(pp)):
            files = _files(path, tp, pp)
            contents = [_content(file) for file in files]
            found, step = _unflatten(weights, contents, files)
            for kind, tensors in found.items():
                local[kind][pp, tp] = tensors
            steps |= step
            scaler = contents[0].get("grad_scaler", {})
    if len(steps) != 1:
        raise CheckpointError(f"the optimizer's files stand at steps {sorted(steps)}", where=path, fix=FIX)
    tensors = {}
    for kind, parts in local.items():
        for name, tensor in _merged(folder, parts, heads, w2):
            tensors[f"optim.{kind}.{name}"] = tensor
    half = {name for name, tensor in merge_folder(folder, heads, w2) if tensor.dtype in HALF}
    tensors = {
        k: v
        for k, v in tensors.items()
        if not k.startswith("optim.master.") or k[len("optim.master.") :] in half
    }
    scale = {
        "scale": float(scaler.get("_scale", 1.0)),
        "good_steps": int(scaler.get("_growth_step", 0)),
        "overflows": int(scaler.get("_hysteresis_step", 0)),
    }
    return tensors, {"optimizer": {"steps": steps.pop()}, "scaler": scale}


def read_counters(path: str) -> dict[str, Any]:
    """{"train": ..., "sampler": ...} of context.pt, schedulder.pt (its name there) and sampler.pt.

    Raises:
        CheckpointError: one of them is missing, or they contradict one another; names it.
    """
    context, sampler, schedule = (
        _plain(path, name) for name in ("context.pt", "sampler.pt", "schedulder.pt")
    )
    step = _number(context, "batch_count", path, "context.pt") + 1  # theirs is the number of the last one
    done = int(context.get("step_count", step))
    if "last_epoch" in schedule and int(schedule["last_epoch"]) != done:
        raise CheckpointError(
            f"the schedule stands at {schedule['last_epoch']}, the counters at {done} updates",
            where=os.path.join(path, "schedulder.pt"),
            fix=FIX,
        )
    counted = ("num_consumed_tokens", "inf_nan_skip_batches")
    train: dict[str, Any] = {name: _number(context, name, path, "context.pt") for name in counted}
    world = _number(sampler, "data_world_size", path, "sampler.pt")
    place = {
        "step": step,
        "seed": _number(sampler, "seed", path, "sampler.pt"),
        "global_batch": _number(sampler, "batch_size", path, "sampler.pt") * world,
        "offset": _number(sampler, "num_consumed_samples_in_epoch", path, "sampler.pt") * world,
    }
    train |= {"step": step, "step_count": done, "consecutive_skips": 0, "run_folder": ""}
    return {"train": train, "sampler": {"internevo": place}, "data": None}


def _plain(path: str, name: str) -> dict[str, Any]:
    file = os.path.join(path, name)
    content = read_pickle(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__}", where=file, expected="a dict", fix=FIX)
    return content


def _number(record: dict[str, Any], name: str, path: str, file: str) -> int:
    value = record.get(name)
    if not isinstance(value, int):
        raise CheckpointError(
            f"{name} is {value!r}", where=os.path.join(path, file), expected="a number", fix=FIX
        )
    return value


def _files(path: str, tp: int, pp: int) -> list[str]:
    """The zero ranks' files of one place in the tensor x pipeline grid."""
    pattern = re.compile(rf"^optimizer_tp{tp}_pp{pp}_zo(\d+)\.pt$")
    found = {int(match[1]): match[0] for name in os.listdir(path) if (match := pattern.match(name))}
    if sorted(found) != list(range(len(found))) or not found:
        have = ", ".join(sorted(found.values())) or "none"
        raise CheckpointError(
            f"of optimizer_tp{tp}_pp{pp}_zo*.pt there are: {have}",
            where=path,
            expected="zo0, zo1, ...",
            fix=FIX,
        )
    return [os.path.join(path, found[zero]) for zero in sorted(found)]


def _content(file: str) -> dict[str, Any]:
    content = read_pickle(file)
    wanted = ("base_optim_states", "flat_fp32_weights")
    missing = [
        key for key in wanted if not isinstance(content, dict) or not isinstance(content.get(key), dict)
    ]
    if missing:
        raise CheckpointError(
            f"has no {missing[0]}", where=file, expected="InternEvo's optimizer state", fix=FIX
        )
    found: dict[str, Any] = content
    return found


def _unflatten(
    weights: StateDict, contents: list[dict[str, Any]], files: list[str]
) -> tuple[dict[str, StateDict], set[int]]:
    """Local tensors by kind and name, in the order of ``weights``, and the steps that the moments have taken."""
    found: dict[str, StateDict] = {kind: {} for kind in ("master", *MOMENTS)}
    steps = set()
    half = [name for name, tensor in weights.items() if tensor.dtype in HALF]
    groups = [names for names in (half, [name for name in weights if name not in set(half)]) if names]
    present = sorted({int(number) for content in contents for number in content["flat_fp32_weights"]})
    if len(present) != len(groups):
        raise CheckpointError(
            f"holds parameter groups {present}, the weights make {len(groups)}", where=files[0], fix=FIX
        )
    for group, names in zip(present, groups, strict=True):
        for content, file, own in zip(contents, files, _assign(weights, names, len(files)), strict=True):
            if not own:
                continue
            flats = _flats(content, group, file)
            steps.add(int(flats.pop("step")))
            sizes = [weights[name].numel() for name in own]
            for kind, flat in flats.items():
                if not isinstance(flat, Tensor) or flat.numel() != sum(sizes):
                    raise CheckpointError(
                        f"{kind} of group {group} has {getattr(flat, 'numel', lambda: 0)()} elements, "
                        f"its parameters have {sum(sizes)}",
                        where=file,
                        fix=FIX,
                    )
                for name, part in zip(own, torch.split(flat.flatten(), sizes), strict=True):
                    found[kind][name] = part.view(weights[name].shape)
            for name in own:
                if not torch.equal(found["master"][name].to(weights[name].dtype), weights[name]):
                    raise CheckpointError(
                        f"the master of {name} is not its weight: the parameters lie in another order than known",
                        where=file,
                        fix=FIX,
                    )
    return {kind: {name: tensors[name] for name in weights} for kind, tensors in found.items()}, steps


def _assign(weights: StateDict, names: list[str], ranks: int) -> list[list[str]]:
    """Parameters of each zero rank, in the order in which it joins them."""
    found: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for name in sorted(names, key=lambda name: -weights[name].numel()):
        rank = loads.index(min(loads))
        found[rank].append(name)
        loads[rank] += weights[name].numel()
    return found


def _flats(content: dict[str, Any], group: int, file: str) -> dict[str, Any]:
    """Master, moments and step of a parameter group."""
    base = content["base_optim_states"]
    try:
        (number,) = base["param_groups"][group]["params"]
        moments = base["state"][number]
        return {"master": content["flat_fp32_weights"][group], "step": moments["step"]} | {
            k: moments[k] for k in MOMENTS
        }
    except (KeyError, IndexError, TypeError, ValueError):
        raise CheckpointError(
            f"lacks AdamW's state of parameter group {group}", where=file, fix=FIX
        ) from None


def _merged(
    folder: InternEvoFolder, parts: dict[tuple[int, int], StateDict], heads: HeadCounts, w2: W2
) -> Iterator[tuple[str, Tensor]]:
    def states(pp: int) -> list[StateDict]:
        return [parts[pp, tp] for tp in range(folder.sizes[2])]

    yield from merge_folder(folder, heads, w2, states)
