"""``evomesh scale``: how the costs of a run grow with the number of its ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.cli.options import OverrideOption
from evomesh.plan.failures import DEFAULT_DEVICE_HOURS

if TYPE_CHECKING:
    from rich.table import Table

    from evomesh.plan.scale import WorldScale

GIGA = 1e9
MEGA = 1e6
DEFAULT_RANKS = (8, 64, 512, 4096, 16_384)

RanksOption = Annotated[
    list[int] | None,
    typer.Option(
        min=2,
        help="Number of ranks, may be repeated; without it 8, 64, 512, 4096 and 16384, as far as the layout fits.",
    ),
]
JitterOption = Annotated[
    str,
    typer.Option(
        metavar="KIND:SPREAD",
        help="Time of a rank for a step: normal, lognormal or exponential, and its spread as a share of a step.",
    ),
]
HoursOption = Annotated[
    float,
    typer.Option(min=1, help="Mean hours between failures of one device."),
]
SaveRateOption = Annotated[
    float,
    typer.Option(
        min=0.001,
        help="GB a second of one rank while training waits for a checkpoint.",
    ),
]
RestartOption = Annotated[
    float,
    typer.Option(min=0, help="Seconds from a failure until training continues."),
]
TokensOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of a step that all numbers of ranks share; without it those of the smallest.",
    ),
]


def scale(
    config: Annotated[str, typer.Argument(help="A Python config file.")],
    ranks: RanksOption = None,
    jitter: JitterOption = "lognormal:0.02",
    mtbf: HoursOption = DEFAULT_DEVICE_HOURS,
    save_rate: SaveRateOption = 1.0,
    restart: RestartOption = 600.0,
    tokens: TokensOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each number.")
    ] = False,
    overrides: OverrideOption = None,
) -> None:
    """Predict how start, checkpoints, pipeline, stragglers and failures grow with the number of ranks.

    The plans of a save and of a start are computed by the code of a run, for all ranks, on one machine.
    """
    from rich.console import Console

    from evomesh.config.layout import axis_sizes
    from evomesh.config.loader import load_config
    from evomesh.config.size import tokens_per_step
    from evomesh.plan.scale import ScaleAssumptions, fitting_sizes, world_scale
    from evomesh.plan.stragglers import StepJitter

    distribution = StepJitter.parse(jitter)
    settings = load_config(config, overrides or []).config
    sizes = fitting_sizes(settings, ranks or DEFAULT_RANKS)
    if tokens is None:
        smallest = axis_sizes(settings.parallel, min(sizes))
        tokens = tokens_per_step(settings, smallest.dp)
    assumptions = ScaleAssumptions(
        jitter=distribution,
        device_hours=mtbf,
        save_rate=save_rate * GIGA,
        restart=restart,
        tokens=tokens,
    )
    console = Console()
    worlds = []
    for size in sizes:
        with console.status(f"planning for {size} ranks"):
            world = world_scale(settings, size, assumptions)
        worlds.append(world)
        if as_json:
            typer.echo(json.dumps(asdict(world) | {"lost_share": world.lost_share}))
    if not as_json:
        console.print(scale_table(worlds))


def scale_table(worlds: Sequence[WorldScale]) -> Table:
    """Return a table with a column for each number of ranks."""
    from rich.table import Table

    table = Table("ranks")
    for world in worlds:
        table.add_column(f"{world.ranks:,}", justify="right")
    columns = [scale_rows(world) for world in worlds]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def scale_rows(world: WorldScale) -> dict[str, str]:
    """Return the figures of one number of ranks by their names."""
    return {
        **_start_rows(world),
        **_checkpoint_rows(world),
        **_time_rows(world),
    }


def _start_rows(world: WorldScale) -> dict[str, str]:
    from evomesh.plan.scale import CONNECTIONS

    start = world.start
    return {
        "tokens of a step": f"{world.tokens:,}",
        "process groups, of all ranks": f"{world.groups:,}",
        "process groups, of one rank": str(world.groups_of_rank),
        "connections to rank 0": f"{CONNECTIONS * world.ranks:,}",
        "messages to the store at the start, of one rank": str(start.messages),
        "answers to all of them, GB": f"{start.answered * world.ranks / GIGA:.3f}",
        "heartbeat messages a second, of all ranks": f"{start.heartbeats * world.ranks:,}",
    }


def _checkpoint_rows(world: WorldScale) -> dict[str, str]:
    checkpoint = world.checkpoint
    read = "–"
    if checkpoint.read is not None:
        read = f"{checkpoint.read / GIGA:.3f}"
    return {
        "checkpoint, GB": f"{checkpoint.total / GIGA:.1f}",
        "lists of tensors that rank 0 gets, GB": f"{checkpoint.boxes_message / GIGA:.3f}",
        "planning of a save, s": f"{checkpoint.plan_seconds:.2f}",
        "data files": f"{checkpoint.files:,}",
        "largest data file, GB": f"{checkpoint.largest_file / GIGA:.3f}",
        "index, MB": f"{checkpoint.index / MEGA:.1f}",
        "pieces": f"{checkpoint.pieces:,}",
        "a rank's pieces at a start, GB": f"{checkpoint.wanted / GIGA:.3f}",
        "of them read from the store, GB": read,
    }


def _time_rows(world: WorldScale) -> dict[str, str]:
    failures = world.failures
    constant = "–"
    if world.constant_bubble is not None:
        constant = f"{world.constant_bubble:.1%}"
    slower = world.slowest - 1
    return {
        "pipeline bubble": f"{world.bubble:.1%}",
        "pipeline bubble, tokens of a step constant": constant,
        "slowest rank of a step": f"{slower:+.1%}",
        "time between failures, h": f"{failures.between / 3600:.1f}",
        "stall of a checkpoint, s": f"{failures.stall:.1f}",
        "best interval of checkpoints, s (Young)": f"{failures.young:,.0f}",
        "best interval of checkpoints, s (Daly)": f"{failures.daly:,.0f}",
        "time lost to failures and checkpoints": f"{world.lost_share:.1%}",
    }
