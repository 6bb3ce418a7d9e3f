"""``evomesh plan``: what a run would hold and send, without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from evomesh.config.schema import Config
    from evomesh.parallel.traffic import TrafficLog
    from evomesh.plan.trace import RankMemory

MIB = 2**20


def plan(
    config: Annotated[str, typer.Argument(help="A Python config file.")],
    gpus: Annotated[int, typer.Option(min=1, help="Number of processes in the run.")],
    rank: Annotated[int, typer.Option(min=0, help="The process to look at.")] = 0,
    trace: Annotated[bool, typer.Option("--trace", help="Also trace one step: bytes sent, by axis.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a config value; repeatable."),
    ] = None,
) -> None:
    """Show what any rank of a run holds and, with --trace, what it sends; needs one machine, no GPU and no data."""
    from rich.console import Console

    from evomesh.config.layout import check_world
    from evomesh.config.loader import load_config
    from evomesh.plan.trace import hold
    from evomesh.plan.trace import trace as trace_step

    if rank >= gpus:
        raise UserError(f"rank {rank} of {gpus} processes", where="--rank", expected=f"0 to {gpus - 1}")
    settings = load_config(config, overrides or []).config
    warnings = check_world(settings, gpus)
    console = Console()
    found = trace_step(settings, gpus, rank) if trace else hold(settings, gpus, rank)
    for line in [*_sizes(settings, gpus, rank, found), *(f"warning: {warning}" for warning in warnings)]:
        console.print(line, highlight=False)
    if trace:
        console.print(_table(found.traffic))  # type: ignore[attr-defined]
    else:
        console.print("activations are not counted; --trace adds what one step sends", highlight=False)


def _sizes(config: Config, gpus: int, rank: int, held: RankMemory) -> list[str]:
    from evomesh.config.size import parameter_count, tokens_per_step

    grid, count = held.grid, parameter_count(config.model)
    model = f"{count:,} parameters" if count is not None else f"model type {config.model.model_type}"
    axes = (grid.pp, grid.dp, grid.tp, grid.wp, grid.zero, grid.replica)
    where = ", ".join(f"{axis.name} {axis.rank} of {axis.size}" for axis in axes)
    parts = {"parameters": held.parameters, "gradients": held.gradients, "optimizer state": held.optimizer}
    total = sum(parts.values())
    return [
        f"{model}; {tokens_per_step(config, grid.dp.size):,} tokens a step "
        f"({config.data.packed_length} x {config.data.micro_num} micro-batches x {grid.dp.size} data-parallel ranks)",
        f"rank {rank} of {gpus}: {where}",
        f"holds: layers {_ranges(held.layers)} of {config.model.num_layers}; "
        + ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in parts.items())
        + f"; together {total / MIB:.1f} MiB",
    ]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 6, 7] -> "0 to 2 and 6 to 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return " and ".join(" to ".join(str(number) for number in run) for run in runs) or "none"


def _table(traffic: TrafficLog) -> Table:
    from rich.table import Table

    table = Table(title="one step of this rank")
    for column in ("operation", "axis"):
        table.add_column(column)
    for column in ("calls", "MiB"):
        table.add_column(column, justify="right")
    sizes = traffic.nbytes()
    for (operation, axis), calls in sorted(traffic.count().items()):
        table.add_row(operation, axis, str(calls), f"{sizes[operation, axis] / MIB:.3f}")
    return table
