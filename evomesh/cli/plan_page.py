"""The page of ``evomesh plan --html``, and whether it can be written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evomesh.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from evomesh.config.schema import Config
    from evomesh.plan.device import Device
    from evomesh.plan.memory_timeline import MemoryTimeline
    from evomesh.plan.search import SearchResult
    from evomesh.plan.step_spans import StepSpans
    from evomesh.runs.plan_payload import LayoutRow


@dataclass(frozen=True)
class PageSubject:
    """Subject of a prediction: a config, by the path that the user typed, on so many of a device."""

    path: str
    config: Config
    gpus: int
    device: Device
    price: float | None


def write_plan_page(
    console: Console,
    out: Path,
    subject: PageSubject,
    spans: StepSpans,
    result: SearchResult | None,
) -> None:
    """Write the page of a prediction.

    Args:
        result: of a search; None without one.

    Raises:
        UserError: the file cannot be written.
    """
    from evomesh.runs.page import render_plan_page, write_page
    from evomesh.runs.plan_payload import PlanFigures, plan_payload

    figures = PlanFigures(
        name=Path(subject.path).name,
        config=subject.config,
        gpus=subject.gpus,
        device=subject.device,
        step=spans,
        memory=memory_of_ranks(subject.config, subject.gpus, spans, subject.device),
        layouts=None if result is None else _layouts(result),
        price=subject.price,
    )
    page = render_plan_page(plan_payload(figures))
    write_page(out, page)
    megabytes = len(page) / 1e6
    console.print(f"wrote {out} ({megabytes:.1f} MB)", highlight=False)


def refuse_unfit_output(option: str, file: Path | None, as_json: bool) -> None:
    """Refuse a file that could not be written, or would not be, before the prediction.

    Raises:
        UserError: it is a folder or in none, or one JSON object is printed instead.
    """
    if file is None:
        return
    if as_json:
        raise UserError(
            f"--json prints the memory of a rank, and nothing is written with {option}",
            where=option,
            expected="one of the two",
            code="EVO-CLI-004",
        )
    problem = ""
    is_page = file.suffix in (".html", ".htm")
    if file.is_dir():
        problem = "is a folder"
    elif option == "--html" and file.exists() and not is_page:
        problem = "exists and has another ending than .html: it would be lost"
    folder = file.absolute().parent
    if not folder.is_dir():
        problem = f"cannot be written: {folder} is no folder"
    if problem:
        raise UserError(
            f"{file} {problem}",
            where=option,
            expected="a file in a folder that exists",
            code="EVO-CLI-006",
        )


def refuse_beside_json(as_json: bool, search: bool, price: float | None) -> None:
    """Refuse what the JSON object does not hold.

    Raises:
        UserError: a search or a price is asked for.
    """
    if not as_json or (not search and price is None):
        return
    raise UserError(
        "--json prints the memory of a rank, without layouts and costs",
        where="--search" if search else "--price",
        expected="one of the two",
        code="EVO-CLI-004",
    )


def memory_of_ranks(
    config: Config, gpus: int, spans: StepSpans, device: Device
) -> list[MemoryTimeline]:
    """Return the memory of each rank of the pipeline over a step; none for a custom model."""
    from evomesh.config.size import parameter_count
    from evomesh.plan.step_memory import trace_step_memory
    from evomesh.plan.step_time import traced_device

    if parameter_count(config.model) is None:
        return []
    timelines = []
    traced = traced_device(device)
    for rank in spans.ranks:
        timeline = trace_step_memory(config, gpus, rank.rank, traced)
        timelines.append(timeline)
    return timelines


def _layouts(result: SearchResult) -> list[LayoutRow]:
    from evomesh.runs.plan_payload import LayoutRow

    rows = []
    for prediction in result.fitting:
        assert prediction.time is not None
        needed = prediction.peak.needed
        row = LayoutRow(str(prediction.choice), needed, prediction.time)
        rows.append(row)
    return rows
