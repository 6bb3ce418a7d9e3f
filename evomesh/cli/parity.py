"""``evomesh parity``: does a config train in other layouts as in one process?"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from evomesh.cli.doctor import JsonOption, log_to_stderr, show_line, show_nothing
from evomesh.cli.options import LauncherOption, OverrideOption, RendezvousPortOption
from evomesh.errors import UserError


def parity(
    config: Annotated[str, typer.Argument(help="A Python config file.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="LAYOUT", show_default=False, hidden=True),
    ] = None,
    layouts: Annotated[
        list[str] | None,
        typer.Option(
            "--layouts",
            metavar="LAYOUT [LAYOUT ...]",
            help="Such as tensor=2,mode=msp or pipeline=2,chunks=2; config: that of the file. "
            "Keys: tensor, mode, pipeline, schedule, chunks, weight, zero1, fsdp.",
        ),
    ] = None,
    overrides: OverrideOption = None,
    launcher: LauncherOption = "auto",
    port: RendezvousPortOption = 8888,
    as_json: JsonOption = False,
) -> None:
    """Train two steps of CONFIG in small in each layout and in one process, and compare every tensor.

    The first that differs is named by module and direction. Started alone, it starts as
    many ranks on this machine as the layouts need. Exit codes: 0 all are equal; 1 one
    differs; 2 the config or a layout cannot be used.
    """
    from evomesh.diagnose.layouts import (
        AS_WRITTEN,
        compare_layouts,
        ranks_for,
        read_layouts,
    )
    from evomesh.train.job import reporting_early_errors
    from evomesh.train.launchers import planned_world_size, spawn_ranks

    log_to_stderr()
    names = [*(layouts or []), *(more or [])]
    with reporting_early_errors(launcher, port):
        if more and not layouts:
            raise UserError(
                f"{more[0]!r} after the config",
                fix=f"--layouts {' '.join(more)}",
                code="EVO-CLI-004",
            )
        wanted = read_layouts(config, names or [AS_WRITTEN], overrides or [])
        if planned_world_size(os.environ, launcher) == 1:
            os.environ["NPROC_PER_NODE"] = str(ranks_for(wanted))
        spawn_ranks(launcher, announces=False)
        show = show_nothing if as_json else show_line
        outcome = compare_layouts(wanted, launcher=launcher, port=port, show=show)
    report = outcome.report
    if outcome.rank == 0 and as_json:
        typer.echo(report.as_json(ranks=outcome.world_size))
    if report.exit_code:
        sys.exit(report.exit_code)
