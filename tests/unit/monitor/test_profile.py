"""The table against what is known of the work: sums, and which operations ran in which region."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from evomesh.monitor.profile import (
    KINDS,
    SKIPPED,
    STEPS,
    WARM_UP,
    StepProfile,
    region,
    seconds_by_kind,
)
from tests.support.covers import covers


def profiled(*work: Any) -> tuple[dict[str, float], float]:
    found: list[tuple[dict[str, float], float]] = []
    plan = schedule(wait=0, warmup=1, active=1, repeat=1)
    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=plan,
        on_trace_ready=lambda profiler: found.append(
            seconds_by_kind(profiler.events())
        ),
    ) as profiler:
        for _ in range(3):
            for part in work:
                part()
            profiler.step()
    return found[0]


A = torch.randn(256, 256)


def product() -> None:
    torch.mm(A, A)


def attention() -> None:
    x = A.view(1, 4, 64, 256)
    torch.nn.functional.scaled_dot_product_attention(x, x, x)


def inside(kind: str) -> Any:
    def work() -> None:
        with region(kind):
            product()

    return work


def elsewhere() -> None:
    thread = threading.Thread(target=product)
    thread.start()
    thread.join()


class TestSecondsByKind:
    def test_kinds_add_up_to_the_step(self) -> None:
        seconds, total = profiled(
            product, attention, inside("loss"), torch.randn(500).sort
        )
        assert tuple(seconds) == KINDS
        assert sum(seconds.values()) == pytest.approx(total, rel=1e-9)
        assert (
            min(
                seconds[kind]
                for kind in ("matrix", "attention", "loss", "other", "idle")
            )
            > 0
        )

    @pytest.mark.parametrize(
        ("work", "kind"),
        [
            (product, "matrix"),
            (attention, "attention"),
            (inside("loss"), "loss"),
            (inside("optimizer"), "optimizer"),
        ],
    )
    def test_every_operation_counts_once(self, work: Any, kind: str) -> None:
        seconds, _ = profiled(work)
        assert {name for name, spent in seconds.items() if spent} - {
            "idle",
            "other",
        } == {kind}

    def test_work_of_another_thread_is_beside_the_step(self) -> None:
        assert profiled(elsewhere)[0]["matrix"] == 0


class TestStepProfile:
    @covers("promise:profiling")
    def test_writes_trace_and_table_once(self, tmp_path: Path) -> None:
        with StepProfile(tmp_path / "traces", "rank") as steps:
            for _ in range(SKIPPED + WARM_UP + STEPS + 5):
                product()
                steps.step()
        assert {path.name for path in (tmp_path / "traces").iterdir()} == {
            "rank.json",
            "rank.txt",
        }
        trace = json.loads((tmp_path / "traces/rank.json").read_text())
        assert (
            sum(
                event["name"] == "aten::mm"
                for event in trace["traceEvents"]
                if event["ph"] == "X"
            )
            == STEPS
        )
        rows = (tmp_path / "traces/rank.txt").read_text().splitlines()[1:]
        assert [row[:14].strip() for row in rows] == [*KINDS, "step"]

    def test_a_run_that_is_too_short_says_so(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with StepProfile(tmp_path, "rank") as steps:
            for _ in range(3):
                steps.step()
        assert "a profile needs 7 steps" in caplog.text
