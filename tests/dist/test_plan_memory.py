"""The predicted memory of a step against the tensors of real ones; benchmarks/plan_memory.py has all layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evomesh.plan.step_memory import trace_step_memory
from evomesh.plan.trace import TracedDevice
from tests.support.memory_layouts import HELD, LAYOUTS, measure_step
from tests.support.pool import Pool

CHEAP = [
    "zero1, overlap, small buckets",
    "isp, overlap, float32",
    "1f1b",
    "fsdp",
]


@pytest.mark.parametrize("name", CHEAP)
def test_a_step_holds_what_is_predicted(pool: Pool, name: str) -> None:
    (found,) = [one for one in LAYOUTS if one.name == name]
    layout = replace(found, model=found.model | {"num_layers": 2})
    measured = pool.run(measure_step, layout, ranks=layout.ranks)[0]
    timeline = trace_step_memory(layout.config, layout.ranks, 0, TracedDevice.CPU)
    predicted = timeline.at_peak
    assert sum(predicted.values()) == pytest.approx(sum(measured.values()), rel=0.03)
    for kind in HELD:
        assert predicted.get(kind, 0) == pytest.approx(measured.get(kind, 0), rel=0.03)
