"""A search for ranks on CPUs: the parts are those of the CPU's paths, and nothing of a GPU is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.cli.plan_time import timed_device
from evomesh.plan.device import Device, load_device
from evomesh.plan.device_file import write_device
from evomesh.plan.layout_choice import LayoutChoice, choice_of, with_choice
from evomesh.plan.layout_predictor import PartsPredictor
from evomesh.plan.memory import PeakMemory, peak_memory
from evomesh.plan.part_trace import ShardShape, trace_parts
from evomesh.plan.step_time import predict_step
from evomesh.plan.timeline import Kernel
from evomesh.plan.trace import TracedDevice

from .test_measured_rates import facts
from .test_step_time import config

CPU = Device.model_validate(facts())
SMALL = config(num_layers=3, dtype="float32")


def operators(device: TracedDevice) -> set[str]:
    shape = ShardShape("mtp", 1, 1, 1, False, 2, False)
    traced = trace_parts(SMALL, shape, device)
    events = [event for part in traced.events.values() for event in part]
    return {event.operator for event in events if isinstance(event, Kernel)}


def test_parts_of_a_cpu_have_its_operators() -> None:
    on_cpu = operators(TracedDevice.CPU)
    assert "_scaled_dot_product_flash_attention_for_cpu" in on_cpu
    only_cuda = operators(TracedDevice.CUDA) - on_cpu
    assert only_cuda, "the two take different paths"
    predictor = PartsPredictor(SMALL, 2, CPU)
    now = choice_of(SMALL, 2)
    assert predictor.step_time(now).seconds > 0


def layouts() -> list[LayoutChoice]:
    return [
        choice_of(config(parallel, num_layers=3, dtype="float32"), 2)
        for parallel in ({}, {"zero1": {"fsdp": True}}, {"tensor": {"size": 2}})
    ]


@pytest.mark.parametrize("choice", layouts(), ids=str)
def test_a_composed_layout_is_like_the_traced_one(choice: LayoutChoice) -> None:
    """The peak within 5 %, the step within 10 %: the update is computed from its bytes."""
    changed = with_choice(SMALL, choice)
    traced = peak_memory(changed, 2, 0, TracedDevice.CPU)
    predictor = PartsPredictor(SMALL, 2, CPU)
    found = predictor.peak(choice)
    assert found.total == pytest.approx(traced.total, rel=0.05)
    for kind in ("weights", "moments"):
        assert found.kinds[kind] == traced.kinds[kind]
    whole = predict_step(changed, 2, CPU)
    assert predictor.step_time(choice).seconds == pytest.approx(whole.seconds, rel=0.1)


def test_nothing_of_a_gpu_is_counted() -> None:
    choice = choice_of(SMALL, 2)
    peaks: list[PeakMemory] = [
        PartsPredictor(SMALL, 2, CPU).peak(choice),
        peak_memory(SMALL, 2, 0, TracedDevice.CPU),
    ]
    for peak in peaks:
        assert peak.outside == {}
        assert peak.needed == peak.total


def test_ranks_on_one_machine_share_its_memory(tmp_path: Path) -> None:
    file = tmp_path / "cpu.toml"
    machine = CPU.model_copy(update={"memory_gib": 16})
    write_device(machine, file, "A machine.")

    def memory(ranks: int, given: float | None = None) -> float:
        device = timed_device(str(file), given, ranks)
        assert device is not None
        # What predicts a step asks again, which changes nothing.
        return device.in_world(ranks).memory_gib

    assert [memory(ranks) for ranks in (1, 2, 4)] == [16, 8, 4]
    assert memory(4, given=6) == 6
    gpu = timed_device("H100", None, 8)
    assert gpu is not None and gpu.memory_gib == load_device("H100").memory_gib
