"""The part of ``evomesh plan`` that predicts time: a step, the fastest layouts, and a config of the fastest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from evomesh.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from evomesh.config.schema import Config
    from evomesh.plan.device import Device
    from evomesh.plan.layout_choice import LayoutChoice
    from evomesh.plan.search import SearchResult
    from evomesh.plan.step_time import StepTime

GIB = 2**30
BEST = 10
BILLION = 1e9
SECONDS_PER_HOUR = 3600


def timed_device(name: str | None, gpu_memory: float | None) -> Device | None:
    """Load the device of a prediction, with another memory if one is given; None without a name.

    Raises:
        UserError: no such device.
    """
    from evomesh.plan.device import load_device

    if name is None:
        return None
    device = load_device(name)
    if gpu_memory is None:
        return device
    return device.model_copy(update={"memory_gib": gpu_memory})


def print_step(
    console: Console, time: StepTime, device: Device, price: float | None
) -> None:
    """Print the predicted time of a step."""
    lines = describe_step(time, device, price)
    for line in lines:
        console.print(line, highlight=False)


def print_layouts(
    console: Console,
    config: Config,
    gpus: int,
    device: Device,
    price: float | None,
    path: str,
    write: Path | None,
) -> SearchResult:
    """Print the fastest layouts of a run, write a config of the first of them, and return all.

    Args:
        path: of the config.
    """
    from evomesh.plan.search import LayoutPredictor, search

    predictor = LayoutPredictor(config, gpus, device)
    cores = os.sched_getaffinity(0)
    with console.status("predicting layouts"):
        result = search(predictor, len(cores))
    fitting = result.fitting
    total = len(result.predictions)
    console.print(f"{total} layouts, of which {len(fitting)} fit", highlight=False)
    if not fitting:
        for line in describe_nearest(result, device):
            console.print(line, highlight=False)
        return result
    table = layouts_table(result, price)
    console.print(table)
    if write is not None:
        write_layout(fitting[0].choice, path, write)
        console.print(f"wrote {write}", highlight=False)
    return result


def describe_step(time: StepTime, device: Device, price: float | None) -> list[str]:
    """Return the time of a step on a device, and what it is made of."""
    speed = (
        f"a step on {time.ranks} x {device.name}: {time.seconds:.3f} s, "
        f"{time.tokens_per_second:,.0f} tokens per second and GPU"
    )
    if price is not None:
        speed += f", {_cost(time, price):,.2f} per billion tokens"
    lines = [speed]
    parts = time.parts()
    width = max(map(len, parts))
    for name, seconds in parts.items():
        share = seconds / time.seconds
        lines.append(f"  {name:{width}} {seconds:8.3f} s  {share:5.1%}")
    return lines


def layouts_table(result: SearchResult, price: float | None) -> Table:
    """Return the best layouts, each with what makes it slower than the one above."""
    from rich.table import Table

    table = Table("layout", title="fastest layouts that fit")
    table.add_column("GiB", justify="right")
    table.add_column("tokens/s/GPU", justify="right")
    if price is not None:
        table.add_column("cost of 1e9 tokens", justify="right")
    table.add_column("slower than the one above by")
    better: StepTime | None = None
    for prediction in result.fitting[:BEST]:
        time = prediction.time
        assert time is not None
        cells = [
            str(prediction.choice),
            f"{prediction.peak.total / GIB:.1f}",
            f"{time.tokens_per_second:,.0f}",
        ]
        if price is not None:
            cells.append(f"{_cost(time, price):,.2f}")
        cells.append(_reason(better, time))
        table.add_row(*cells)
        better = time
    return table


def describe_nearest(result: SearchResult, device: Device) -> list[str]:
    """Return by how much the layouts nearest to fitting do not fit."""
    capacity = int(device.memory_gib * GIB)
    too_large = [found for found in result.predictions if found.time is None]
    lines = []
    for prediction in too_large[:3]:
        missing = prediction.peak.missing(capacity) / GIB
        lines.append(f"  {missing:.1f} GiB too much: {prediction.choice}")
    return lines


def write_layout(choice: LayoutChoice, config: str, out: Path) -> None:
    """Write a config of the layout that stands on the given one.

    Raises:
        UserError: there is such a file, or it cannot be written.
    """
    base = Path(config).resolve()
    lines = [f"# {choice}", f"_base_ = {str(base)!r}", ""]
    for section, keys in choice.sections().items():
        lines.append(f"{section} = {keys!r}")
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    except FileExistsError as error:
        raise UserError(
            f"{out} exists", where="--write", expected="a new file", code="EVO-CLI-005"
        ) from error
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror}",
            where="--write",
            expected="a file in a folder that you may write to",
            code="EVO-CLI-006",
        ) from error


def _reason(better: StepTime | None, time: StepTime) -> str:
    """Return the part of a step that grew most against a better layout."""
    if better is None:
        return ""
    before = better.parts()
    now = time.parts()
    growth = {name: now[name] - before.get(name, 0.0) for name in now}
    name = max(growth, key=lambda part: growth[part])
    slower = time.seconds - better.seconds
    if slower < 0.0005:
        return "nothing"
    return f"{slower:.3f} s; {name} {growth[name]:+.3f} s"


def _cost(time: StepTime, price: float) -> float:
    """Return what a billion tokens cost at ``price`` per GPU and hour."""
    gpu_seconds = BILLION / time.tokens_per_second
    return gpu_seconds / SECONDS_PER_HOUR * price
