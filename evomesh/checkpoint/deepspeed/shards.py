"""Open the files of a DeepSpeed folder: those of all ranks, and of one ZeRO stage.

A folder holds, for D data-parallel ranks of a model that is not split otherwise:

- ZeRO 0: ``mp_rank_00_model_states.pt`` with all weights;
- ZeRO 1 and 2: the same file, whose weights are 16-bit copies, and D files
  ``zero_pp_rank_N_mp_rank_00_optim_states.pt`` with float32 master weights;
- ZeRO 3: D such files, and D files ``zero_pp_rank_N_mp_rank_00_model_states.pt``, whose
  weights are empty.

With bfloat16 the optimizer's files are named ``bf16_zero_pp_rank_N...``.

Source: deepspeed/utils/zero_to_fp32.py and runtime/engine.py of DeepSpeed 0.12 to 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.pickles import open_pickle

FILE = re.compile(
    r"^(?:bf16_)?(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<model>\d+)_(?P<kind>model|optim)_states\.pt$"
)
EXPERTS = re.compile(r"^(layer|expp)_.*_(model|optim)_states\.pt$")
INERT = ("deepspeed", "mmengine", "xtuner")  # packages whose objects are dropped
COPY = "copy the checkpoint again, with the files of all ranks"
SHOWN = 8  # ranks that a message names


@dataclass(frozen=True)
class ZeroFolder:
    """The opened files of a folder; the tensors in them are not read.

    Attributes:
        stage: of ZeRO; 0 also for a folder without the optimizer's files, which then holds 16-bit weights.
        models: the model's files by rank: one, or with ZeRO 3 as many as ``optimizers``.
        optimizers: the state of the optimizer by rank; none with stage 0.
    """

    path: Path
    stage: int
    models: tuple[Mapping[str, Any], ...]
    optimizers: tuple[Mapping[str, Any], ...]

    @property
    def first(self) -> Mapping[str, Any]:
        return self.models[0]


@dataclass
class _Listing:
    """The names of a folder's files: the model's one file, and the files by rank."""

    whole_model: str
    models: dict[int, str]
    optimizers: dict[int, str]


def open_zero_folder(path: Path) -> ZeroFolder:
    """Open the files of a checkpoint's folder.

    Raises:
        CheckpointError: a file is missing, torn or of another checkpoint; named with the numbers that differ.
    """
    files = _list_files(path)
    optimizers = _open_optimizers(path, files.optimizers)
    stage = _common_stage(path, files.optimizers, optimizers)
    name_of_rank = files.models
    if stage == 3:
        ranks = len(optimizers)
        _refuse_gaps(path, name_of_rank, ranks, "model_states.pt")
        names = [name_of_rank[rank] for rank in sorted(name_of_rank)]
    elif files.whole_model:
        names = [files.whole_model]
    else:
        raise _without_model(path, stage, bool(name_of_rank))
    models = tuple(_open(path / name) for name in names)
    return ZeroFolder(path, stage, models, optimizers)


def _list_files(path: Path) -> _Listing:
    """Sort the names of a folder.

    Raises:
        CheckpointError: two files are of one rank, or the files are of different stages or of a split model.
    """
    listing = _Listing("", {}, {})
    for name in sorted(entry.name for entry in path.iterdir()):
        match = _parse(name, path)
        if match is None:
            continue
        if match["rank"] is None:
            listing.whole_model = name
            continue
        files = listing.models if match["kind"] == "model" else listing.optimizers
        rank = int(match["rank"])
        if rank in files:
            raise _of_two_runs(path, f"two files of rank {rank}: {files[rank]}, {name}")
        files[rank] = name
    if listing.whole_model and listing.models:
        of_stage_3 = listing.models[min(listing.models)]
        raise _of_two_runs(
            path,
            f"mixes ZeRO stages: {listing.whole_model} is of stage 0, 1 or 2, {len(listing.models)} files such as "
            f"{of_stage_3} are of stage 3",
        )
    return listing


def _of_two_runs(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        found,
        where=str(path),
        expected="the files of one checkpoint",
        fix="remove those of the other run",
        code="EVO-CKPT-020",
    )


def _parse(name: str, path: Path) -> re.Match[str] | None:
    match = FILE.match(name)
    if EXPERTS.match(name) or (match and int(match["model"])):
        kind = "experts" if EXPERTS.match(name) else "tensor parallel"
        raise CheckpointError(
            f"{name} is of a model that DeepSpeed split otherwise ({kind})",
            where=str(path),
            expected="files of mp_rank_00 only, as XTuner writes them",
            code="EVO-CKPT-020",
        )
    return match


def _without_model(path: Path, stage: int, of_stage_3: bool) -> CheckpointError:
    expected = "mp_rank_00_model_states.pt"
    if not of_stage_3:
        return CheckpointError(
            f"no {expected}", where=str(path), fix=COPY, code="EVO-CKPT-020"
        )
    found = f"the optimizer's files are of stage {stage}" if stage else "none"
    return CheckpointError(
        f"the model's files are of ZeRO 3, which keeps its weights in *_optim_states.pt; of those: {found}",
        where=str(path),
        expected="zero_pp_rank_N_mp_rank_00_optim_states.pt of stage 3",
        fix=COPY,
        code="EVO-CKPT-020",
    )


def _open(file: Path) -> Mapping[str, Any]:
    content = open_pickle(str(file), INERT)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"holds a {type(content).__name__}",
            where=str(file),
            expected="a dict",
            code="EVO-CKPT-020",
        )
    return content


def _open_optimizers(
    path: Path, files: Mapping[int, str]
) -> tuple[Mapping[str, Any], ...]:
    """Return the optimizer's state of all ranks, after checking that as many were written as are there."""
    if not files:
        return ()
    states = {}
    for rank, name in sorted(files.items()):
        state = _open(path / name).get("optimizer_state_dict")
        if not isinstance(state, Mapping) or "zero_stage" not in state:
            raise CheckpointError(
                "holds no state of ZeRO",
                where=str(path / name),
                expected="optimizer_state_dict with zero_stage",
                code="EVO-CKPT-020",
            )
        states[rank] = state
    # Each file says of how many ranks it is one: a folder that two runs have written to
    # has files that contradict each other, or too few.
    counts = {rank: _world_size(state) for rank, state in states.items()}
    world_size = max(counts.values())
    odd = [rank for rank, count in counts.items() if count != world_size]
    if odd:
        rank = odd[0]
        found = f"{files[rank]} is of {counts[rank]} ranks, others are of {world_size}"
        raise _of_two_runs(path, found)
    _refuse_gaps(path, files, world_size, "optim_states.pt")
    return tuple(states[rank] for rank in range(world_size))


def _world_size(state: Mapping[str, Any]) -> int:
    """Return the number of ranks that wrote the checkpoint: with ZeRO 1 and 2 it is stated for each group."""
    count = state.get("partition_count")
    counts = count if isinstance(count, list) else [count]
    return max((n for n in counts if type(n) is int), default=0)


def _refuse_gaps(
    path: Path, files: Mapping[int, str], world_size: int, kind: str
) -> None:
    """Refuse a folder that has not one file for each of ``world_size`` ranks."""
    count = len(files)
    if count == world_size and max(files, default=-1) == world_size - 1:
        return
    # By the files' numbers alone: the stated size may be any.
    numbers = range(min(world_size, count + SHOWN))
    missing = [str(rank) for rank in numbers if rank not in files]
    named = f"; missing: rank {', '.join(missing[:SHOWN])}" if missing else ""
    raise CheckpointError(
        f"{count} files *_{kind}, but {world_size} ranks wrote the checkpoint{named}",
        where=str(path),
        expected=f"{world_size} files *_{kind}",
        fix=COPY,
        code="EVO-CKPT-020",
    )


def _common_stage(
    path: Path, files: Mapping[int, str], states: tuple[Mapping[str, Any], ...]
) -> int:
    """Return the stage of all files, 0 without any."""
    if not states:
        return 0
    stages = [state["zero_stage"] for state in states]
    if stages[0] not in (1, 2, 3) or len(set(stages)) > 1:
        described = ", ".join(
            f"{files[rank]} is of stage {stage}"
            for rank, stage in enumerate(stages[:SHOWN])
        )
        raise CheckpointError(
            f"ZeRO stages that do not fit together: {described}",
            where=str(path),
            expected="one stage: 1, 2 or 3",
            fix=COPY,
            code="EVO-CKPT-020",
        )
    return int(stages[0])
