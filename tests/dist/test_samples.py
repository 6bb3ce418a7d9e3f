"""Answers of the model as it is in the run, in any layout: those of the key/value cache on one process."""

from __future__ import annotations

import functools
from datetime import datetime

import pytest
import torch

from evomesh.generate.decode import generate_tokens
from evomesh.generate.options import SamplingParams
from evomesh.generate.sample import TokenSampler
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.train.launch import RunContext
from evomesh.train.samples import GrowingAnswer, evaluated, grow_answers
from evomesh.train.stages import ModelStages, build_stages
from evomesh.train.text_passes import TextPasses
from tests.dist.layouts import SEED, Layout
from tests.support.pool import Pool, grid_of

PROMPTS = [[3, 7, 11], [20], [5, 4, 3, 2, 1, 9, 30, 60]]
GREEDY = SamplingParams(do_sample=False, max_new_tokens=12)
DRAWN = SamplingParams(
    temperature=2.0, top_k=20, max_new_tokens=9, eos_ids=tuple(range(0, 60, 5)), seed=3
)
CUT = {"zero1": {"fsdp": True}}
LAYOUTS = [
    Layout(ranks=2),
    Layout(parallel=CUT, model={"vocab_size": 64}),
    Layout(tensor=2, mode="mtp"),
    Layout(tensor=4, mode="msp"),
    Layout(tensor=2, mode="fsp", family="internlm2"),
    Layout(tensor=2, mode="isp", weight=4),
    Layout(pipeline=4, family="tied"),
    Layout(tensor=2, mode="msp", pipeline=2, chunks=2),
    Layout(pipeline=2, ranks=2, chunks=2, schedule="zbv"),
]


def built(layout: Layout, rank: int = 0) -> tuple[ModelStages, TextPasses]:
    grid = Grid()
    if layout.ranks > 1:
        grid = grid_of(
            mode=layout.mode,
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            weight=layout.weight,
            zero1=layout.zero1,
        )
    mode = MODES[layout.mode]
    stages = build_stages(layout.config, grid, mode, torch.device("cpu"))
    stages.initialize(SEED, grid)
    device = torch.device("cpu")
    context = RunContext(grid, device, mode, rank, layout.ranks, datetime.now())
    return stages, TextPasses(layout.config, stages, context)


def in_the_run(rank: int, layout: Layout) -> list[list[list[int]]]:
    stages, passes = built(layout, rank)
    answers = []
    for sampling in (GREEDY, DRAWN):
        growing = [
            GrowingAnswer(
                list(ids),
                len(ids),
                sampling.max_total_length(len(ids), 32),
                TokenSampler(sampling, (sampling.seed, number)),
            )
            for number, ids in enumerate(PROMPTS)
        ]
        with evaluated(stages.module, passes.device):
            grow_answers(passes, growing)
        answers.append([answer.ids[answer.prompt_length :] for answer in growing])
    return answers


@functools.cache
def with_a_cache(layout: Layout) -> list[list[list[int]]]:
    stages, _ = built(layout)
    (model,) = stages.models
    model.eval()
    return [
        [answers[0] for answers in generate_tokens(model, PROMPTS, sampling)]
        for sampling in (GREEDY, DRAWN)
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_gets_the_tokens_that_one_process_generates(
    pool: Pool, layout: Layout
) -> None:
    one = Layout(family=layout.family, ranks=1, model=layout.model)
    expected = with_a_cache(one)
    assert any(len(answer) < 9 for answer in expected[1])  # an end id was drawn
    for answers in pool.run(in_the_run, layout, ranks=layout.ranks):
        assert answers == expected
