"""Look up the documents of a run: its config, its ranks, and the steps that it was not trained on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomesh.config.json_codec import decode_json
from evomesh.config.record import config_from_dict
from evomesh.config.schema import Config
from evomesh.errors import UserError
from evomesh.monitor.history import HISTORY_FILE
from evomesh.monitor.spikes import left_out_steps, read_spikes
from evomesh.runs.read import find_runs, read_run


@dataclass(frozen=True)
class RunData:
    """The data of a run, as its last start read it.

    Attributes:
        gpus: processes of that start.
        spikes: steps whose packs it was not trained on, because of a spike.
    """

    config: Config
    gpus: int
    spikes: frozenset[int]


def open_run_data(path: str) -> RunData:
    """Return the data of a run, and change to the folder that it was started in, in which its paths begin.

    Raises:
        UserError: not a run folder, or one that does not have the config.
    """
    folder = find_runs([path])[0].resolve()
    run = read_run(folder)
    facts = run.facts
    if not facts.get("config"):
        raise UserError(
            "how the run was started is not recorded",
            where=str(folder / HISTORY_FILE),
            expected="a run of this version, or its config file",
        )
    spikes = untrained_steps(read_spikes(folder))
    started_in = Path(str(facts.get("folder", "")))
    if started_in.is_dir():
        os.chdir(started_in)
    config = config_from_dict(decode_json(facts["config"]))
    return RunData(config, run.world_size, frozenset(spikes))


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
