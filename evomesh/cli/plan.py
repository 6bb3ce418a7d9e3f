"""``evomesh plan``: predict what a run holds and sends, without running it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomesh.cli.options import OverrideOption
from evomesh.cli.plan_layouts import near_gib
from evomesh.cli.plan_page import (
    PageSubject,
    refuse_beside_json,
    refuse_unfit_output,
    write_plan_page,
)
from evomesh.errors import UserError
from evomesh.quantities import counted, readable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from evomesh.config.schema import Config
    from evomesh.parallel.traffic import TrafficLog
    from evomesh.plan.device import Device
    from evomesh.plan.memory import PeakMemory
    from evomesh.plan.memory_timeline import MemoryTimeline
    from evomesh.plan.trace import RankMemory, StepTrace, TracedDevice

MIB = 2**20
GIB = 2**30
# GiB that torch reports of a GPU with 80 GB, at least: see evomesh/plan/devices.
_GPU_MEMORY = 79.1
# Of a device's memory: so far a trace of one micro-batch may be from that of the step.
_UNSURE = 0.05
WHERE = {
    "": "its beginning",
    "forward": "forward",
    "transfer": "a transfer to the next stage",
    "loss": "the loss",
    "backward": "backward",
    "update": "the update",
}


GpuMemoryOption = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory",
        min=1,
        help="Memory of one GPU, in GiB; without it that of the device, or 79.1, what a GPU of 80 GB has.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME|FILE",
        help="Also predict the time of a step, on A100, A800, B200, H100, H200 or what a TOML file describes.",
    ),
]
MeasureOption = Annotated[
    Path | None,
    typer.Option(
        "--measure",
        metavar="OUT.toml",
        help="Measure this machine for about a minute, and write the file that --device takes.",
    ),
]
RankOption = Annotated[int, typer.Option(min=0, help="The process to predict.")]
TraceOption = Annotated[
    bool,
    typer.Option(
        "--trace", help="Also trace one step: bytes sent, by axis of the grid."
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object, as evomesh report reads."),
]
SearchOption = Annotated[
    bool,
    typer.Option("--search", help="Predict all layouts and show the fastest that fit."),
]
ConfigArgument = Annotated[
    str | None, typer.Argument(help="A Python config file.", show_default=False)
]
GpusOption = Annotated[
    int | None,
    typer.Option(min=1, help="Number of processes in the run.", show_default=False),
]
WriteOption = Annotated[
    Path | None,
    typer.Option(
        "--write", metavar="OUT.py", help="Write a config of the fastest layout."
    ),
]
HtmlOption = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="OUT.html",
        help="Write a page with the streams of a step, memory, groups and layouts.",
    ),
]
PriceOption = Annotated[
    float | None,
    typer.Option(
        "--price", min=0, help="Price of one GPU for one hour, to show costs."
    ),
]


@dataclass(frozen=True)
class RankPrediction:
    """Prediction of one rank of a run.

    Attributes:
        peak, timeline: None for a custom model, whose activations are not counted.
        step: None where no step was traced.
        note: about the layout, beside the warnings; None if there is nothing to say.
        device: whose code paths the rank takes.
    """

    config: Config
    gpus: int
    rank: int
    memory: RankMemory
    peak: PeakMemory | None
    timeline: MemoryTimeline | None
    step: StepTrace | None
    warnings: list[str]
    note: str | None
    device: TracedDevice


def plan(
    config: ConfigArgument = None,
    gpus: GpusOption = None,
    rank: RankOption = 0,
    trace: TraceOption = False,
    gpu_memory: GpuMemoryOption = None,
    as_json: JsonOption = False,
    device: DeviceOption = None,
    measure: MeasureOption = None,
    search: SearchOption = False,
    write: WriteOption = None,
    price: PriceOption = None,
    html: HtmlOption = None,
    overrides: OverrideOption = None,
) -> None:
    """Predict memory, traffic and time of a run. Needs no GPU, no data and only one machine."""
    from rich.console import Console

    from evomesh.cli.plan_time import print_layouts, print_step, timed_device
    from evomesh.config.loader import load_config

    if measure is not None:
        from evomesh.cli.plan_measure import measure_machine

        measure_machine(Console(), measure, config)
        return
    if config is None or gpus is None:
        raise _missing(config)
    check_time_options(device, search, write, price, html)
    refuse_beside_json(as_json, search, price)
    refuse_unfit_output("--html", html, as_json)
    refuse_unfit_output("--write", write, as_json)
    timed = timed_device(device, gpu_memory, gpus)
    settings = load_config(config, overrides or []).config
    prediction = _predict(settings, gpus, rank, trace, timed)
    if as_json:
        facts = _facts(prediction)
        typer.echo(json.dumps(facts))
        return
    console = Console()
    capacity = gpu_memory or _GPU_MEMORY
    if timed is not None:
        capacity = timed.memory_gib
    _print_rank(console, prediction, capacity)
    if timed is None:
        return
    from evomesh.plan.step_spans import predict_spans

    spans = predict_spans(settings, gpus, timed)
    print_step(console, spans.time, timed, price)
    result = None
    if search:
        result = print_layouts(
            console, settings, gpus, timed, price, config, write, overrides or ()
        )
    if html is not None:
        subject = PageSubject(config, settings, gpus, timed, price)
        write_plan_page(console, html, subject, spans, result)


def _missing(config: str | None) -> UserError:
    """Return the message for a prediction without a config or a number of processes."""
    name = "CONFIG" if config is None else "--gpus"
    return UserError(
        f"a prediction without {name}",
        where="evomesh plan",
        expected="evomesh plan CONFIG --gpus N, or evomesh plan --measure OUT.toml",
        code="EVO-CLI-004",
    )


def check_time_options(
    device: str | None,
    search: bool,
    write: Path | None,
    price: float | None,
    html: Path | None,
) -> None:
    """Refuse options without the one that they belong to.

    Raises:
        UserError: a search, a price or a page without a device, a file without a search, or a file that exists.
    """
    needing = {
        "--search": search,
        "--price": price is not None,
        "--html": html is not None,
    }
    given = [name for name, is_given in needing.items() if is_given]
    if device is None and given:
        raise UserError(
            "a prediction of time needs a device",
            where=given[0],
            expected="--device too",
            code="EVO-CLI-004",
        )
    if write is not None and not search:
        raise UserError(
            "the fastest layout is known after a search",
            where="--write",
            expected="--search too",
            code="EVO-CLI-004",
        )
    if write is not None and write.exists():
        raise UserError(
            f"{write} exists",
            where="--write",
            expected="a new file",
            code="EVO-CLI-005",
        )


def _predict(
    config: Config, gpus: int, rank: int, trace: bool, timed: Device | None = None
) -> RankPrediction:
    from evomesh.config.layout import check_world, zero_note
    from evomesh.config.size import parameter_count
    from evomesh.plan.memory import PeakMemory
    from evomesh.plan.step_memory import trace_step_memory
    from evomesh.plan.step_time import traced_device
    from evomesh.plan.trace import TracedDevice, hold
    from evomesh.plan.trace import trace as trace_step

    if rank >= gpus:
        raise UserError(
            f"rank {rank} of {counted(gpus, 'process')}",
            where="--rank",
            expected=f"0 to {gpus - 1}",
            code="EVO-CLI-003",
        )
    warnings = check_world(config, gpus)
    step = trace_step(config, gpus, rank) if trace else None
    memory = step or hold(config, gpus, rank)
    peak = timeline = None
    device = TracedDevice.CUDA if timed is None else traced_device(timed)
    if parameter_count(config.model) is not None:
        timeline = trace_step_memory(config, gpus, rank, device)
        peak = PeakMemory.of_timeline(timeline)
    note = zero_note(config, gpus)
    return RankPrediction(
        config, gpus, rank, memory, peak, timeline, step, warnings, note, device
    )


def _print_rank(
    console: Console, prediction: RankPrediction, gpu_memory: float
) -> None:
    """Print what a rank holds and sends."""
    lines = _describe_rank(prediction)
    for warning in prediction.warnings:
        lines.append(f"warning: {warning}")
    if prediction.note is not None:
        lines.append(f"note: {prediction.note}")
    if prediction.peak is None:
        lines.append("activations of a custom model are not counted")
    else:
        lines += _describe_peak(prediction, prediction.peak, gpu_memory)
    if prediction.step is None:
        lines.append("--trace adds what one step sends")
    for line in lines:
        console.print(line, highlight=False)
    if prediction.step is not None:
        table = _traffic_table(prediction.step.traffic)
        console.print(table)


def _facts(prediction: RankPrediction) -> dict[str, Any]:
    """Return the prediction as JSON; sizes are in bytes."""
    from evomesh.config.size import parameter_count, tokens_per_step

    config = prediction.config
    memory = prediction.memory
    facts: dict[str, Any] = {
        "gpus": prediction.gpus,
        "rank": prediction.rank,
        "warnings": prediction.warnings,
        "model_parameters": parameter_count(config.model),
        "tokens_per_step": tokens_per_step(config, memory.grid.dp.size),
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
    }
    peak = prediction.peak
    if peak is not None:
        facts["peak"] = {
            "total": peak.total,
            "phase": peak.phase,
            "kinds": peak.kinds,
            "outside": peak.outside,
        }
    if prediction.timeline is not None:
        facts["memory_timeline"] = prediction.timeline.facts()
    if prediction.step is not None:
        facts["traffic"] = _traffic_rows(prediction.step.traffic)
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


def _describe_rank(prediction: RankPrediction) -> list[str]:
    """Return three lines: the run, the rank's position in the grid, and what it holds."""
    from evomesh.config.size import parameter_count, tokens_per_step

    config = prediction.config
    memory = prediction.memory
    rank = prediction.rank
    gpus = prediction.gpus
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
    parts = ", ".join(f"{name} {readable(size)}" for name, size in sizes.items())
    layers = f"layers {_format_ranges(memory.layers)} of {config.model.num_layers}"
    return [
        f"{model}; {tokens:,} tokens per step "
        f"({data.packed_length} x {counted(data.micro_num, 'micro-batch')} x "
        f"{counted(grid.dp.size, 'data-parallel rank')})",
        f"rank {rank} of {gpus}: {position}",
        f"holds: {layers}; {parts}; in total {readable(total)}",
    ]


def _describe_peak(
    prediction: RankPrediction, peak: PeakMemory, gpu_memory: float
) -> list[str]:
    """Return the bytes at the peak of a step by kind, and whether a GPU has as many."""
    rows = dict(peak.kinds)
    for name, size in peak.outside.items():
        rows[f"{name} (estimated)"] = size
    width = max(map(len, rows))
    lines = [
        f"peak of a step, in {WHERE[peak.phase]}: {near_gib(peak.total)} of tensors"
    ]
    needed = sum(rows.values())
    for name, size in (*rows.items(), ("in total", needed)):
        number, unit = near_gib(size, digits=2).split()
        lines.append(f"  {name:{width}} {number:>7} {unit}")
    capacity = int(gpu_memory * GIB)
    missing = peak.missing(capacity)
    if missing <= 0:
        return [*lines, f"fits in {gpu_memory:g} GiB: {near_gib(-missing)} to spare"]
    lines.append(f"does not fit in {gpu_memory:g} GiB by {near_gib(missing)}")
    changes = _changes_that_fit(prediction, capacity)
    if changes:
        lines.append(f"fits with any of: {'; '.join(changes)}")
    else:
        lines.append("no single change of the layout makes it fit; --search tries all")
    return lines


def _changes_that_fit(prediction: RankPrediction, capacity: int) -> list[str]:
    """Return the single changes with which the rank fits, of each kind of change the smallest."""
    from evomesh.plan.layout_choice import (
        LayoutChoice,
        choice_of,
        difference,
        least_changes,
        single_changes,
        with_choice,
    )
    from evomesh.plan.memory import peak_memory
    from evomesh.plan.trace import TracedDevice

    config = prediction.config
    gpus = prediction.gpus
    rank = prediction.rank
    device = prediction.device
    now = choice_of(config, gpus)

    def fits(choice: LayoutChoice) -> bool:
        changed = with_choice(config, choice)
        if device is TracedDevice.CUDA:
            quick = _fits_clearly(changed, gpus, rank, capacity)
            if quick is not None:
                return quick
        exact = peak_memory(changed, gpus, rank, device)
        return exact.missing(capacity) <= 0

    several = single_changes(config, now, gpus)
    return [difference(now, choice) for choice in least_changes(several, fits)]


def _fits_clearly(
    config: Config,
    gpus: int,
    rank: int,
    capacity: int,
) -> bool | None:
    """Return whether a step fits by a trace of one micro-batch; None where that does not tell."""
    from evomesh.config.layout import pipeline_schedule
    from evomesh.plan.memory import trace_memory

    traced = trace_memory(config, gpus, rank)
    peak = traced.peak()
    missing = peak.missing(capacity)
    if abs(missing) <= _UNSURE * capacity:
        return None
    # Other schedules keep more with every micro-batch, which one does not show.
    shows_all = missing > 0 or pipeline_schedule(config) == "1f1b"
    if shows_all:
        return missing <= 0
    return None


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

    table = Table("operation", "axis", title="one step of this rank")
    for column in ("calls", "MiB"):
        table.add_column(column, justify="right")
    for row in _traffic_rows(traffic):
        calls = str(row["calls"])
        mebibytes = f"{row['bytes'] / MIB:.3f}"
        table.add_row(row["operation"], row["axis"], calls, mebibytes)
    return table
