from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from evomesh.config.schema import ModelConfig
from evomesh.monitor.metrics import MetricsFile, StepRecord, model_tflops
from tests.support.covers import covers

# The first step of the documented 7B run on 8 GPUs.
RECORD = StepRecord(
    tflops=63.27010355651958,
    step=0,
    loss=11.634403228759766,
    tgs=1424.6423,
    lr=4.0000000000000003e-07,
    loss_scale=65536.0,
    grad_norm=63.672620777841004,
    micro_num=4,
    num_consumed_tokens=131072,
    inf_nan_skip_batches=0,
    num_samples_in_batch=19,
    largest_length=2048,
    largest_batch=5,
    smallest_batch=4,
    adam_beta2=0.95,
    fwd_bwd_time=6.4791,
)
DOCUMENTED = (
    "tflops=63.27010355651958,step=0,loss=11.634403228759766,tgs (tokens/gpu/second)=1424.64,lr=4.0000000000000003e-07,"
    "loss_scale=65536.0,grad_norm=63.672620777841004,micro_num=4,num_consumed_tokens=131072,inf_nan_skip_batches=0,"
    "num_samples_in_batch=19,largest_length=2048,largest_batch=5,smallest_batch=4,adam_beta2=0.95,fwd_bwd_time=6.48"
)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@covers("promise:log-line")
def test_line_is_the_documented_one() -> None:
    assert RECORD.line() == DOCUMENTED


def test_extras_follow_and_validation_has_its_own_line() -> None:
    record = replace(RECORD, extras={"acc": 0.5, "loss/en": 2.0, "val/en_loss": 3.0})
    assert record.line() == DOCUMENTED + ",acc=0.5,loss/en=2.0"
    assert record.values()["val/en_loss"] == 3.0


@covers("promise:tflops")
def test_tflops_of_the_documented_step() -> None:
    seconds = 16384 / 1424.64
    tflops = model_tflops(
        seconds=seconds,
        sequences=64,
        seq_len=2048,
        hidden_size=4096,
        num_layers=32,
        vocab_size=103168,
        mlp_ratio=8 / 3,
        recompute=False,
        world_size=8,
    )
    assert seconds == pytest.approx(11.50, abs=0.005)
    assert tflops == pytest.approx(63.270, abs=0.0005)


@covers("model.sliding_window")
def test_a_window_leaves_out_the_scores_beyond_it() -> None:
    """By hand: 3 passes, 2 layers, 4 operations a score, 10 tokens, each 10 and then 4 scores over a width of 8."""
    model = ModelConfig(
        num_layers=2,
        sliding_window=4,
        layer_types=("full_attention", "sliding_attention"),
    )
    assert model.mean_attention_span(10) == 7.0
    assert model.mean_attention_span(3) == 3.0
    sizes = dict(
        seconds=1e-12,
        sequences=1,
        seq_len=10,
        hidden_size=8,
        num_layers=2,
        vocab_size=1,
        mlp_ratio=1.0,
        recompute=False,
        world_size=1,
    )
    less = model_tflops(**sizes) - model_tflops(
        **sizes, attention_span=model.mean_attention_span(10)
    )
    assert less == pytest.approx(3 * 4 * 10 * 6 * 8)


def test_values_read_back_exactly(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "run" / "metrics.jsonl") as metrics:
        metrics.write(RECORD)
        metrics.write(
            replace(
                RECORD,
                step=1,
                grad_norm=math.nan,
                loss=math.inf,
                extras={"acc/代码": 1 / 3},
            )
        )
        first, second = [
            json.loads(line)
            for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        ]
    assert first == RECORD.values()
    assert list(first) == list(RECORD.values())
    assert (second["grad_norm"], second["loss"], second["acc/代码"]) == (
        "NaN",
        "Infinity",
        1 / 3,
    )
    assert math.isnan(float(second["grad_norm"]))


def test_a_resumed_run_writes_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        for step in range(5):
            metrics.write(replace(RECORD, step=step))
    with MetricsFile(path, step=3) as metrics:
        assert steps(path) == [0, 1, 2]
        metrics.write(replace(RECORD, step=3))
    assert steps(path) == [0, 1, 2, 3]


def test_a_line_torn_by_a_crash_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write(RECORD)
    with path.open("ab") as file:
        file.write(b'{"tflops": 1.0, "st')
    with MetricsFile(path, step=1) as metrics:
        metrics.write(replace(RECORD, step=1))
    assert steps(path) == [0, 1]


def test_a_new_run_in_an_old_folder_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        with MetricsFile(path) as metrics:
            metrics.write(RECORD)
    assert steps(path) == [0]
