"""``evomesh plan``: what a run would hold and send, without running it."""

from __future__ import annotations

from typing import Annotated

import typer

from evomesh.errors import UserError

MIB = 2**20


def plan(
    config: Annotated[str, typer.Argument(help="A Python config file.")],
    gpus: Annotated[int, typer.Option(min=1, help="Number of processes in the run.")],
    rank: Annotated[int, typer.Option(min=0, help="The process to look at.")] = 0,
    trace: Annotated[bool, typer.Option("--trace", help="Trace one step of that process.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a config value; repeatable."),
    ] = None,
) -> None:
    """Trace one step of any rank on one machine: bytes held, and bytes sent by axis."""
    from rich.console import Console
    from rich.table import Table

    from evomesh.config.loader import load_config
    from evomesh.plan.trace import trace as trace_step

    if not trace:
        raise UserError("planning without --trace is not available yet", where="evomesh plan", fix="add --trace")
    if rank >= gpus:
        raise UserError(f"rank {rank} of {gpus} processes", where="--rank", expected=f"0 to {gpus - 1}")
    found = trace_step(load_config(config, overrides or []).config, gpus, rank)
    grid, console = found.grid, Console()
    axes = (grid.pp, grid.dp, grid.tp, grid.zero, grid.replica)
    console.print(f"rank {rank} of {gpus}: " + ", ".join(f"{axis.name} {axis.rank} of {axis.size}" for axis in axes))
    held = {"parameters": found.parameters, "gradients": found.gradients, "optimizer state": found.optimizer}
    console.print("holds: " + ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in held.items()))
    table = Table(title="one step of this rank")
    for column in ("operation", "axis"):
        table.add_column(column)
    for column in ("calls", "MiB"):
        table.add_column(column, justify="right")
    sizes = found.traffic.nbytes()
    for (operation, axis), calls in sorted(found.traffic.count().items()):
        table.add_row(operation, axis, str(calls), f"{sizes[operation, axis] / MIB:.3f}")
    console.print(table)
