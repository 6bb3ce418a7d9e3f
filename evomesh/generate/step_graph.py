"""A decoding step as one CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Step: TypeAlias = Callable[[], Tensor]
Capture: TypeAlias = Callable[[Step], Step | None]
# A replay runs the same kernels on the same numbers.
REPLAY_TOLERANCE = 1e-2


def run_eagerly(step: Step) -> None:
    """Make no graph of a step."""


@dataclass(frozen=True)
class _CapturePlace:
    """The stream and the memory of an engine's graphs.

    Attributes:
        pool: the handle of the memory that they share: a step's logits are read before the next step runs.
    """

    stream: Any
    pool: Any


class GraphCapture:
    """Captures the steps of one engine, one at a time, as CUDA graphs."""

    def __init__(self) -> None:
        self._place: _CapturePlace | None = None

    def __call__(self, step: Step) -> Step | None:
        """Capture the kernels of a step, and return what launches them; None if that fails."""
        if _failed_graphs():
            return None
        # What a step needs for its first run must not be allocated while it is captured.
        device = step().device
        # A thread's own device may be another one.
        with torch.cuda.device(device):
            if self._place is None:
                stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                pool = torch.cuda.graph_pool_handle()
                self._place = _CapturePlace(stream, pool)
            expected = _on_stream(step, self._place.stream)
            replay = _captured(step, self._place, device)
        if replay is None:
            return None
        if _agree(replay(), expected):
            return replay
        _warn("it computes other logits")
        return None


@cache
def _failed_graphs() -> list[torch.cuda.CUDAGraph]:
    """Return the graphs of this process whose capture failed: after the first, nothing is captured.

    They are kept, because to free what a capture has left half done fails too.
    """
    return []


def _on_stream(step: Step, stream: Any) -> Tensor:
    """Run a step on another stream, as the capture will."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        logits = step()
    current.wait_stream(stream)
    return logits


def _captured(
    step: Step,
    place: _CapturePlace,
    device: torch.device,
) -> Step | None:
    """Return what launches the kernels of a step; None if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream()
    try:
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(
            graph,
            pool=place.pool,
            stream=place.stream,
            capture_error_mode="thread_local",
        ):
            logits = step()
    except RuntimeError as error:
        _failed_graphs().append(graph)
        # The end of a capture that is no longer valid raises, before torch has gone back
        # to the stream and the memory from before it. What came first says why.
        torch.cuda.set_stream(current)
        _leave_pool(place, device)
        _warn(first_line(error.__context__ or error))
        return None

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return logits

    return replay


def _leave_pool(place: _CapturePlace, device: torch.device) -> None:
    """End that the device's memory comes from the pool, if it still does."""
    # Only torch's own names do this; they raise if the capture has ended after all.
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device.index, place.pool)
        torch._C._cuda_releasePool(device.index, place.pool)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type."""
    line, _, _ = str(error).partition("\n")
    return line or type(error).__name__


def _agree(found: Tensor, expected: Tensor) -> bool:
    largest = expected.abs().max()
    scale = float(largest.nan_to_num(nan=1.0, posinf=1.0))
    return torch.allclose(
        found,
        expected,
        rtol=0,
        atol=REPLAY_TOLERANCE * scale,
        equal_nan=True,
    )


def _warn(reason: str) -> None:
    logger.warning(
        "decoding: a step cannot be captured as a CUDA graph (%s); its kernels are launched one by one",
        reason,
    )
