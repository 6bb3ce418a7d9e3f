"""``evomesh replay``: steps of a run computed again."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.cli.doctor import log_to_stderr
from evomesh.cli.options import LauncherOption, RendezvousPortOption
from evomesh.quantities import counted

if TYPE_CHECKING:
    from evomesh.runs.replay import ReplayPlan, ReplayResult

BlameOption = Annotated[
    bool,
    typer.Option(
        "--blame",
        help="Also rank the micro-batches and layers of the step, and show its documents.",
    ),
]
SCRATCH = "EVOMESH_REPLAY_FOLDER"  # where all ranks of a replay write
LEAVE_S = 10.0  # for all ranks to have read it


def replay(
    run: Annotated[str, typer.Argument(help="A run folder, or one above it.")],
    step: Annotated[int, typer.Option(min=0, help="The last step to compute.")],
    layout: Annotated[
        str,
        typer.Option(
            help="Such as tensor=2,mode=msp, as in evomesh parity; config: that of the run."
        ),
    ] = "config",
    blame: BlameOption = False,
    launcher: LauncherOption = "auto",
    port: RendezvousPortOption = 8888,
) -> None:
    """Compute a step of RUN again, from the checkpoint before it, and compare with what was logged.

    In the layout of the run every figure must be equal to the bit; in another one the
    first step must be within the bound of the numerics contract. With --blame, the micro-batches of the step are
    ranked by loss and gradient norm, its layers by gradients and activations, and the documents of the most suspicious
    ones are shown. Without a launcher, the command starts the ranks itself. Exit
    codes: 0 equal; 1 a figure differs; 2 it cannot be replayed.
    """
    from evomesh.runs.read import find_runs, read_run
    from evomesh.runs.replay import (
        compare_replay,
        court_lines,
        plan_replay,
        ranks_of_replay,
    )
    from evomesh.train.launchers import detect, planned_world_size, spawn_ranks
    from evomesh.train.main import run_training

    log_to_stderr()
    # Lines of the steps, and what differs from the run's config, are not what was asked for.
    logging.disable(logging.WARNING)
    folder = find_runs([run])[0].resolve()
    logged = read_run(folder)
    if SCRATCH not in os.environ:
        ranks = ranks_of_replay(logged, step, layout)
        os.environ[SCRATCH] = tempfile.mkdtemp(prefix="evomesh-replay-")
        if planned_world_size(os.environ, launcher) == 1:
            os.environ["NPROC_PER_NODE"] = str(ranks)
        spawn_ranks(launcher, announces=False)
    scratch = Path(os.environ[SCRATCH])
    process = detect(os.environ, launcher, port)
    try:
        plan = plan_replay(logged, step, layout, scratch)
        run_training(
            plan.loaded(), launcher=launcher, port=port, until=step + 1, blames=blame
        )
        result = compare_replay(plan)
        found = court_lines(plan) if blame else []
    finally:
        _leave(scratch, process.rank, process.world_size)
    is_left_out = step not in logged.rows
    if is_left_out and not blame:
        found = ["--blame examines it"]
    if process.rank == 0:
        typer.echo("\n".join([*lines_of(plan, result), *found]))
    if result.differing:
        sys.exit(1)


def _leave(scratch: Path, rank: int, world_size: int) -> None:
    """Remove what the replay wrote, once no rank needs it."""
    with contextlib.suppress(OSError):
        (scratch / f"left-{rank}").touch()
    if rank:
        return
    deadline = time.monotonic() + LEAVE_S
    while len(list(scratch.glob("left-*"))) < world_size:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    shutil.rmtree(scratch, ignore_errors=True)


def lines_of(plan: ReplayPlan, result: ReplayResult) -> list[str]:
    """Return the outcome as lines of text."""
    start = plan.checkpoint or "the start of the run"
    lines = [
        f"steps {plan.first_step} to {plan.step} from {start}, on {counted(plan.ranks, 'rank')}"
    ]
    is_logged = plan.step in plan.run.rows
    if not is_logged:
        lines.append(
            f"step {plan.step} is not logged: the run left it out because of a spike"
        )
    if not result.steps:
        return lines
    asked = "to the bit"
    if plan.bound:
        asked = f"within {plan.bound:g} in step {plan.first_step}, the first"
    if not result.differing:
        verb = "equals" if len(result.steps) == 1 else "equal"
        lines.append(
            f"{counted(len(result.steps), 'step')} {verb} what was logged, {asked}; "
            f"largest distance in all: {result.largest:.2g}"
        )
        return lines
    first = result.differing[0]
    lines.append(f"not equal {asked}, first in step {first.step} (logged | again):")
    lines += [f"  {one.describe()}" for one in result.differing]
    return lines
