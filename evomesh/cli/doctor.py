"""``evomesh doctor``: check machines, network, folders and the layout before a run."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.cli.options import LauncherOption, OverrideOption, RendezvousPortOption

if TYPE_CHECKING:
    from evomesh.diagnose.results import CheckResult

JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object instead of lines."),
]


def doctor(
    config: Annotated[
        str | None,
        typer.Argument(help="A config file; without one only machines are checked."),
    ] = None,
    overrides: OverrideOption = None,
    launcher: LauncherOption = "auto",
    port: RendezvousPortOption = 8888,
    as_json: JsonOption = False,
) -> None:
    """Check everything that a run of CONFIG needs, on all ranks, in less than a minute.

    Start it as the run itself: alone, with NPROC_PER_NODE=4, under torchrun or under
    srun. It checks versions, devices, clocks, limits, ports, messages of each group,
    the save folder and the data, and trains two steps of CONFIG in small, which must
    equal those of one process.

    Exit codes: 0 all is well or only warned of; 1 a check failed; 2 the config or the
    start cannot be used; 75 a rank was lost.
    """
    from evomesh.diagnose.doctor import examine
    from evomesh.train.job import reporting_early_errors
    from evomesh.train.launchers import spawn_ranks

    started = time.monotonic()
    log_to_stderr()
    with reporting_early_errors(launcher, port):
        settings = None
        if config is not None:
            from evomesh.config.loader import load_config

            settings = load_config(config, overrides or []).config
        spawn_ranks(launcher, announces=False)
        show = show_nothing if as_json else show_line
        outcome = examine(settings, launcher=launcher, port=port, show=show)
    report = outcome.report
    seconds = round(time.monotonic() - started, 1)
    if outcome.rank == 0 and as_json:
        typer.echo(report.as_json(ranks=outcome.world_size, seconds=seconds))
    elif outcome.rank == 0:
        typer.echo(f"{report.summary()}, in {seconds:g} s")
    if report.exit_code:
        sys.exit(report.exit_code)


def log_to_stderr() -> None:
    """Keep warnings out of the report."""
    from rich.console import Console

    from evomesh.monitor.log import setup_logging

    setup_logging(shows=False, console=Console(file=sys.stderr))


def show_line(result: CheckResult) -> None:
    """Print one result at once."""
    typer.echo(result.line())
    sys.stdout.flush()


def show_nothing(_: CheckResult) -> None:
    """Print nothing, where everything is printed at the end."""
    return
