"""The weights of a checkpoint or model folder for a config's model, without anything else of the run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from evomesh.checkpoint import detect
from evomesh.checkpoint.foreign_runs import newest_of_other_systems
from evomesh.checkpoint.native.agreement import run_on_all_ranks
from evomesh.checkpoint.native.ema_weights import with_ema_weights
from evomesh.checkpoint.native.find import SaveFolder
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.resume import (
    DETECTED_TYPES,
    RIGHT_TYPES,
    check_config,
    from_load_info,
)
from evomesh.checkpoint.start_point import StartPoint
from evomesh.config.schema import CheckpointConfig, Config, LoadConfig
from evomesh.storage.base import join
from evomesh.storage.urls import open_storage

WEIGHTS = ("model",)


def choose_weights(
    config: Config,
    path: str | None,
    reader: CheckpointReader,
    *,
    ema: bool = False,
) -> StartPoint:
    """Return the weights at a path, of any system; without one, those that the config's own run has.

    These are the newest checkpoint of the save folder, or, while there is none, what ``load_ckpt_info`` names.

    Args:
        ema: take the moving average of the weights.

    Raises:
        CheckpointError: there are none, they are damaged, or the config's model is another function of them.
    """
    start = _at(path, reader) if path else _of_run(config.ckpt, reader)
    if ema:
        start = _averaged(start)
    check_config(start, config, reader)
    source = start.path
    if start.checkpoint is not None:
        source = f"step {start.checkpoint.step} of {start.checkpoint.folder}"
    words = "the averaged weights" if ema else "the weights"
    return replace(start, reason=f"{words} of {source}")


def _at(path: str, reader: CheckpointReader) -> StartPoint:
    path = _newest_of_internevo(path)
    kind = detect.kind_at(path) or ""
    ckpt_type = RIGHT_TYPES.get(kind, DETECTED_TYPES[0])
    info = LoadConfig(path=path, content=WEIGHTS, ckpt_type=ckpt_type)
    return from_load_info(info, reader)


def _newest_of_internevo(url: str) -> str:
    """Return the newest step of a save folder of InternEvo; any other path as it is."""
    storage, root = open_storage(url)
    steps = detect.internevo_steps(storage, root)
    return join(url, str(steps[0])) if steps else url


def _of_run(config: CheckpointConfig, reader: CheckpointReader) -> StartPoint:
    """Return what a run has saved last, or is to begin with."""
    places = []
    if config.save_ckpt_folder is not None:
        folder = SaveFolder.open(config.save_ckpt_folder, config.snapshot_ckpt_folder)
        newest = _newest_in(folder, reader)
        if newest is not None:
            return newest
        places.append(f"ckpt.save_ckpt_folder ({folder.root}) has none")
    info = config.load_ckpt_info
    if info is not None:
        return from_load_info(info.model_copy(update={"content": WEIGHTS}), reader)
    places.append("there is no ckpt.load_ckpt_info")
    raise CheckpointError(
        f"no checkpoint whose weights could be read: {', '.join(places)}",
        expected="a checkpoint of this model, or a Hugging Face model folder",
        fix="name one: --checkpoint PATH",
        code="EVO-CKPT-001",
    )


def _newest_in(folder: SaveFolder, reader: CheckpointReader) -> StartPoint | None:
    """Return the newest checkpoint of a save folder, of any system; None without any."""
    content = frozenset(WEIGHTS)
    checkpoint = reader.newest(folder)
    if checkpoint is not None:
        return StartPoint("", checkpoint, content=content)
    find = partial(_newest_of_other_systems, folder)
    start = run_on_all_ranks(reader.exchange, find)
    if start is None:
        return None
    return replace(start, content=content)


def _newest_of_other_systems(folder: SaveFolder) -> StartPoint | None:
    # One of InternEvo that lacks its counters could not be resumed; its weights are there.
    storage = folder.storage
    root = folder.root
    if storage.remote:
        return newest_of_other_systems(folder, "")
    steps = detect.internevo_steps(storage, root)
    if not steps:
        return newest_of_other_systems(folder, "")
    newest = join(root, str(steps[0]))
    path = f"local:{newest}"
    return StartPoint("", path=path, ckpt_type="internevo")


def _averaged(start: StartPoint) -> StartPoint:
    """Return the moving average in place of the weights.

    Raises:
        CheckpointError: there is none.
    """
    if start.checkpoint is None:
        raise CheckpointError(
            "has no average of the weights: it is not a checkpoint of evomesh",
            where=start.path,
            fix="leave out --ema",
            code="EVO-CKPT-016",
        )
    return replace(start, checkpoint=with_ema_weights(start.checkpoint))
