"""Decide what a run starts from, by InternEvo's rules of precedence, and load it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from evomesh.checkpoint import detect
from evomesh.checkpoint.foreign_runs import NO_MOMENTS, newest_of_other_systems
from evomesh.checkpoint.hub_cache import hub_model, refuse_unknown_id
from evomesh.checkpoint.loaders import (
    checkpoint_loaders,
    fill,
    fill_on_all_ranks,
    load_foreign_state,
)
from evomesh.checkpoint.model_change import config_differences, refuse_changed_model
from evomesh.checkpoint.native.agreement import run_on_all_ranks
from evomesh.checkpoint.native.ema_weights import EMA
from evomesh.checkpoint.native.find import Checkpoint, SaveFolder
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.plan import LocalTensor, describe
from evomesh.checkpoint.optimizer_state import refuse_other_optimizer
from evomesh.checkpoint.schedule_change import check_schedule
from evomesh.checkpoint.start_point import (
    CONTENTS,
    COUNTED,
    EVERYTHING,
    StartPoint,
)
from evomesh.config.schema import CheckpointConfig, Config, LoadConfig
from evomesh.config.start_anew import start_anew
from evomesh.errors import UserError
from evomesh.parallel.spec import LocalShard
from evomesh.quantities import counted

logger = logging.getLogger(__name__)
OPTIMIZER = "optim."  # prefix of the optimizer's tensors
MASTER = "optim.master."
# Evomesh's, InternEvo's or XTuner's, detected from the folder.
DETECTED_TYPES = ("internevo", "internlm", "normal", "evomesh")
WEIGHT_TYPES = ("hf", "hf_llama", "hf_model", "llama")  # weights of other programs
# By kind of folder.
RIGHT_TYPES = {
    "evomesh": "internevo",
    "internevo": "internevo",
    "hf": "hf",
    "llama": "llama",
    "xtuner": "xtuner",
}


def decide(
    config: CheckpointConfig,
    reader: CheckpointReader,
    folder: SaveFolder | None,
    check: Callable[[Checkpoint], None] | None = None,
    branch: str | None = None,
) -> StartPoint:
    """Choose what to start from by InternEvo's rules.

    With ``auto_resume`` (the default): the newest checkpoint in the save folder that
    verifies, even if saving is off; if there is none, the newest of InternEvo's there,
    else from scratch; ``load_ckpt_info`` is ignored unless it is a fallback, which is
    used instead of starting from scratch. Without ``auto_resume``: ``load_ckpt_info``,
    which must exist, or nothing.

    Args:
        folder: save folder, None if the config names none.
        check: as in ``CheckpointReader.newest``; for resuming only.
        branch: the checkpoint of another run that is continued where there is nothing to resume.

    Raises:
        CheckpointError: nothing usable where the config names something, or a weights-only checkpoint to resume from.
    """
    info = config.load_ckpt_info
    if not config.auto_resume:
        if info is None:
            return StartPoint(
                "starting from scratch: auto_resume=False and no load_ckpt_info"
            )
        return from_load_info(info, reader)
    note = ""
    if info is not None and not info.fallback:
        note = (
            f" since auto_resume=True; load_ckpt_info ({info.path}) IGNORED: "
            "add fallback=True to it to start from it where there is nothing to resume"
        )
    resumed = _newest_in(folder, reader, note, check) if folder is not None else None
    if resumed is not None:
        return resumed
    if branch is not None:
        return branch_from(branch, reader)
    if info is not None and info.fallback:
        return from_load_info(info, reader)
    if folder is None:
        return StartPoint(
            f"starting from scratch: no save_ckpt_folder to resume from{note}"
        )
    return StartPoint(f"starting from scratch: no checkpoint in {folder.root}{note}")


def branch_from(path: str, reader: CheckpointReader) -> StartPoint:
    """Return all of another run's checkpoint, to be continued in a new folder.

    Raises:
        CheckpointError: there is no checkpoint with optimizer state.
    """
    info = LoadConfig(path=path, content=("all",))
    start = from_load_info(info, reader)
    source = start.path if start.checkpoint is None else start.checkpoint.folder
    reason = f"branching from {source}"
    return replace(start, reason=reason, is_branch=True)


def _newest_in(
    folder: SaveFolder,
    reader: CheckpointReader,
    note: str,
    check: Callable[[Checkpoint], None] | None,
) -> StartPoint | None:
    """Return the newest checkpoint of a save folder to resume from, evomesh's or InternEvo's; None without any."""
    checkpoint = reader.newest(folder, check=check)
    if checkpoint is None:
        return run_on_all_ranks(
            reader.exchange, lambda: newest_of_other_systems(folder, note)
        )
    require_optimizer(checkpoint, EVERYTHING)
    reason = (
        f"resuming step {checkpoint.step} from {checkpoint.folder} (auto_resume){note}"
    )
    return StartPoint(reason, checkpoint, content=EVERYTHING)


def check_config(start: StartPoint, config: Config, reader: CheckpointReader) -> None:
    """Compare the config that a checkpoint was written with to the present one.

    Model settings that make the same weights another function are refused, whether the
    run resumes or starts from the weights, unless ``ckpt.allow_changed_model`` is set.
    What changes the further training of a run that resumes is logged.

    Raises:
        CheckpointError: naming each such key with both values; or the optimizer state is of another update rule.
    """
    refuse_other_optimizer(start, config.optimizer)
    _refuse_foreign_scale(start, config)
    if not start.wants("model"):
        return
    logs = reader.exchange.rank == 0
    if start.checkpoint is not None:
        _refuse_other_dtype(start, config)
        check_schedule(start, config, log=logs)
    differences = config_differences(start, config, reader.exchange)
    allowed = config.ckpt.allow_changed_model
    refuse_changed_model(start, differences.function, allowed, logs)
    if start.checkpoint is None or not (start.resumes and logs):
        return
    for line in (
        *map(str, differences.training),
        *_changed_batch(start.checkpoint, config, reader),
    ):
        logger.warning("the training changes: %s", line)


def _refuse_foreign_scale(start: StartPoint, config: Config) -> None:
    """Refuse weights of other systems under muP, whose factors they do not have.

    Raises:
        CheckpointError: with what to leave out.
    """
    if start.path and start.wants("model") and config.model.mup.is_on:
        raise CheckpointError(
            "these weights are of a model without muP: with model.mup they compute something else",
            where=start.path,
            expected="a checkpoint of a run with model.mup",
            fix="remove model.mup, or train from scratch",
            code="EVO-CKPT-010",
        )


def _refuse_other_dtype(start: StartPoint, config: Config) -> None:
    """Refuse to continue a run in another dtype: weights, masters and moments would not be those of either.

    Raises:
        CheckpointError: with both dtypes.
    """
    checkpoint = start.checkpoint
    if checkpoint is None or not start.resumes:
        return
    stored = checkpoint.config.get("model", {}).get("dtype")
    present = config.model.dtype
    names = (stored, present)
    stored_as = ["float32" if name == "tf32" else name for name in names]
    if stored is None or stored_as[0] == stored_as[1]:
        return
    raise CheckpointError(
        f"model.dtype is {stored!r} in the checkpoint and {present!r} in the config",
        where=checkpoint.folder,
        expected="the dtype that the run began in",
        fix=f"set model.dtype to {stored!r}, or start anew from the weights: {start_anew(checkpoint.folder)}",
        code="EVO-CKPT-010",
    )


def _changed_batch(
    checkpoint: Checkpoint, config: Config, reader: CheckpointReader
) -> list[str]:
    """Return a line if a step has another number of packs because the number of data-parallel ranks changed."""
    before = checkpoint.record.layout.get("dp", 0)
    now = reader.grid.dp.size
    if before in (0, now):
        return []
    packs_now = now * config.data.micro_num
    words = (
        f"{counted(before, 'data-parallel rank')} in the checkpoint, {now} now: "
        f"{counted(packs_now, 'pack', '')} per step"
    )
    stored_micro_num = checkpoint.config.get("data", {}).get("micro_num")
    if stored_micro_num is None:
        return [words]
    packs_before = before * stored_micro_num
    if packs_now == packs_before:
        return []
    fitting, rest = divmod(packs_before, now)
    advice = f"data.micro_num={fitting} keeps them"
    if rest:
        advice = (
            f"no data.micro_num keeps them, as {now} does not divide {packs_before}"
        )
    return [f"{words}, before {packs_before}; {advice}"]


def parse_content(content: tuple[str, ...] | list[str] | str) -> frozenset[str]:
    """Return ``("model", "sampler")`` or ``("all",)`` as a set of ``CONTENTS``.

    Raises:
        CheckpointError: an unknown word, or none.
    """
    words = [content] if isinstance(content, str) else list(content)
    parts = {word.lower() for word in words}
    unknown = sorted(parts - {*CONTENTS, "all"})
    if unknown or not parts:
        raise CheckpointError(
            f"load_ckpt_info.content has {unknown[0]!r}"
            if unknown
            else "load_ckpt_info.content is empty",
            expected=f"any of {', '.join(CONTENTS)}, or all",
            code="EVO-CKPT-009",
        )
    return EVERYTHING if "all" in parts else frozenset(parts)


def from_load_info(info: LoadConfig, reader: CheckpointReader) -> StartPoint:
    """Return what ``load_ckpt_info`` names, after checking that its ``ckpt_type`` suits the folder."""
    kind = info.ckpt_type.lower()
    actual = detect.kind_at(info.path)
    if kind in DETECTED_TYPES:
        hub = hub_model(info.path) if actual is None else ""
        if hub:
            return from_load_info(
                info.model_copy(update={"path": hub, "ckpt_type": "hf"}), reader
            )
        if actual in (None, "evomesh"):
            return _from_native(info, reader, exists=actual is not None)
        if actual not in ("internevo", "xtuner"):
            raise _wrong_type(info, actual)
        kind = actual
    elif kind in WEIGHT_TYPES and actual in ("evomesh", "internevo"):
        raise _wrong_type(info, actual)
    return _from_foreign(info, kind)


def _from_native(
    info: LoadConfig, reader: CheckpointReader, exists: bool
) -> StartPoint:
    if not exists:
        _refuse_absent(info, reader)
    content = parse_content(info.content)
    checkpoint = reader.resolve(info.path)
    require_optimizer(checkpoint, content)
    reason = f"loading {_named(content)} from {checkpoint.folder} (load_ckpt_info)"
    return StartPoint(reason, checkpoint, content=content)


def _from_foreign(info: LoadConfig, kind: str) -> StartPoint:
    content = parse_content(info.content)
    if checkpoint_loaders.get(kind) is None:
        raise CheckpointError(
            f"no loader for ckpt_type={info.ckpt_type!r}",
            expected=f"one of {', '.join(sorted({*DETECTED_TYPES, *checkpoint_loaders.names()}))}",
            fix="register a custom one: evomesh.register_loader",
            code="EVO-CKPT-009",
        )
    note = ""
    if kind == "xtuner" and content == EVERYTHING:
        content = COUNTED
        note = f"; {NO_MOMENTS}"
    readable = {"internevo": EVERYTHING, "xtuner": COUNTED}.get(kind, {"model"})
    if not content <= readable:
        raise CheckpointError(
            f"only the {_named(readable)} can be read from {info.path} ({kind}), but content asks for "
            f"{_named(content)}",
            fix='content=("model",)',
            code="EVO-CKPT-009",
        )
    reason = (
        f"loading {_named(content)} from {info.path} ({kind}, load_ckpt_info){note}"
    )
    return StartPoint(reason, path=info.path, ckpt_type=kind, content=content)


def _named(content: Collection[str]) -> str:
    return ", ".join(part for part in CONTENTS if part in content)


def _wrong_type(info: LoadConfig, actual: str) -> CheckpointError:
    right = RIGHT_TYPES.get(actual)
    if right is None:
        readable = [detect.KINDS[kind] for kind in RIGHT_TYPES]
        return CheckpointError(
            f"{info.path} is {detect.KINDS[actual]}, which is not read",
            expected=" or ".join(readable),
            fix="save it with its own program as a Hugging Face model folder",
            code="EVO-CKPT-009",
        )
    return CheckpointError(
        f"{info.path} is {detect.KINDS[actual]}, but ckpt_type={info.ckpt_type!r} was given",
        fix=f"set load_ckpt_info ckpt_type={right!r}",
        code="EVO-CKPT-009",
    )


def _refuse_absent(info: LoadConfig, reader: CheckpointReader) -> None:
    """Raise the error of a path without a checkpoint, which may have been meant as the id of a hub model.

    Raises:
        CheckpointError: always, unless a checkpoint has appeared in the meantime.
    """
    refuse_unknown_id(info.path)
    reader.resolve(info.path)


def require_optimizer(checkpoint: Checkpoint, content: frozenset[str]) -> None:
    """Refuse a weights-only checkpoint if optimizer state is wanted.

    Raises:
        CheckpointError: with the way to start anew from its weights.
    """
    if "optimizer" not in content:
        return
    if not any(name.startswith(OPTIMIZER) for name in checkpoint.index().names()):
        raise CheckpointError(
            f"step {checkpoint.step} has weights only (saved with save_optimizer=False): "
            "it cannot resume a run",
            where=checkpoint.folder,
            expected="a checkpoint with optimizer state",
            fix=f"start anew from its weights: {start_anew(checkpoint.folder)}",
            code="EVO-CKPT-008",
        )


def restart_line(folder: SaveFolder) -> str:
    """Return what a restart will resume from; for the end of a crashed run, so it asks no other rank."""
    try:
        checkpoint = CheckpointReader(report=lambda line: None).newest(
            folder, verify="record"
        )
    except (UserError, OSError) as error:
        return f"a restart finds no checkpoint to resume from: {error}"
    if checkpoint is None:
        return "a restart begins from scratch: nothing is committed yet"
    return f"a restart resumes from step {checkpoint.step}: {checkpoint.folder}"


def restore(
    start: StartPoint,
    reader: CheckpointReader,
    tensors: Mapping[str, Tensor | LocalShard],
    model: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Load the tensors that ``start`` wants, in place, and return the stored state ({} without a source).

    The caller applies the parts of the state that ``start.wants``. Master weights come
    from the checkpoint only with both model and optimizer; otherwise the caller makes
    them again from the weights.

    Args:
        tensors: all live tensors by global name, parameters and optimizer state.
        model: the run's model section, for loaders of foreign folders.
    """
    checkpoint = start.checkpoint
    if checkpoint is None:
        if not start.path:
            return {}
        section = dict(model or {})
        return _load_foreign(start, reader, tensors, section)
    chosen = {}
    for name, tensor in tensors.items():
        if _is_chosen(name, start.content):
            chosen[name] = tensor
    if not chosen:
        return checkpoint.state
    # A stored tensor that the run lacks is an error in a part that is loaded whole. The
    # optimizer's state alone leaves the weights and the masters unread.
    is_complete = len(chosen) == len(tensors)
    loads_all_weights = is_complete or start.wants("model")
    # Weights alone may be of another dtype. With the optimizer's state they may not: a
    # run in float32 has no master weights that one in bfloat16 could continue.
    weights_only = start.content == {"model"}
    return reader.load(
        checkpoint,
        chosen,
        strict=loads_all_weights,
        cast=weights_only,
        unread=_may_stay_unread(start, tensors),
    )


def _may_stay_unread(start: StartPoint, names: Iterable[str]) -> tuple[str, ...]:
    """Return the prefixes of stored tensors that a run may leave out."""
    if not start.wants("optimizer"):
        return (OPTIMIZER,)
    # A run may end the average of its weights.
    keeps_average = any(name.startswith(EMA) for name in names)
    return () if keeps_average else (EMA,)


def _load_foreign(
    start: StartPoint,
    reader: CheckpointReader,
    tensors: Mapping[str, Tensor | LocalShard],
    model: dict[str, Any],
) -> dict[str, Any]:
    loader = checkpoint_loaders.get(start.ckpt_type)
    assert loader is not None
    chosen = {
        name: tensor
        for name, tensor in tensors.items()
        if _is_chosen(name, start.content)
    }
    local = describe(chosen, reader.grid)

    # A tensor that this rank does not want may be one of another rank's: only those
    # that nobody wants are unexpected.
    names_by_rank = reader.exchange.gather(list(local))
    names = reader.exchange.broadcast(names_by_rank)
    wanted_anywhere: set[str] = set().union(*names)

    parameters: dict[str, LocalTensor] = {}
    states: dict[str, LocalTensor] = {}
    for name, tensor in local.items():
        is_state = name.startswith(OPTIMIZER)
        group = states if is_state else parameters
        group[name] = tensor
    if start.wants("model"):
        read = partial(loader, start.path, model)
        fill_on_all_ranks(
            parameters, read, start.path, wanted_anywhere, reader.exchange
        )
    if start.content == {"model"}:
        return {}
    return _load_foreign_state(start, states, model, wanted_anywhere)


def _load_foreign_state(
    start: StartPoint,
    states: Mapping[str, LocalTensor],
    model: dict[str, Any],
    wanted_anywhere: set[str],
) -> dict[str, Any]:
    """Fill the optimizer's tensors if they are wanted, and return the stored counters and data position."""
    optimizer, state = load_foreign_state(
        start.ckpt_type,
        start.path,
        model,
        optimizer=start.wants("optimizer"),
        counters=start.wants("scheduler") or start.wants("sampler"),
    )
    if start.wants("optimizer"):
        # A run that does not take the model makes its masters from its own weights, so
        # those of the file are left out.
        stored = {
            name: tensor
            for name, tensor in optimizer.items()
            if _is_chosen(name, start.content)
        }
        fill(states, stored.items(), start.path, wanted_anywhere)
    return state


def _is_chosen(name: str, content: frozenset[str]) -> bool:
    if name.startswith(MASTER):
        return content >= {"model", "optimizer"}
    return ("optimizer" if name.startswith(OPTIMIZER) else "model") in content
