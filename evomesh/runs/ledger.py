"""Look up the documents of a run: its config, its ranks, and the steps that it was not trained on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomesh.config.json_codec import decode_json
from evomesh.config.record import config_from_dict
from evomesh.config.schema import Config
from evomesh.errors import UserError
from evomesh.monitor.history import HISTORY_FILE
from evomesh.monitor.spikes import left_out_steps, read_spikes
from evomesh.runs.read import StartRecord, find_runs, number_of, read_run


@dataclass(frozen=True)
class RunPart:
    """The steps of a run that were read with one config, by one number of processes.

    Attributes:
        gpus: number of processes.
        steps: the first of them and those that follow, up to the next part.
    """

    config: Config
    gpus: int
    steps: range


@dataclass(frozen=True)
class RunData:
    """The data of a run, as each of its starts read it.

    Attributes:
        parts: in the order of their steps; together they have all steps of the last start's config.
        spikes: steps whose packs it was not trained on, because of a spike.
    """

    parts: tuple[RunPart, ...]
    spikes: frozenset[int]


def open_run_data(path: str) -> RunData:
    """Return the data of a run, and change to the folder that it was started in, in which its paths begin.

    Raises:
        UserError: not a run folder, or one that does not have the config.
    """
    folder = find_runs([path])[0].resolve()
    run = read_run(folder)
    parts = run_parts(run.starts)
    if not parts:
        raise UserError(
            "how the run was started is not recorded",
            where=str(folder / HISTORY_FILE),
            expected="a run of this version, or its config file",
            code="EVO-RUN-003",
        )
    spikes = untrained_steps(read_spikes(folder))
    # The last line of a start may be damaged; a part is of one that is not.
    recorded = [start for start in run.starts if start.facts.get("config")]
    folder_of_start = str(recorded[-1].facts.get("folder", ""))
    started_in = Path(folder_of_start)
    if started_in.is_dir():
        os.chdir(started_in)
    return RunData(parts, frozenset(spikes))


def run_parts(starts: Iterable[StartRecord]) -> tuple[RunPart, ...]:
    """Return the parts of a run: a step counts for the start that did it last.

    The steps that a run has not done yet count for its last start.
    """
    parts: list[RunPart] = []
    end: int | None = None
    for start in reversed(list(starts)):
        facts = start.facts
        if not facts.get("config"):
            continue
        config = config_from_dict(decode_json(facts["config"]))
        if end is None:
            end = config.data.total_steps
        first = start.first_step
        if first >= end:
            continue  # later starts did all of its steps again
        gpus = int(number_of(facts.get("world_size")) or 1)
        later = parts[0] if parts else None
        if later is not None and later.config == config and later.gpus == gpus:
            # A resume changes nothing: its steps are read like those before it.
            parts[0] = replace(later, steps=range(first, later.steps.stop))
        else:
            parts.insert(0, RunPart(config, gpus, range(first, end)))
        end = first
    if parts and end:
        # What was before the first start that is recorded.
        first_part = parts[0]
        whole = range(first_part.steps.stop)
        parts[0] = replace(first_part, steps=whole)
    return tuple(parts)


def untrained_steps(rows: Iterable[Mapping[str, Any]]) -> set[int]:
    """Return the steps that made no update: those left out, and spikes whose last try made none."""
    rows = list(rows)
    without_update: set[int] = set()
    for row in rows:
        step = row.get("step")
        if row["event"] != "spike" or type(step) is not int:
            continue
        # The last try of a step decides.
        without_update.discard(step)
        if row.get("applied") is False:
            without_update.add(step)
    return left_out_steps(rows) | without_update
