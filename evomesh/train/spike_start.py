"""Begin a start of a run with the spikes before it: its decisions, and the checkpoints that it may not resume."""

from __future__ import annotations

from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.start_point import StartPoint
from evomesh.monitor.spikes import left_out_steps, read_spikes
from evomesh.parallel.exchange import default_exchange
from evomesh.train.report import RunReporter
from evomesh.train.spikes import SpikeRollback, SpikeWatch


def open_spike_watch(
    reporter: RunReporter,
    overflows: bool,
    start: StartPoint,
    stored: dict[str, Any],
    rollback: SpikeRollback | None,
) -> SpikeWatch:
    """Return what judges the steps, with the decisions of a run that continues."""
    is_same_run = start.keeps_counters and not start.is_branch
    continues = is_same_run or rollback is not None
    rows: list[dict[str, Any]] = []
    if continues:
        rows = rows_of_all_ranks(reporter.folder, reporter.main)
    watch = SpikeWatch(reporter.config.spike, overflows, rows)
    if start.keeps_counters:
        watch.load_state(stored.get("spikes"))
    watch.open_log(reporter.folder, is_main=reporter.main, continues=continues)
    if rollback is not None:
        watch.continue_after(rollback, reporter.state.step)
    return watch


def refuse_spoiled(checkpoint: Checkpoint, rollback: SpikeRollback | None) -> None:
    """Refuse a checkpoint that was trained on packs which the run has left out since, or is not of this run.

    Raises:
        CheckpointError: the one before it is used.
    """
    state = checkpoint.state
    left_out = left_out_steps(read_spikes(Path(state["train"]["run_folder"])))
    if rollback is not None:
        left_out |= rollback.left_out
        saved = rollback.saved
        if saved is not None and checkpoint.step not in saved:
            raise CheckpointError(
                "this run has not written it (ckpt.auto_resume=False)",
                where=checkpoint.folder,
                code="EVO-TRAIN-004",
            )
    passed_by = (state.get("spikes") or {}).get("left_out", ())
    trained_on = left_out - set(passed_by)
    spoiled = [step for step in trained_on if step < checkpoint.step]
    if spoiled:
        raise CheckpointError(
            f"it was trained on step {min(spoiled)}, which the run has left out since because of a spike",
            where=checkpoint.folder,
            fix="save more often, or lower spike.skip_before",
            code="EVO-TRAIN-004",
        )


def rows_of_all_ranks(folder: Path, is_main: bool) -> list[dict[str, Any]]:
    """Return the lines of a run's ``spikes.jsonl`` on all ranks; the main rank has the file."""
    own = []
    if is_main:
        own = read_spikes(folder)
    exchange = default_exchange()
    with closing(exchange):
        of_ranks = exchange.gather(own)
        # All others have none.
        rows = list(chain(*of_ranks or []))
        answer: list[dict[str, Any]] = exchange.broadcast(rows)
    return answer
