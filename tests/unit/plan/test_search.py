"""The search for layouts: what it tries, that small models predict large ones, and that the best is the best."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.cli.plan_layouts import reason
from evomesh.cli.plan_time import write_layout
from evomesh.config.layout import axis_sizes
from evomesh.config.loader import load_config
from evomesh.config.schema import Config
from evomesh.config.size import tokens_per_step
from evomesh.plan.device import Device, load_device
from evomesh.plan.layout_choice import (
    RECOMPUTE,
    LayoutChoice,
    choice_of,
    difference,
    every_choice,
    is_allowed,
    least_changes,
    single_changes,
    with_choice,
)
from evomesh.plan.memory import GIB, PeakMemory
from evomesh.plan.memory_floor import MemoryFloor
from evomesh.plan.search import BEST, LayoutPrediction, SearchResult, search
from evomesh.plan.step_time import StepTime
from evomesh.plan.trace import hold

from .test_step_time import config

DEVICE = load_device("A100")


def small_device(gib: float) -> Device:
    return DEVICE.model_copy(update={"memory_gib": gib})


def base_choices(
    config: Config, world_size: int, gpus_per_node: int
) -> Iterator[LayoutChoice]:
    """The allowed layouts with the config's micro-batches and one chunk for each rank, without recomputing."""
    for choice in every_choice(config, world_size, gpus_per_node):
        is_base = choice.chunks == 1 and choice.micro_bsz == config.data.micro_bsz
        if is_base and is_allowed(config, choice, world_size):
            yield choice


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


class FormulaPredictor:
    """Predicts by formulas instead of traces; the bound of its times is off by up to a tenth."""

    def __init__(self, config: Config, world_size: int, device: Device) -> None:
        self.config = config
        self.world_size = world_size
        self.device = device
        self.capacity = int(device.memory_gib * GIB)
        self.simulated: list[LayoutChoice] = []

    def peak(self, choice: LayoutChoice) -> PeakMemory:
        shards = choice.tensor * choice.weight * choice.pipeline
        if choice.fsdp:
            shards *= choice.zero
        kept = 3 * choice.micro_bsz * (1 - 0.8 * choice.recompute) / choice.tensor
        gib = 16 / shards + kept
        return PeakMemory({"weights": int(gib * GIB)}, "loss")

    def seconds(self, choice: LayoutChoice) -> float:
        seconds = 1 + choice.recompute / 3 + 0.2 * choice.tensor + 0.3 * choice.fsdp
        seconds += (choice.pipeline - 1) / choice.micro_num / choice.chunks
        return seconds + 0.5 / choice.micro_bsz

    def least_seconds(self, choice: LayoutChoice) -> float:
        error = sum(map(ord, str(choice))) % 5 / 50
        return self.seconds(choice) * (1 - error)

    def step_time(self, choice: LayoutChoice) -> StepTime:
        self.simulated.append(choice)
        tokens = 1000
        return StepTime(self.seconds(choice), tokens, 1, {}, 0.0, 0.0, 0.0)


def fits(predictor: FormulaPredictor, choice: LayoutChoice) -> bool:
    return predictor.peak(choice).missing(predictor.capacity) <= 0


def in_order(
    predictor: FormulaPredictor, choices: Iterable[LayoutChoice]
) -> list[tuple[float, int]]:
    """Seconds and bytes: within 1 % of the fastest by memory, then by speed."""
    figures = [
        (predictor.seconds(choice), predictor.peak(choice).needed) for choice in choices
    ]
    limit = 1.01 * min(figures)[0]
    return sorted(
        figures,
        key=lambda found: (
            found[0] > limit,
            found[::-1] if found[0] <= limit else found,
        ),
    )


def found_by(result: SearchResult) -> list[tuple[float, int]]:
    return [
        (prediction.time.seconds, prediction.peak.needed)
        for prediction in result.fitting
        if prediction.time
    ]


class TradingPredictor(FormulaPredictor):
    """The more memory a layout needs, the faster it is: by ``spread`` from the least to 20 GiB."""

    spread = 0.0

    def seconds(self, choice: LayoutChoice) -> float:
        needed = self.peak(choice).needed / GIB
        return 1 + self.spread * (1 - needed / 20)


@pytest.mark.parametrize("spread", [0.009, 0.02, 1.0])
def test_of_layouts_as_fast_the_one_with_the_least_memory_comes_first(
    spread: float,
) -> None:
    predictor = TradingPredictor(config(), 8, small_device(14))
    predictor.spread = spread
    result = search(predictor)
    found = found_by(result)
    everything = [
        choice
        for choice in every_choice(predictor.config, 8, DEVICE.gpus_per_node)
        if is_allowed(predictor.config, choice, 8)
    ]
    least = []
    for choice in everything:
        tried = [replace(choice, recompute=fraction) for fraction in RECOMPUTE]
        least += [one for one in tried if fits(predictor, one)][:1]
    assert found == pytest.approx(in_order(predictor, least)[:BEST])
    memory = [needed for _, needed in found]
    if spread == 0.009:
        assert memory[0] == min(predictor.peak(choice).needed for choice in least)
    # What is faster than the first row, and does not fit, is faster than all that fit.
    fastest = min(seconds for seconds, _ in found)
    assert all(predictor.seconds(near.choice) < fastest for near in result.near)


@pytest.mark.parametrize(
    ("seconds", "gib", "words"),
    [
        (0.992, 15, "0.8% faster, with 5.0 GiB more"),
        (1.0, 15, "as fast, with 5.0 GiB more"),
        (1.0, 10, "as fast"),
        (1.02, 8, "2.0%: 0.020 s more in attention"),
    ],
)
def test_a_row_is_compared_with_the_one_above(
    seconds: float, gib: int, words: str
) -> None:
    def row(seconds: float, gib: int) -> LayoutPrediction:
        peak = PeakMemory({"weights": gib * GIB}, "loss")
        time = StepTime(seconds, 1000, 1, {"attention": seconds}, 0.0, 0.0, 0.0)
        return LayoutPrediction(choice_of(config(), 8), peak, time)

    assert reason(row(1.0, 10), row(seconds, gib)) == words


def test_the_best_layouts_are_those_of_brute_force() -> None:
    start = config()
    predictor = FormulaPredictor(start, 8, small_device(14))
    result = search(predictor)

    everything = [
        replace(choice, recompute=recompute)
        for choice in every_choice(start, 8, DEVICE.gpus_per_node)
        if is_allowed(start, choice, 8)
        for recompute in RECOMPUTE
    ]
    fitting = [choice for choice in everything if fits(predictor, choice)]
    # One of each: the others recompute more than they need.
    least = {replace(choice, recompute=0.0): choice for choice in reversed(fitting)}
    expected = in_order(predictor, least.values())[:BEST]
    assert found_by(result) == pytest.approx(expected)
    counts = result.counts
    assert counts.total - counts.refused == len(everything)
    assert counts.fitting + counts.slower == len(fitting)
    # The bound spares the simulation of most of them.
    assert len(predictor.simulated) < counts.fitting / 2


def test_faster_layouts_that_do_not_fit_are_named_with_what_makes_them_fit() -> None:
    predictor = FormulaPredictor(config(), 8, small_device(8))
    result = search(predictor)
    best = result.fitting[0].choice
    assert result.near
    for near in result.near:
        assert predictor.seconds(near.choice) < predictor.seconds(best)
        assert near.missing == predictor.peak(near.choice).missing(predictor.capacity)
        assert near.missing > 0
        assert all(fits(predictor, change) for change in near.changes)
    assert any(near.changes for near in result.near)


def test_where_nothing_fits_the_nearest_come_first() -> None:
    predictor = FormulaPredictor(config(), 8, small_device(2.1))
    result = search(predictor)
    assert result.fitting == []
    assert result.near == []
    sizes = [found.peak.total for found in result.predictions]
    assert sizes == sorted(sizes)
    assert result.predictions[0].choice.recompute == 1.0


def test_weights_that_are_ruled_out_without_a_trace_do_not_fit() -> None:
    start = config(vocab_size=32_000)
    floor = MemoryFloor(start, 8)
    for choice in list(base_choices(start, 8, 8))[::20]:
        changed = with_choice(start, choice)
        sizes = []
        for stage in (0, choice.pipeline - 1):
            rank = 8 // choice.pipeline * stage
            held = hold(changed, 8, rank)
            sizes.append(held.parameters + held.gradients)
        least = floor.peak(choice).total
        assert 0.2 * max(sizes) < least <= max(sizes)


def test_single_changes_begin_with_the_smallest() -> None:
    start = config(vocab_size=64_000)
    now = choice_of(start, 2)
    several = list(single_changes(start, now, 2))
    words = [[difference(now, choice) for choice in changes] for changes in several]
    recompute, tensor, fsdp, *_ = words
    assert recompute == [f"model.checkpoint={part}" for part in (0.25, 0.5, 0.75, 1.0)]
    assert tensor == ["parallel.tensor.size=2, data.micro_num=8"]
    assert fsdp == ["parallel.zero1.fsdp=True"]


def test_the_optimizer_is_sharded_over_no_more_than_the_ranks_of_a_stage() -> None:
    """8 ranks in a pipeline of 2 with tensor 2: two hold the same weights, whatever the config has."""
    start = config()
    now = replace(choice_of(start, 8), tensor=2, pipeline=2, zero=1, micro_num=16)
    zeros = [
        changes[0].zero
        for changes in single_changes(start, now, 8)
        if changes[0].zero != now.zero
    ]
    assert zeros == [2]


def test_the_smallest_change_that_fits_is_named() -> None:
    start = config(vocab_size=64_000)
    now = choice_of(start, 2)
    several = list(single_changes(start, now, 2))
    found = list(least_changes(several, lambda one: one.recompute >= 0.6))
    assert [difference(now, choice) for choice in found] == ["model.checkpoint=0.75"]
    found = list(least_changes(several, lambda _: True))
    assert found == [changes[0] for changes in several]
    assert list(least_changes(several, lambda _: False)) == []


def written(
    tmp_path: Path, choice: LayoutChoice, overrides: Sequence[str] = ()
) -> Config:
    base = tmp_path / "base.py"
    base.write_text(
        'model = dict(model_type="LLAMA2", num_layers=4, hidden_size=256, num_attention_heads=4, vocab_size=4000)\n'
        "data = dict(seq_len=2048, micro_bsz=1, micro_num=4, total_steps=10)\n"
        "parallel = dict(zero1=-1, tensor=1, pipeline=1)\n"
    )
    out = tmp_path / "out.py"
    write_layout(choice, str(base), out, overrides)
    return load_config(str(out), []).config


@pytest.mark.parametrize("number", [0, 9, 23, 31])
def test_a_written_config_has_the_layout(tmp_path: Path, number: int) -> None:
    choices = list(base_choices(config(), 8, 4))
    choice = choices[number]
    loaded = written(tmp_path, choice)
    assert choice_of(loaded, 8) == choice
    assert loaded.data.total_steps == 10


def test_a_written_config_has_what_was_set_on_the_command_line(tmp_path: Path) -> None:
    choice = list(base_choices(config(), 8, 4))[9]
    settings = [
        "data.seq_len=4096",
        "parallel.zero1=4",
        "adam.lr=0.002",
        f"data.micro_bsz={choice.micro_bsz + 3}",
        "JOB_NAME=long",
    ]
    loaded = written(tmp_path, choice, settings)
    assert loaded.data.seq_len == 4096
    assert loaded.adam.lr == 0.002
    assert loaded.run.job_name == "long"
    # The layout is what the search chose.
    assert choice_of(loaded, 8) == choice


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
    tmp_path: Path,
) -> None:
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
    assert "up to 1% slower than the fastest: the least memory first" in words
    # The rank's total above is that of its row here: there is one layout of this size.
    total = re.search(r"in total ([\d.]+) GiB", words)
    rows = re.findall(r"│ ([\d.]+) │", words)
    assert total is not None
    assert f"{float(total[1]):.1f}" in rows
    loaded = load_config(str(out), []).config
    assert loaded.data.micro_bsz * loaded.data.micro_num == 4
