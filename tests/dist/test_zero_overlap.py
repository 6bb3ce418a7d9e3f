"""When the optimizer's messages travel, how many there are and what they hold; no option shows in a bit."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from evomesh.config.schema import AdamConfig, ZeroConfig
from evomesh.optim import buckets
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel import collectives
from evomesh.parallel.collectives import PendingCollective
from tests.support.covers import covers
from tests.support.pool import Pool, grid_of

pytestmark = covers("promise:buckets-and-overlap")

WIDTH = 8
MATRIX = WIDTH * WIDTH
VECTOR = WIDTH
MICRO_BATCHES = 3


class Model(nn.Module):
    """Three blocks and a head that is read outside its forward, as by a fused loss."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({str(i): nn.Linear(WIDTH, WIDTH) for i in range(3)})
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x

    def loss(self, x: Tensor) -> Tensor:
        return (self(x) @ self.head.weight.T).square().sum()


@dataclass
class Trace:
    """Events in order: ("launch" or "wait", operation, elements of the message) and marks of the training loop."""

    events: list[Any] = field(default_factory=list)
    most_bytes: int = 0
    _bytes: int = 0

    def mark(self, name: str) -> None:
        self.events.append(name)

    def launches(self, operation: str) -> list[int]:
        return [event[2] for event in self.events if event[:2] == ("launch", operation)]

    def between(self, first: str, last: str) -> list[Any]:
        start = self.events.index(first)
        return self.events[start + 1 : self.events.index(last, start)]


class TracedPending:
    def __init__(
        self, pending: PendingCollective, trace: Trace, name: str, message: Tensor
    ) -> None:
        self._pending, self._trace, self._name, self._message = (
            pending,
            trace,
            name,
            message,
        )
        trace.events.append(("launch", name, message.numel()))
        trace._bytes += message.nbytes
        trace.most_bytes = max(trace.most_bytes, trace._bytes)

    def wait(self) -> Tensor:
        self._trace.events.append(("wait", self._name, self._message.numel()))
        self._trace._bytes -= self._message.nbytes
        return self._pending.wait()


@contextmanager
def traced() -> Iterator[Trace]:
    trace = Trace()

    def wrap(name: str) -> Callable[..., Any]:
        function = getattr(buckets, name)

        def call(message: Tensor, *args: Any) -> Any:
            return TracedPending(
                function(message, *args), trace, name.removeprefix("launch_"), message
            )

        return call

    names = ("launch_reduce_scatter", "launch_all_reduce", "launch_all_gather")
    with mock.patch.multiple(buckets, **{name: wrap(name) for name in names}):
        yield trace


def train(
    dtype: torch.dtype,
    zero: dict[str, Any],
    layout: dict[str, Any],
    trace: Trace | None = None,
    steps: int = 3,
) -> tuple[Model, ZeroOptimizer]:
    grid, trace = grid_of(**layout), trace or Trace()
    model = Model(dtype)
    optimizer = ZeroOptimizer(
        model.named_parameters(),
        AdamConfig(),
        ZeroConfig.model_validate(zero),
        grid,
        model,
    )
    for layer in model.layers.values():
        layer.register_forward_hook(lambda *_: trace.mark("block"))
    for step in range(steps):
        optimizer.expect_micro_batches(MICRO_BATCHES)
        for index in range(MICRO_BATCHES):
            generator = torch.Generator().manual_seed(
                step * 100 + index * 10 + grid.dp.rank
            )
            trace.mark("forward")
            loss = model.loss(torch.randn(5, WIDTH, generator=generator).to(dtype))
            trace.mark("last backward" if index == MICRO_BATCHES - 1 else "backward")
            loss.backward()  # type: ignore[no-untyped-call]
        trace.mark("step")
        optimizer.step(1e-2, 0.9, 1.0)
        trace.mark("end")
        optimizer.zero_grad()
    return model, optimizer


def bits(
    rank: int, dtype: torch.dtype, zero: dict[str, Any], layout: dict[str, Any]
) -> dict[str, Tensor]:
    model, optimizer = train(dtype, zero, layout)
    state = optimizer.state_tensors()  # waits
    return {
        name: tensor.detach().clone()
        for name, tensor in (dict(model.named_parameters()) | state).items()
    }


OPTIONS: list[dict[str, Any]] = [
    {"overlap_sync_grad": True},
    {"overlap_sync_grad": True, "reduce_bucket_size": 100},
    {"overlap_sync_param": True},
    {
        "overlap_sync_param": True,
        "use_split_tensor_optim": True,
        "all_gather_size": 150,
    },
    {"overlap_sync_grad": True, "overlap_sync_param": True, "reduce_bucket_size": 1},
]


@pytest.mark.parametrize("layout", [{"zero1": 4}, {"zero1": 2}, {"zero1": 1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_overlap_changes_no_bit(
    pool: Pool, layout: dict[str, Any], dtype: torch.dtype
) -> None:
    plain = pool.run(bits, dtype, {}, layout)
    assert all(torch.isfinite(tensor).all() for tensor in plain[0].values())
    for zero in OPTIONS:
        for ours, theirs in zip(
            pool.run(bits, dtype, zero, layout), plain, strict=True
        ):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), zero


def trace_one_step(rank: int, zero: dict[str, Any], layout: dict[str, Any]) -> Trace:
    with traced() as trace:
        _, optimizer = train(torch.float32, zero, layout, trace, steps=2)
        optimizer.wait_for_parameters()
    return trace


def test_without_overlap_gradients_travel_after_backward_one_bucket_at_a_time(
    pool: Pool,
) -> None:
    trace = pool.run(trace_one_step, {"reduce_bucket_size": 2 * MATRIX}, {"zero1": 4})[
        0
    ]
    assert trace.between("last backward", "step") == []
    step = trace.between("step", "end")
    # backward order: head and the last block's matrix, then the other two; the vectors stay whole
    assert [e[1:] for e in step if e[0] == "launch" and e[1] == "reduce_scatter"] == [
        ("reduce_scatter", 2 * MATRIX)
    ] * 2
    assert [e[1:] for e in step if e[0] == "launch" and e[1] == "all_reduce"] == [
        ("all_reduce", 3 * VECTOR)
    ]
    assert [e[0] for e in step] == ["launch", "wait"] * (len(step) // 2)
    assert trace.most_bytes == 2 * MATRIX * 4


@covers(
    "hybrid_zero_optimizer.overlap_sync_grad",
    "hybrid_zero_optimizer.zero_overlap_communication",
)
def test_with_overlap_each_bucket_leaves_when_the_last_micro_batch_has_filled_it(
    pool: Pool,
) -> None:
    zero = {"reduce_bucket_size": MATRIX, "overlap_sync_grad": True}
    traces = pool.run(trace_one_step, zero, {"zero1": 4})
    trace = traces[0]
    assert trace.between("backward", "forward") == []
    expected = [("launch", "reduce_scatter", MATRIX)] * 2  # head, last block
    assert trace.between("last backward", "step")[:2] == expected
    # Four matrices, and the vectors together.
    assert len(trace.between("last backward", "step")) == 5
    again = trace.events[trace.events.index("end") :]
    assert again[again.index("last backward") : again.index("step")] == [
        "last backward",
        *trace.between("last backward", "step"),
    ]
    assert all(
        event[0] == "wait"
        for event in trace.between("step", "end")
        if event[1] != "all_gather"
    )
    assert trace.most_bytes == (4 * MATRIX + 3 * VECTOR) * 4
    assert all(other.events == trace.events for other in traces)


@covers("hybrid_zero_optimizer.reduce_bucket_size")
@pytest.mark.parametrize("size", [1, MATRIX, 3 * MATRIX, 10**9])
def test_reduce_bucket_size_bounds_the_buckets(pool: Pool, size: int) -> None:
    trace = pool.run(trace_one_step, {"reduce_bucket_size": size}, {"zero1": 4})[0]
    per_bucket = min(max(size // MATRIX, 1), 4)
    full, rest = divmod(4, per_bucket)
    assert (
        trace.launches("reduce_scatter")
        == ([per_bucket * MATRIX] * full + [rest * MATRIX] * bool(rest)) * 2
    )


def test_replicas_sum_only_the_rows_they_own(pool: Pool) -> None:
    trace = pool.run(trace_one_step, {}, {"zero1": 2})[0]
    assert trace.launches("reduce_scatter") == [4 * MATRIX] * 2
    # the vectors over zero and then replica, the matrices' own halves over replica
    assert sorted(trace.launches("all_reduce")) == sorted(
        [3 * VECTOR, 3 * VECTOR, 4 * MATRIX // 2] * 2
    )


@covers("hybrid_zero_optimizer.all_gather_size")
def test_parameters_are_gathered_alone_or_up_to_all_gather_size(pool: Pool) -> None:
    own = MATRIX // 4
    for zero, expected in (
        ({"all_gather_size": 10**9}, [own] * 4),
        ({"use_split_tensor_optim": True, "all_gather_size": 10**9}, [4 * own]),
        (
            {"use_split_tensor_optim": True, "all_gather_size": 3 * MATRIX},
            [3 * own, own],
        ),
    ):
        assert (
            pool.run(trace_one_step, zero, {"zero1": 4})[0].launches("all_gather")
            == expected * 2
        )


@covers("hybrid_zero_optimizer.overlap_sync_param")
def test_with_overlap_each_block_awaits_its_own_parameters_in_forward(
    pool: Pool,
) -> None:
    trace = pool.run(trace_one_step, {"overlap_sync_param": True}, {"zero1": 4})[0]
    gathers = [
        event for event in trace.between("step", "end") if event[1] == "all_gather"
    ]
    assert [event[0] for event in gathers] == ["launch"] * 4
    second = trace.events[trace.events.index("end") + 1 :]
    wait = ("wait", "all_gather", MATRIX // 4)
    # the head, which has no forward, before all; then each block before it runs
    assert second[: second.index("last backward")][:8] == [
        "forward",
        wait,
        wait,
        "block",
        wait,
        "block",
        wait,
        "block",
    ]
    plain = pool.run(trace_one_step, {}, {"zero1": 4})[0]
    assert [e[0] for e in plain.between("step", "end") if e[1] == "all_gather"] == [
        "launch",
        "wait",
    ] * 4


def chunks_in_a_list(rank: int) -> list[str]:
    """As in an interleaved pipeline: a rank's chunks are a list, which is never called itself."""
    grid = grid_of(zero1=4)
    with traced() as trace:
        chunks = nn.ModuleList([Model(torch.float32), Model(torch.float32)])
        zero = ZeroConfig(overlap_sync_param=True)
        optimizer = ZeroOptimizer(
            chunks.named_parameters(), AdamConfig(), zero, grid, chunks
        )
        optimizer.step(1e-2, 0.9, 1.0)
        for chunk in chunks:
            chunk.loss(torch.ones(1, WIDTH))
            trace.mark("chunk")
    return [
        event if isinstance(event, str) else event[0]
        for event in trace.events
        if event[1] != "all_reduce"
    ]


def test_every_chunk_of_a_pipeline_stage_awaits_its_own_parameters(pool: Pool) -> None:
    events = pool.run(chunks_in_a_list)[0]
    assert events[-10:] == [*["wait"] * 4, "chunk", *["wait"] * 4, "chunk"]


def storages() -> dict[int, torch.UntypedStorage]:
    """Return the storages, by address, of all tensors that Python holds.

    Not those of the meta device, which other tests of a rank may have left: they take
    no memory and share address 0.
    """
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) not in (Tensor, nn.Parameter):
            continue
        # A gradient is no Python object by itself.
        gradient = thing.grad if thing.is_leaf else None
        for tensor in (thing, gradient):
            if tensor is not None and not tensor.is_meta:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage
    return found


class MessageWatch:
    """Wraps collectives to know when gloo has let go of their messages.

    A thread of gloo completes a collective and drops its tensors a moment after
    ``wait`` has returned on the caller's thread: on a busy machine a count of live
    tensors would see messages that the optimizer no longer holds.
    """

    def __init__(self) -> None:
        self._views: list[weakref.ref[Tensor]] = []

    def wrap(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``collective``, called with new views of its output and input.

        Nothing but the collective itself holds these views: they live exactly as long
        as gloo holds the message.
        """

        def call(output: Tensor, source: Tensor, **options: Any) -> Any:
            views = output.view_as(output), source.view_as(source)
            self._views += map(weakref.ref, views)
            return collective(*views, **options)

        return call

    def wait(self) -> None:
        """Wait until no message is held; one that the optimizer keeps is counted."""
        deadline = time.monotonic() + 5
        while any(view() is not None for view in self._views):
            if time.monotonic() > deadline:
                return
            os.sched_yield()


def memory(
    rank: int, dtype: torch.dtype, layout: dict[str, Any], zero: dict[str, Any]
) -> tuple[int, int]:
    """Return the new bytes of tensors when gradients are complete, and after a step."""
    grid = grid_of(**layout)
    # Held, so that no new tensor gets the address of one that other tests left.
    before = storages()
    messages = MessageWatch()

    def new_bytes() -> int:
        messages.wait()
        now = storages()
        return sum(now[address].nbytes() for address in now.keys() - before.keys())

    exchange = messages.wrap(dist.all_to_all_single)
    gather = messages.wrap(collectives.gather_single)
    with (
        mock.patch.object(dist, "all_to_all_single", exchange),
        mock.patch.object(collectives, "gather_single", gather),
    ):
        model = nn.Linear(400, 160, dtype=dtype)
        optimizer = ZeroOptimizer(
            model.named_parameters(),
            AdamConfig(),
            ZeroConfig.model_validate(zero),
            grid,
        )
        model(torch.ones(1, 400, dtype=dtype)).sum().backward()
        with_gradients = new_bytes()
        optimizer.step(1e-2, 0.9, 1.0)
        optimizer.zero_grad()
        return with_gradients, new_bytes()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_the_formula_says(
    pool: Pool, dtype: torch.dtype, size: int
) -> None:
    """parameter, gradient, and (master and two moments) / zero of each matrix; vectors undivided."""
    matrix, vector, half = 400 * 160, 160, dtype == torch.bfloat16
    parameters, gradients = (matrix + vector) * dtype.itemsize, (matrix + vector) * 4
    state = (12 if half else 8) * (matrix // size + vector)
    peak = parameters + gradients + state
    rest = peak if half else peak - gradients  # the float32 sums of half gradients stay
    steps = 2 * 4  # one scalar a parameter
    for measured in pool.run(memory, dtype, {"zero1": size}, {}):
        for found, formula in zip(measured, (peak, rest), strict=True):
            # The input, its gradient hook's scraps.
            assert formula + steps <= found <= formula + steps + 2000
