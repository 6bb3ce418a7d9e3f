"""What is a spike, against numpy; what a run decides about it, and what a resume takes over."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evomesh.config.optimizer import EmaConfig, OptimizerConfig
from evomesh.config.schema import AdamConfig, SpikeConfig, ZeroConfig
from evomesh.monitor.spikes import SPIKES_FILE, SpikeLog, left_out_steps, read_spikes
from evomesh.optim.clip import UpdateLimits
from evomesh.optim.zero import ZeroOptimizer
from evomesh.train.spikes import SpikeDetector, SpikeWatch
from tests.support.covers import covers
from tests.support.tolerances import assert_equal_bits

LOSSES = [3.0, 2.9, 2.95, 2.8, 2.9, 2.7, 2.75, 2.6, 9.0, 2.6, 2.65, 2.5, math.nan, 2.5, 2.45, 2.5]  # fmt: skip


def spikes_of(
    values: list[float], config: SpikeConfig, resumes: bool = False
) -> list[int]:
    """Steps that are spikes of the loss, where every finite step is an update."""
    detector = SpikeDetector(config)
    found = []
    for step, loss in enumerate(values):
        if resumes:
            watch = SpikeWatch(config)
            watch.detector.history.extend(detector.history)
            again = SpikeWatch(config)
            again.load_state(json.loads(json.dumps(watch.state())))
            detector = again.detector
        if detector.judge(step, loss, 1.0) is not None:
            found.append(step)
        detector.add(loss, 1.0)
    return found


def by_numpy(
    values: list[float], zscore: float, window: int, min_steps: int
) -> list[int]:
    """The same from the definition."""
    found = []
    for step, loss in enumerate(values):
        before = np.array(values[:step])
        before = before[np.isfinite(before)][-window:]
        is_spike = not math.isfinite(loss)
        if len(before) >= min(min_steps, window) and not is_spike:
            center = np.median(before)
            spread = 1.4826 * np.median(np.abs(before - center))
            is_spike = loss > center + zscore * max(spread, 0.01 * abs(center))
        if is_spike:
            found.append(step)
    return found


@covers("spike.zscore", "spike.window", "spike.min_steps")
@pytest.mark.parametrize(
    ("zscore", "window", "min_steps"),
    [(10.0, 128, 4), (10.0, 128, 9), (2.0, 4, 3), (0.5, 5, 3), (3.0, 3, 100)],
)
def test_equals_the_definition(zscore: float, window: int, min_steps: int) -> None:
    config = SpikeConfig(zscore=zscore, window=window, min_steps=min_steps)
    expected = by_numpy(LOSSES, zscore, window, min_steps)
    assert spikes_of(LOSSES, config) == expected
    assert spikes_of(LOSSES, config, resumes=True) == expected
    assert 12 in expected  # NaN is one from the first step on


def test_the_limit_is_in_robust_standard_deviations() -> None:
    detector = SpikeDetector(SpikeConfig(zscore=4.0, window=7, min_steps=3))
    for loss, norm in zip([9, 1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 1, 1, 1, 1], strict=True):  # fmt: skip
        detector.add(loss, norm)
    limits = detector.limits()
    assert limits.loss == pytest.approx(4 + 4.0 * 1.4826 * 2)  # of 1 to 7
    assert limits.norm == pytest.approx(1 + 4.0 * 0.01)
    verdict = detector.judge(8, 17.0, 1.0)
    assert verdict is not None and verdict.what == ("loss",)
    assert verdict.zscores["loss"] == pytest.approx(13 / (1.4826 * 2))


def test_noise_is_no_spike_and_a_falling_loss_neither() -> None:
    draw = np.random.default_rng(0)
    values = (2 + 8 * np.exp(-np.arange(2000) / 200)) * (1 + 0.05 * draw.normal(size=2000))  # fmt: skip
    assert spikes_of(values.tolist(), SpikeConfig()) == []
    values[700] *= 2.5
    assert spikes_of(values.tolist(), SpikeConfig()) == [700]


@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.parametrize("loss", [1.0, 5.0, 5.1, math.inf, math.nan])
@pytest.mark.parametrize("norm", [1.0, 2.0, 2.1, math.inf, math.nan])
def test_device_and_host_decide_alike(loss: float, norm: float, overflows: bool) -> None:  # fmt: skip
    config = SpikeConfig(policy="skip", zscore=100.0, min_steps=3)
    detector = SpikeDetector(config, overflows)
    for _ in range(3):
        detector.add(2.5, 1.0)
    limits = detector.limits()
    assert (limits.loss, limits.norm) == (5.0, 2.0)
    on_device = limits.are_exceeded(
        torch.tensor(norm, dtype=torch.float64), torch.tensor(loss, dtype=torch.float64)
    )
    verdict = detector.judge(7, loss, norm)
    assert bool(on_device) == (verdict is not None)
    # An overflow of float16's loss scale is the scale's matter.
    if overflows and not math.isfinite(norm) and loss == 1.0:
        assert verdict is None


@covers("spike.policy")
@pytest.mark.parametrize(
    ("policy", "actions"),
    [
        ("off", []),
        ("warn", ["warned", "warned"]),
        ("stop", ["stopped", "stopped"]),
        ("skip", ["skipped", "skipped"]),
        ("rollback_and_skip", ["rolled back", "stopped"]),
    ],
)
def test_actions_and_what_a_resume_takes_over(
    tmp_path: Path, policy: Any, actions: list[str]
) -> None:
    config = SpikeConfig(policy=policy, min_steps=3, max_rollbacks=1, skip_before=2)
    watch = SpikeWatch(config)
    watch.open_log(tmp_path, is_main=True, continues=False)
    taken = []
    for step, loss in enumerate([2.0, 2.1, 2.05, 2.0, 30.0, 2.0, 40.0]):
        holds_back = watch.limits() is not None and loss > 20
        finding = watch.after_step(step, loss, 1.0, applied=not holds_back)
        if finding is not None:
            taken.append(finding.action)
    assert taken == actions
    rows = read_spikes(tmp_path)
    assert [row["action"] for row in rows] == actions
    left_out = {"skip": {4, 6}, "rollback_and_skip": {2, 3, 4}}.get(policy, set())
    assert left_out_steps(rows) == watch.left_out == left_out
    # From a checkpoint before the spikes, and the lines in the run folder.
    resumed = SpikeWatch(config, rows=rows)
    resumed.load_state({"history": [[2.0, 1.0]], "left_out": [], "rollbacks": 0})
    assert (resumed.left_out, resumed.rollbacks) == (watch.left_out, watch.rollbacks)


@covers("spike.max_rollbacks", "spike.skip_before")
def test_rollbacks_are_bounded_and_take_steps_before_along() -> None:
    config = SpikeConfig(
        policy="rollback_and_skip", max_rollbacks=2, skip_before=1, min_steps=3
    )
    watch = SpikeWatch(config)
    actions = []
    for step in (0, 5, 9):
        finding = watch.after_step(step, math.nan, 1.0, applied=False)
        assert finding is not None
        actions.append(finding.action)
    assert actions == ["rolled back", "rolled back", "stopped"]
    assert watch.left_out == {0, 4, 5}


def test_lines_of_an_earlier_run_in_the_folder_do_not_count(tmp_path: Path) -> None:
    log = SpikeLog(tmp_path / SPIKES_FILE)
    log.begin()
    assert not (tmp_path / SPIKES_FILE).exists()
    log.write({"event": "spike", "step": 3, "loss": math.nan, "left_out": [3]})
    with (tmp_path / SPIKES_FILE).open("a") as file:
        file.write('{"event": "spi')  # killed
    log.write({"event": "spike", "step": 5, "left_out": [5]})
    assert left_out_steps(read_spikes(tmp_path)) == {3, 5}
    assert read_spikes(tmp_path)[0]["loss"] == "NaN"
    log.begin()
    assert read_spikes(tmp_path) == []
    log.write({"event": "spike", "step": 9, "left_out": [9, "x"]})
    assert left_out_steps(read_spikes(tmp_path)) == {9}


@pytest.mark.parametrize("rule", ["adamw", "lion", "muon", "schedule_free"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_beyond_its_limits_leaves_nothing_behind(
    rule: Any, dtype: torch.dtype
) -> None:
    """Weights, masters, moments, counters and the moving average are those of a run without the step."""
    results = []
    for steps in ([0, 1, 2, 3], [0, 2, 3]):  # the average is due in step 1
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(6, 4).to(dtype))
        config = OptimizerConfig(type=rule, ema=EmaConfig(decay=0.75, every=2))
        optimizer = ZeroOptimizer(
            [("layers.0.w.weight", weight)], AdamConfig(), ZeroConfig(), config=config
        )
        for step in steps:
            gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            factor = 1e3 if step == 1 else 1.0
            (weight * gradient.to(dtype) * factor).sum().backward()
            sums = torch.tensor([1.0, 7.0], dtype=torch.float64)
            limits = UpdateLimits(norm=100.0, loss=2.0)
            optimizer.step(0.1, 0.95, 1.0, sums=sums, limits=limits)
            if step == 1:
                optimizer.forget_step()
            optimizer.zero_grad()
        tensors = {k: v.clone() for k, v in optimizer.state_tensors().items()}
        results.append((tensors | {"w": weight.detach().clone()}, optimizer.state()))
    (with_it, numbers), (without, expected) = results
    assert numbers == expected
    assert with_it.keys() == without.keys()
    for name, tensor in without.items():
        assert_equal_bits(with_it[name], tensor)
