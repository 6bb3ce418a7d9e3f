"""The part of ``evomesh plan`` that predicts time: a step, the fastest layouts, and a config of the fastest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomesh.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from evomesh.config.schema import Config
    from evomesh.plan.device import Device
    from evomesh.plan.layout_choice import LayoutChoice
    from evomesh.plan.search import SearchResult
    from evomesh.plan.step_time import StepTime


def timed_device(
    name: str | None, gpu_memory: float | None, gpus: int
) -> Device | None:
    """Load the device of one of so many ranks, with its memory or the one that is given; None without a name.

    Raises:
        UserError: no such device.
    """
    from evomesh.plan.device import load_device

    if name is None:
        return None
    device = load_device(name).in_world(gpus)
    memory = gpu_memory or device.memory_of_rank
    return device.model_copy(update={"memory_gib": memory})


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
    overrides: Sequence[str] = (),
) -> SearchResult:
    """Print the fastest layouts of a run, write a config of the first of them, and return all.

    Args:
        path: of the config.
        overrides: given with --set, which the written config has too.
    """
    from evomesh.cli.plan_layouts import (
        describe_counts,
        describe_near,
        describe_nearest,
        describe_order,
        layouts_table,
    )
    from evomesh.plan.layout_predictor import PartsPredictor
    from evomesh.plan.search import search

    predictor = PartsPredictor(config, gpus, device)
    start = time.perf_counter()
    with console.status("predicting layouts"):
        result = search(predictor)
    seconds = time.perf_counter() - start
    traces = predictor.library.num_traces
    lines = describe_counts(result.counts, traces, seconds)
    if not result.fitting:
        lines += describe_nearest(result, predictor.capacity)
    for line in lines:
        console.print(line, highlight=False)
    if not result.fitting:
        return result
    console.print(describe_order(), highlight=False)
    console.print(layouts_table(result, price))
    for line in describe_near(result):
        console.print(line, highlight=False)
    if write is not None:
        write_layout(result.fitting[0].choice, path, write, overrides)
        console.print(f"wrote {write}", highlight=False)
    return result


def describe_step(time: StepTime, device: Device, price: float | None) -> list[str]:
    """Return the time of a step on a device, and what it is made of."""
    from evomesh.cli.plan_layouts import cost

    speed = (
        f"a step on {time.ranks} x {device.name}: {time.seconds:.3f} s, "
        f"{time.tokens_per_second:,.0f} tokens per second and GPU"
    )
    if price is not None:
        speed += f", {cost(time, price):,.2f} per billion tokens"
    lines = [speed]
    parts = time.parts()
    width = max(map(len, parts))
    for name, seconds in parts.items():
        share = seconds / time.seconds
        lines.append(f"  {name:{width}} {seconds:8.3f} s  {share:5.1%}")
    return lines


def write_layout(
    choice: LayoutChoice, config: str, out: Path, overrides: Sequence[str] = ()
) -> None:
    """Write a config of the layout that stands on the given one.

    Args:
        overrides: given with --set: the layout is one of the config that they change.

    Raises:
        UserError: there is such a file, or it cannot be written.
    """
    from evomesh.config.reading.overrides import apply_overrides, parse_overrides
    from evomesh.config.reading.source import merge_values

    base = Path(config).resolve()
    lines = [f"# {choice}", f"_base_ = {str(base)!r}", ""]
    sections: dict[str, Any] = {}
    changes = parse_overrides(overrides)
    apply_overrides(sections, changes, create=True)
    for section, keys in choice.sections().items():
        # The layout decides on what both name.
        below = sections.get(section, {})
        sections[section] = merge_values(below, keys)
    lines += [f"{section} = {value!r}" for section, value in sections.items()]
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
