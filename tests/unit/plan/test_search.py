"""The search for layouts: what it tries, that small models predict large ones, and that the best is the best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import evomesh.plan.search
from evomesh.cli.app import app
from evomesh.cli.plan_time import write_layout
from evomesh.config.layout import axis_sizes
from evomesh.config.loader import load_config
from evomesh.config.schema import Config
from evomesh.config.size import tokens_per_step
from evomesh.plan.device import Device, load_device
from evomesh.plan.layout_choice import (
    LayoutChoice,
    base_choices,
    choice_of,
    difference,
    is_allowed,
    refinements,
    single_changes,
    with_choice,
)
from evomesh.plan.memory import GIB, PeakMemory
from evomesh.plan.search import LayoutPrediction, LayoutPredictor, search
from evomesh.plan.step_time import StepTime

from .test_step_time import config

DEVICE = load_device("A100")


def small_device(gib: float) -> Device:
    return DEVICE.model_copy(update={"memory_gib": gib})


def test_every_layout_is_allowed_once_and_has_the_tokens_of_the_config() -> None:
    start = config()
    tokens = tokens_per_step(start, 8)
    choices = list(base_choices(start, 8, gpus_per_node=4))
    assert len(set(choices)) == len(choices) > 50
    assert choice_of(start, 8) in choices
    for choice in choices:
        changed = with_choice(start, choice)
        sizes = axis_sizes(changed.parallel, 8)
        assert tokens_per_step(changed, sizes.dp) == tokens
        assert is_allowed(start, choice, 8)
        assert choice_of(changed, 8) == choice
        assert max(choice.tensor, choice.weight) <= 4
    modes = {choice.mode for choice in choices}
    assert modes == {"mtp", "msp", "fsp", "isp"}
    assert {choice.pipeline for choice in choices} == {1, 2, 4}


def test_layouts_that_would_change_the_tokens_of_a_step_are_left_out() -> None:
    """12 packs in a step: 8 data-parallel ranks cannot share them evenly."""
    start = config({"tensor": {"size": 2, "mode": "mtp"}})
    data = start.data.model_copy(update={"micro_num": 3})
    start = start.model_copy(update={"data": data})
    tokens = tokens_per_step(start, 4)
    sizes = set()
    for choice in base_choices(start, 8, gpus_per_node=8):
        dp = axis_sizes(with_choice(start, choice).parallel, 8).dp
        assert tokens_per_step(with_choice(start, choice), dp) == tokens
        sizes.add(dp)
    assert sizes == {1, 2, 4}


def test_neighbors_keep_the_tokens_of_a_step() -> None:
    start = config({"pipeline": {"size": 2}})
    now = choice_of(start, 4)
    neighbors = list(refinements(start, now, 4))
    assert {choice.chunks for choice in neighbors} == {1, 2}
    for choice in neighbors:
        assert choice.micro_bsz * choice.micro_num == now.micro_bsz * now.micro_num


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"zero1": {"fsdp": True}},
        {"tensor": {"size": 2, "mode": "msp"}},
        {"pipeline": {"size": 2}},
    ],
)
def test_models_of_one_and_two_layers_predict_a_deep_one(
    parallel: dict[str, Any],
) -> None:
    deep = config(parallel, num_layers=12, hidden_size=512)
    predictor = LayoutPredictor(deep, 4, DEVICE)
    choice = choice_of(deep, 4)
    found = predictor.predict(choice)
    whole = predictor.predict_whole(choice)
    assert found.time is not None and whole.time is not None
    assert found.peak.total == pytest.approx(whole.peak.total, rel=0.01)
    assert found.time.seconds == pytest.approx(whole.time.seconds, rel=0.05)


class CountedPredictor(LayoutPredictor):
    """Predicts by formulas instead of traces; its screening is off by up to a tenth."""

    def predict(self, choice: LayoutChoice) -> LayoutPrediction:
        exact = self.predict_whole(choice)
        if exact.time is None:
            return exact
        error = 1 + (hash(str(choice.tensor)) % 5 - 2) / 50
        time = replace(exact.time, seconds=exact.time.seconds * error)
        return replace(exact, time=time)

    def predict_whole(self, choice: LayoutChoice) -> LayoutPrediction:
        shards = choice.tensor * choice.weight * choice.pipeline
        if choice.fsdp:
            shards *= choice.zero
        kept = 3 * choice.micro_bsz * (1 - 0.8 * choice.recompute) / choice.tensor
        gib = 16 / shards + kept
        peak = PeakMemory({"weights": int(gib * GIB)}, "loss")
        if peak.missing(self.capacity) > 0:
            return LayoutPrediction(choice, peak, None)
        seconds = 1 + choice.recompute / 3 + 0.2 * choice.tensor + 0.3 * choice.fsdp
        seconds += (choice.pipeline - 1) / choice.micro_num / choice.chunks
        seconds += 0.5 / choice.micro_bsz
        tokens = choice.micro_bsz * choice.micro_num
        time = StepTime(seconds, tokens, 1, {}, 0.0, 0.0, 0.0)
        return LayoutPrediction(choice, peak, time)


def test_the_best_layout_is_that_of_brute_force() -> None:
    start = config()
    predictor = CountedPredictor(start, 8, small_device(14))
    result = search(predictor)
    best = result.fitting[0]

    # All layouts, their neighbors and those with recomputing: none is faster.
    first = list(base_choices(start, 8, DEVICE.gpus_per_node))
    first += [replace(choice, recompute=1.0) for choice in first]
    everything = set(first)
    for choice in first:
        everything.update(refinements(start, choice, 8))
    fastest = min(
        predictor.predict_whole(choice).seconds_per_token() for choice in everything
    )
    assert best.seconds_per_token() == pytest.approx(fastest)
    speeds = [found.seconds_per_token() for found in result.fitting[:10]]
    assert speeds == sorted(speeds)
    choices = [found.choice for found in result.predictions]
    assert len(set(choices)) == len(choices)


def test_where_nothing_fits_the_nearest_come_first() -> None:
    predictor = CountedPredictor(config(), 8, small_device(2.1))
    result = search(predictor)
    assert result.fitting == []
    sizes = [found.peak.total for found in result.predictions]
    assert sizes == sorted(sizes)
    assert result.predictions[0].choice.recompute == 1.0


def test_single_changes_save_memory() -> None:
    start = config(vocab_size=64_000)
    now = choice_of(start, 2)
    changes = {difference(now, choice) for choice in single_changes(start, now, 2)}
    assert "model.checkpoint=0.5" in changes
    assert "parallel.tensor.size=2" in changes
    assert "parallel.zero1.fsdp=True" in changes


def written(tmp_path: Path, choice: LayoutChoice) -> Config:
    base = tmp_path / "base.py"
    base.write_text(
        'model = dict(model_type="LLAMA2", num_layers=4, hidden_size=256, num_attention_heads=4, vocab_size=4000)\n'
        "data = dict(seq_len=2048, micro_bsz=1, micro_num=4, total_steps=10)\n"
        "parallel = dict(zero1=-1, tensor=1, pipeline=1)\n"
    )
    out = tmp_path / "out.py"
    write_layout(choice, str(base), out)
    return load_config(str(out), []).config


@pytest.mark.parametrize("number", [0, 9, 23, 31])
def test_a_written_config_has_the_layout(tmp_path: Path, number: int) -> None:
    choices = list(base_choices(config(), 8, 4))
    choice = choices[number]
    loaded = written(tmp_path, choice)
    assert choice_of(loaded, 8) == choice
    assert loaded.data.total_steps == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--search"], "--device too"),
        (["--price", "2"], "--device too"),
        (["--device", "A100", "--write", "x.py"], "--search too"),
        (["--device", "T4"], "no device T4"),
    ],
)
def test_options_that_need_another_say_so(options: list[str], words: str) -> None:
    path = str(Path(__file__).parents[3] / "configs" / "demo.py")
    result = CliRunner().invoke(app, ["plan", path, "--gpus", "2", *options])
    assert words in str(result.exception or result.output)


@pytest.mark.slow
def test_a_search_prints_the_best_and_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evomesh.plan.search, "_FINALISTS", 1)
    base = tmp_path / "base.py"
    base.write_text(
        'model = dict(model_type="LLAMA2", num_layers=2, hidden_size=256, num_attention_heads=4, vocab_size=4000)\n'
        "data = dict(seq_len=2048, micro_bsz=1, micro_num=4, total_steps=10)\n"
    )
    out = tmp_path / "best.py"
    command = ["plan", str(base), "--gpus", "1", "--device", "H100", "--search"]
    result = CliRunner().invoke(app, [*command, "--write", str(out), "--price", "2"])
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "a step on 1 x H100" in words
    assert "per billion tokens" in words
    assert "fastest layouts that fit" in words
    loaded = load_config(str(out), []).config
    assert loaded.data.micro_bsz * loaded.data.micro_num == 4
