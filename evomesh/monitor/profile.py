"""A profile of a few steps.

It is torch's trace, and a table of where the time goes that adds up to the step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile, schedule

logger = logging.getLogger(__name__)

SKIPPED = 3  # the first steps fill caches
WARM_UP = 1  # the profiler's own start is not part of the figures
STEPS = 3
KINDS = (
    "matrix",
    "attention",
    "loss",
    "optimizer",
    "data wait",
    "communication",
    "other",
    "idle",
)
_REGION = "evomesh: "
_STEP = "ProfilerStep"
# Kind -> parts of the names of torch's operations of this kind.
_OPERATIONS = {
    "communication": ("c10d::", "gloo:", "nccl", "_c10d_functional::"),
    "attention": (
        "scaled_dot_product",
        "varlen_attn",
        "flash_attention",
        "efficient_attention",
    ),
    "matrix": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::matmul",
        "aten::linear",
        "aten::_grouped_mm",
        "mkldnn::_linear",
    ),
}


def region(kind: str) -> record_function:
    """Return a context manager whose operations all count as ``kind``.

    It costs next to nothing while nothing is profiled.
    """
    return record_function(_REGION + kind)


class StepProfile:
    """Profiler of ``STEPS`` steps of a run after ``SKIPPED + WARM_UP`` others.

    Call ``step`` after each step.

    Args:
        folder: receives ``NAME.json``, for chrome://tracing or ui.perfetto.dev, and
            ``NAME.txt``, the table.
        name: name of this rank.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.done = False
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        plan = schedule(
            skip_first=SKIPPED,
            wait=0,
            warmup=WARM_UP,
            active=STEPS,
            repeat=1,
        )
        self._profiler = profile(
            activities=activities,
            schedule=plan,
            on_trace_ready=self._write,
        )

    def __enter__(self) -> StepProfile:
        self._profiler.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._profiler.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if not self.done and error is None:
            logger.warning(
                "nothing was profiled: a profile needs %d steps",
                SKIPPED + WARM_UP + STEPS,
            )

    def step(self) -> None:
        self._profiler.step()

    def _write(self, profiler: Any) -> None:
        # torch calls this at its exit too, with no steps or with those already written.
        events = profiler.events()
        has_steps = any(event.name.startswith(_STEP) for event in events)
        if self.done or not has_steps:
            return
        self.done = True
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        trace_file = folder / f"{self.name}.json"
        profiler.export_chrome_trace(str(trace_file))
        seconds, total = seconds_by_kind(events)
        text = table(seconds, total)
        table_file = folder / f"{self.name}.txt"
        table_file.write_text(f"{text}\n")
        logger.info("profile of %d steps, trace in %s\n%s", STEPS, folder, text)


def seconds_by_kind(all_events: Iterable[Any]) -> tuple[dict[str, float], float]:
    """Return the seconds of each of ``KINDS``, and of the steps, over all profiled steps.

    On a device, kernels are counted, each under the operation that launched it, and
    idle is the time without a kernel; where kernels overlap, the kinds add up to more
    than the step and idle is 0. On the CPU, operations are counted, and idle is the
    time without an operation: mostly Python.
    """
    events = list(all_events)
    total = _cpu_seconds(events, _STEP)
    on_device = any(event.kernels for event in events)
    seconds = _seconds_of_operations(events, on_device)
    if on_device:
        # While the host waits for data the device is idle: no kernel shows it, only the
        # region on the host does.
        wait = f"{_REGION}data wait"
        seconds["data wait"] = _cpu_seconds(events, wait)
    busy = sum(seconds.values())
    idle = total - busy
    seconds["idle"] = max(idle, 0.0)
    return seconds, total


def _seconds_of_operations(events: list[Any], on_device: bool) -> dict[str, float]:
    """Return the seconds of each kind, without waiting and idle time."""
    # Each operation counts with its own time, without those that it calls: mm within
    # linear counts once.
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in events:
        if _counts(event, on_device):
            kind = _kind(event)
            seconds[kind] += _microseconds(event, on_device) / 1e6
    return seconds


def _cpu_seconds(events: list[Any], prefix: str) -> float:
    """Return the summed time of the events whose name begins with ``prefix``."""
    microseconds = 0.0
    for event in events:
        if event.name.startswith(prefix):
            microseconds += event.cpu_time_total
    return microseconds / 1e6


def _counts(event: Any, on_device: bool) -> bool:
    """Return whether an event is an operation of the step.

    A region is none, and neither is the work of a background thread.
    """
    # Within a step everything of the main thread has the step as its ancestor.
    in_background = not on_device and not _ancestors(event)
    return not in_background and not event.name.startswith((_STEP, _REGION))


def _microseconds(event: Any, on_device: bool) -> float:
    if on_device:
        return float(sum(kernel.duration for kernel in event.kernels))
    return float(event.self_cpu_time_total)


def table(seconds: dict[str, float], total: float) -> str:
    """Return the rows of kinds and of the whole step: milliseconds per step and share."""
    rows = [f"{'kind':14s} {'ms per step':>11s} {'share':>7s}"]
    for kind, spent in (seconds | {"step": total}).items():
        rows.append(f"{kind:14s} {1e3 * spent / STEPS:11.2f} {spent / total:7.1%}")
    return "\n".join(rows)


def _ancestors(event: Any) -> list[Any]:
    """Return the operations and regions around an event, innermost first."""
    chain = []
    while event.cpu_parent is not None:
        event = event.cpu_parent
        chain.append(event)
    return chain


def _kind(event: Any) -> str:
    """Return the kind of the outermost region around an event.

    Without a region it is that of the innermost operation that has one.
    """
    # Innermost first: aten::copy_ in aten::mm in "evomesh: loss" is part of the loss.
    around = [event, *_ancestors(event)]
    names: list[str] = [inner.name for inner in around]
    for name in reversed(names):
        if name.startswith(_REGION):
            return name.removeprefix(_REGION)
    for name in names:
        kind = _kind_of_operation(name)
        if kind is not None:
            return kind
    return "other"


def _kind_of_operation(name: str) -> str | None:
    for kind, parts in _OPERATIONS.items():
        if any(part in name for part in parts):
            return kind
    return None
