"""The benchmark of learning per minute: equal models and equal text on both sides, and runs that are not done twice."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks import learning
from benchmarks.learning import BASELINE, RECIPES, Clock, Job, Pace, Results
from benchmarks.learning_sides import DEMO, llama_shape, row_batches
from evomesh.config.loader import load_config
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.train.stages import build_stages

JOB = Job("evomesh", None, 0, 60.0, threads=1, points=2)


def test_both_models_have_the_same_number_of_parameters() -> None:
    config = load_config(str(DEMO)).config
    stages = build_stages(config, Grid(), MODES["mtp"], torch.device("meta"))
    ours = sum(parameter.numel() for parameter in stages.parameters().values())
    with torch.device("meta"):
        shape = transformers.LlamaConfig(**llama_shape(config))
        stock = transformers.LlamaForCausalLM(shape)
    assert ours == sum(parameter.numel() for parameter in stock.parameters())


def test_rows_hold_every_token_once_in_a_pass(tmp_path: Path) -> None:
    documents = [list(range(7)), list(range(7, 12)), [12, 13]]
    lines = [json.dumps({"tokens": document}) for document in documents]
    (tmp_path / "a.bin").write_text("\n".join(lines) + "\n")
    batches = row_batches(tmp_path, length=2, rows=1, seed=1)
    passes = [torch.cat([next(batches) for _ in range(7)]) for _ in range(2)]
    for rows in passes:
        assert sorted(rows.flatten().tolist()) == list(range(14))
    assert not torch.equal(passes[0], passes[1])


def test_the_clock_leaves_out_what_it_is_asked_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([10.0, 20.0, 21.0])
    monkeypatch.setattr(learning.time, "perf_counter", lambda: next(now))
    clock = Clock(pace=None)
    clock.leave_out(since=14.0)  # until 20
    assert clock.seconds() == 5.0  # from 10 to 14, and from 20 to 21


def test_a_step_counts_as_long_as_on_an_idle_machine(tmp_path: Path) -> None:
    """The recipe's steps took twice the baseline's, on a machine that was half as fast as for the baseline alone."""
    args = Namespace(pace=30.0, jobs=2, threads=2)
    alone = Pace(BASELINE, 2, seconds=0.125, baseline_seconds=0.125)
    by_turns = Pace(JOB.recipe, 2, seconds=0.5, baseline_seconds=0.25)
    path = tmp_path / "runs.jsonl"
    rows = [json.dumps(asdict(pace)) + "\n" for pace in (alone, by_turns)]
    path.write_text("".join(rows))
    results = Results(path, data="no such folder", jobs=2)
    job = learning.paced(replace(JOB, threads=2), results, args)
    assert job == replace(JOB, threads=1, pace=0.25)
    clock = Clock(job.pace)
    clock.steps = 8
    assert clock.seconds() == 2.0


def test_a_run_that_the_file_holds_is_not_done_again(tmp_path: Path) -> None:
    row = {**asdict(JOB), "curve": [{"bits": {"code": 2.0, "en": 3.0}}]}
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    results = Results(path, data="no such folder", jobs=1)
    assert results.complete([JOB]) == [row]
    assert learning.bits_at(row, -1) == 2.5
    longer = replace(JOB, seconds=120.0)
    assert results.of(longer) is None


def test_every_recipe_is_a_config() -> None:
    for recipe in RECIPES.values():
        for _, more in [(0.0, ()), *recipe.phases]:
            config = load_config(str(DEMO), [*recipe.settings, *more]).config
            assert config.data.packed_length in {512, 1024, 2048}
