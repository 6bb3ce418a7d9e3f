"""``evomesh plan``: predict what a run holds and sends, without running it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomesh.cli.options import OverrideOption
from evomesh.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from evomesh.config.schema import Config
    from evomesh.parallel.traffic import TrafficLog
    from evomesh.plan.device import Device
    from evomesh.plan.memory import PeakMemory
    from evomesh.plan.trace import RankMemory, StepTrace

MIB = 2**20
GIB = 2**30
WHERE = {
    "loss": "the loss",
    "backward": "backward",
    "update": "the update",
}


def plan(
    config: Annotated[str, typer.Argument(help="A Python config file.")],
    gpus: Annotated[int, typer.Option(min=1, help="Number of processes in the run.")],
    rank: Annotated[int, typer.Option(min=0, help="The process to predict.")] = 0,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace", help="Also trace one step: bytes sent, by axis of the grid."
        ),
    ] = False,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            "--gpu-memory",
            min=1,
            help="Memory of one GPU, in GiB; without it that of the device, or 80.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME|FILE",
            help="Also predict the time of a step, on A100, A800, B200, H100, H200 or what a TOML file describes.",
        ),
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Predict all layouts and show the fastest that fit."
        ),
    ] = False,
    write: Annotated[
        Path | None,
        typer.Option(
            "--write", metavar="OUT.py", help="Write a config of the fastest layout."
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object, as evomesh report reads."),
    ] = False,
    price: Annotated[
        float | None,
        typer.Option(
            "--price", min=0, help="Price of one GPU for one hour, to show costs."
        ),
    ] = None,
    overrides: OverrideOption = None,
) -> None:
    """Predict memory, traffic and time of a run. Needs no GPU, no data and only one machine."""
    from rich.console import Console

    from evomesh.config.layout import check_world
    from evomesh.config.loader import load_config
    from evomesh.config.size import parameter_count
    from evomesh.plan.device import load_device
    from evomesh.plan.memory import peak_memory
    from evomesh.plan.trace import hold
    from evomesh.plan.trace import trace as trace_step

    if rank >= gpus:
        raise UserError(
            f"rank {rank} of {gpus} processes",
            where="--rank",
            expected=f"0 to {gpus - 1}",
        )
    _check_search(device, search, write, price)
    known = load_device(device) if device is not None else None
    capacity = gpu_memory or (known.memory_gib if known is not None else 80)
    settings = load_config(config, overrides or []).config
    warnings = check_world(settings, gpus)
    step_trace = trace_step(settings, gpus, rank) if trace else None
    memory = step_trace or hold(settings, gpus, rank)
    peak = None
    if parameter_count(settings.model) is not None:
        peak = peak_memory(settings, gpus, rank)
    if as_json:
        facts = _facts(settings, memory, peak, step_trace)
        facts |= {"gpus": gpus, "rank": rank, "warnings": warnings}
        typer.echo(json.dumps(facts))
        return
    lines = _describe_rank(settings, gpus, rank, memory)
    lines += [f"warning: {warning}" for warning in warnings]
    if peak is not None:
        lines += _describe_peak(peak, settings, gpus, rank, capacity)
    else:
        lines.append("activations of a custom model are not counted")
    if step_trace is None:
        lines.append("--trace adds what one step sends")
    console = Console()
    for line in lines:
        console.print(line, highlight=False)
    if step_trace is not None:
        console.print(_traffic_table(step_trace.traffic))
    if known is not None:
        limited = known.model_copy(update={"memory_gib": capacity})
        _print_times(console, settings, gpus, limited, price)
        if search:
            _search(console, settings, gpus, limited, price, config, write)


def _check_search(
    device: str | None, search: bool, write: Path | None, price: float | None
) -> None:
    """Refuse options without the one that they belong to."""
    if device is None and (search or price is not None):
        raise UserError(
            "a prediction of time needs a device",
            where="--search" if search else "--price",
            expected="--device too",
        )
    if write is not None and not search:
        raise UserError(
            "the fastest layout is known after a search",
            where="--write",
            expected="--search too",
        )


def _print_times(
    console: Console, config: Config, gpus: int, device: Device, price: float | None
) -> None:
    from evomesh.cli.plan_time import describe_step
    from evomesh.plan.step_time import predict_step

    time = predict_step(config, gpus, device)
    for line in describe_step(time, device, price):
        console.print(line, highlight=False)


def _search(
    console: Console,
    config: Config,
    gpus: int,
    device: Device,
    price: float | None,
    path: str,
    write: Path | None,
) -> None:
    """Print the fastest layouts, and write the first of them."""
    import os

    from evomesh.cli.plan_time import describe_nearest, layouts_table, write_layout
    from evomesh.plan.search import LayoutPredictor
    from evomesh.plan.search import search as search_layouts

    if write is not None and write.exists():
        raise UserError(f"{write} exists", where="--write", expected="a new file")
    processes = len(os.sched_getaffinity(0))
    predictor = LayoutPredictor(config, gpus, device)
    with console.status("predicting layouts"):
        result = search_layouts(predictor, processes)
    total = len(result.predictions)
    fitting = result.fitting
    console.print(f"{total} layouts, of which {len(fitting)} fit", highlight=False)
    if not fitting:
        for line in describe_nearest(result, device):
            console.print(line, highlight=False)
        return
    console.print(layouts_table(result, price))
    if write is not None:
        write_layout(fitting[0].choice, path, write)
        console.print(f"wrote {write}", highlight=False)


def _facts(
    config: Config,
    memory: RankMemory,
    peak: PeakMemory | None,
    step_trace: StepTrace | None,
) -> dict[str, Any]:
    """Return the prediction as JSON; sizes are in bytes."""
    from evomesh.config.size import parameter_count, tokens_per_step

    facts: dict[str, Any] = {
        "model_parameters": parameter_count(config.model),
        "tokens_per_step": tokens_per_step(config, memory.grid.dp.size),
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
    }
    if peak is not None:
        facts["peak"] = {
            "total": peak.total,
            "phase": peak.phase,
            "kinds": peak.kinds,
        }
    if step_trace is not None:
        facts["traffic"] = _traffic_rows(step_trace.traffic)
    return facts


def _traffic_rows(traffic: TrafficLog) -> list[dict[str, Any]]:
    """Return calls and bytes of each operation on each axis, such as all_gather on tp."""
    sizes = traffic.nbytes()
    counts = traffic.count()
    rows = []
    for operation, axis in sorted(counts):
        row = {
            "operation": operation,
            "axis": axis,
            "calls": counts[operation, axis],
            "bytes": sizes[operation, axis],
        }
        rows.append(row)
    return rows


def _describe_rank(
    config: Config, gpus: int, rank: int, memory: RankMemory
) -> list[str]:
    """Return three lines: the run, the rank's position in the grid, and what it holds."""
    from evomesh.config.size import parameter_count, tokens_per_step

    grid = memory.grid
    data = config.data
    count = parameter_count(config.model)
    model = (
        f"{count:,} parameters"
        if count is not None
        else f"model type {config.model.model_type}"
    )
    tokens = tokens_per_step(config, grid.dp.size)
    axes = (grid.pp, grid.dp, grid.tp, grid.wp, grid.zero, grid.replica)
    position = ", ".join(f"{axis.name} {axis.rank} of {axis.size}" for axis in axes)
    sizes = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer state": memory.optimizer,
    }
    total = sum(sizes.values())
    parts = ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in sizes.items())
    layers = f"layers {_format_ranges(memory.layers)} of {config.model.num_layers}"
    return [
        f"{model}; {tokens:,} tokens per step "
        f"({data.packed_length} x {data.micro_num} micro-batches x {grid.dp.size} data-parallel ranks)",
        f"rank {rank} of {gpus}: {position}",
        f"holds: {layers}; {parts}; in total {total / MIB:.1f} MiB",
    ]


def _describe_peak(
    peak: PeakMemory, config: Config, gpus: int, rank: int, gpu_memory: float
) -> list[str]:
    """Return the bytes at the peak of a step by kind, and whether a GPU has as many."""
    from evomesh.plan.memory import RESERVED

    width = max(map(len, peak.kinds))
    lines = [f"peak of a step, in {WHERE[peak.phase]}: {peak.total / GIB:.1f} GiB"]
    for kind, size in peak.kinds.items():
        lines.append(f"  {kind:{width}} {size / GIB:7.2f} GiB")
    capacity = int(gpu_memory * GIB)
    missing = peak.missing(capacity) / GIB
    reserve = f"{RESERVED / GIB:.0f} GiB reserved for CUDA, NCCL and fragmentation"
    if missing <= 0:
        spare = f"{-missing:.1f} GiB to spare, with {reserve}"
        return [*lines, f"fits in {gpu_memory:g} GiB: {spare}"]
    lines.append(
        f"does not fit in {gpu_memory:g} GiB by {missing:.1f} GiB, with {reserve}"
    )
    changes = _changes_that_fit(config, gpus, rank, capacity)
    if changes:
        lines.append(f"fits with any of: {'; '.join(changes)}")
    else:
        lines.append("no single change of the layout makes it fit; --search tries all")
    return lines


def _changes_that_fit(config: Config, gpus: int, rank: int, capacity: int) -> list[str]:
    from evomesh.plan.layout_choice import (
        choice_of,
        difference,
        single_changes,
        with_choice,
    )
    from evomesh.plan.memory import peak_memory

    now = choice_of(config, gpus)
    changes = []
    for choice in single_changes(config, now, gpus):
        peak = peak_memory(with_choice(config, choice), gpus, rank)
        if peak.missing(capacity) <= 0:
            changes.append(difference(now, choice))
    return changes


def _format_ranges(numbers: list[int]) -> str:
    """Format ascending numbers: [0, 1, 2, 6, 7] -> "0 to 2 and 6 to 7"."""
    ranges: list[tuple[int, int]] = []  # first and last number of each
    for number in numbers:
        first = number
        if ranges and ranges[-1][1] == number - 1:
            first, _ = ranges.pop()  # the number continues the last range
        ranges.append((first, number))
    texts = []
    for first, last in ranges:
        text = str(first) if first == last else f"{first} to {last}"
        texts.append(text)
    return " and ".join(texts) or "none"


def _traffic_table(traffic: TrafficLog) -> Table:
    from rich.table import Table

    # One row for each operation on each axis, such as all_gather on tp.
    table = Table("operation", "axis", title="one step of this rank")
    for column in ("calls", "MiB"):
        table.add_column(column, justify="right")
    sizes = traffic.nbytes()
    counts = traffic.count()
    for operation, axis in sorted(counts):
        calls = counts[operation, axis]
        mebibytes = sizes[operation, axis] / MIB
        table.add_row(operation, axis, str(calls), f"{mebibytes:.3f}")
    return table
