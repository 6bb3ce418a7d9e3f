"""``evomesh report``: one page of one or several runs."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from evomesh.errors import UserError
from evomesh.quantities import counted


def report(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN [RUN ...] OUT.html",
            show_default=False,
            help="Run folders, or folders above them (the newest run below), and the file to write.",
        ),
    ],
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Compare with this output of evomesh plan --json; by default RUN/plan.json.",
        ),
    ] = None,
) -> None:
    """Write one HTML page of a run, or of several beside each other: charts, time, restarts, data, configuration.

    The page is a single file without anything from elsewhere. A run that is training,
    was killed or has parts missing has a page too.
    """
    from evomesh.config.user import expand_home
    from evomesh.runs.page import render_page, write_page
    from evomesh.runs.payload import payload_of
    from evomesh.runs.read import find_runs, read_plan, read_run

    if len(paths) < 2 or not paths[-1].endswith((".html", ".htm")):
        raise UserError(
            f"the last argument is {paths[-1]!r}",
            expected="run folders, then a file whose name ends with .html",
            fix="evomesh report RUN report.html",
            code="EVO-CLI-006",
        )
    *names, out = paths
    folders = find_runs(names)
    runs = [read_run(folder) for folder in folders]
    if plan is not None:
        predicted = read_plan(expand_home(plan))
        for run in runs:
            run.plan = predicted
    page = render_page(payload_of(runs, time.time()))
    target = expand_home(out)
    write_page(target, page)
    for run in runs:
        typer.echo(f"{run.folder}: {counted(len(run.rows), 'step')}")
    typer.echo(f"wrote {target} ({len(page) / 1e6:.1f} MB)")
