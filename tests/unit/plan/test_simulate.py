"""Streams of one rank, by events whose times can be counted by hand."""

from __future__ import annotations

import pytest

from evomesh.parallel.traffic import CollectiveCall
from evomesh.plan.device import Device
from evomesh.plan.simulate import AxisPlacement, kernel_seconds, simulate
from evomesh.plan.timeline import (
    COMPUTE,
    Event,
    Kernel,
    KernelKind,
    Mark,
    Transfer,
    Wait,
)

DEVICE = Device.model_validate(
    {
        "name": "Test",
        "memory_gib": 1,
        "gpus_per_node": 8,
        "launch": 0,
        "rates": {"bfloat16": 1, "float16": 1, "float32": 1, "memory": 1},
        "links": {"node": 1, "network": 1, "node_latency": 0, "network_latency": 0},
        "efficiencies": {"matrix": 1, "attention": 0.5, "memory": 1, "link": 1},
    }
)
PLACES = {"dp": AxisPlacement(2, 1), "tp": AxisPlacement(2, 1)}
SECOND = 10**9  # bytes of one second of memory


def work(seconds: float, stream: str = COMPUTE) -> Kernel:
    return Kernel(stream, KernelKind.MEMORY, 0, int(seconds * SECOND))


def gather(
    seconds: float, mark: int, axis: str = "dp", after: tuple[int, ...] = ()
) -> Transfer:
    # Of two ranks' data one half travels.
    call = CollectiveCall("all_gather", axis, int(2 * seconds * SECOND))
    return Transfer(COMPUTE, call, mark, after)


def end(*events: Event) -> float:
    return simulate(events, DEVICE, "bfloat16", PLACES).end


def test_kernels_of_a_stream_follow_each_other() -> None:
    assert end(work(1), work(2)) == pytest.approx(3)


def test_a_transfer_runs_beside_kernels_until_it_is_waited_for() -> None:
    times = simulate(
        [gather(3, mark=1), work(1), Wait(COMPUTE, 1), work(1)],
        DEVICE,
        "bfloat16",
        PLACES,
    )
    assert times.end == pytest.approx(4)
    assert times.exposed == pytest.approx(2)
    assert times.busy["all_gather dp"] == pytest.approx(3)


def test_a_transfer_begins_when_its_stream_has_come_to_it() -> None:
    assert end(work(2), gather(1, mark=1), work(3), Wait(COMPUTE, 1)) == pytest.approx(
        5
    )
    assert end(work(2), gather(4, mark=1), work(3), Wait(COMPUTE, 1)) == pytest.approx(
        6
    )


def test_transfers_of_one_communicator_follow_each_other_and_those_of_two_overlap() -> (
    None
):
    one = [gather(2, 1), gather(2, 2), Wait(COMPUTE, 1), Wait(COMPUTE, 2)]
    two = [gather(2, 1), gather(2, 2, "tp"), Wait(COMPUTE, 1), Wait(COMPUTE, 2)]
    assert end(*one) == pytest.approx(4)
    assert end(*two) == pytest.approx(2)


def test_a_transfer_of_what_arrives_waits_for_it() -> None:
    chained = [gather(2, 1), gather(1, 2, "tp", after=(1,)), Wait(COMPUTE, 2)]
    assert end(*chained) == pytest.approx(3)


def test_streams_wait_for_marks() -> None:
    events = [work(2), Mark(COMPUTE, 1), Wait("side", 1), work(3, "side")]
    assert end(*events) == pytest.approx(5)
    assert end(*events[:2], work(3, "side")) == pytest.approx(3)


def test_a_product_takes_the_longer_of_its_operations_and_its_bytes() -> None:
    def seconds(kind: KernelKind, flops: int, nbytes: int, size: int = 128) -> float:
        kernel = Kernel(COMPUTE, kind, flops, nbytes, size)
        return kernel_seconds(kernel, DEVICE, "bfloat16")

    tera = 10**12
    assert seconds(KernelKind.MATRIX, 3 * tera, SECOND) == pytest.approx(3)
    assert seconds(KernelKind.MATRIX, tera, 2 * SECOND) == pytest.approx(2)
    assert seconds(KernelKind.ATTENTION, tera, 0) == pytest.approx(2)
    # 32 rows fill a quarter of what computes 128.
    assert seconds(KernelKind.MATRIX, tera, 0, 32) == pytest.approx(4)
