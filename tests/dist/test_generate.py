"""Decoding on four ranks: the tokens of one process, and no rank holds more than its share."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from evomesh.config.schema import Config
from evomesh.generate.decode import generate_tokens
from evomesh.generate.engine import GenerationEngine
from evomesh.generate.options import SamplingParams
from evomesh.generate.staged import StagedModel
from evomesh.models.language_model import LanguageModel
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.train.generation import inference_layout, warn_of_larger_shards
from evomesh.train.stages import build_stages
from tests.dist.layouts import SEED, VOCAB, Layout
from tests.support.decoders import enlarge
from tests.support.own_model import register
from tests.support.pool import Pool, grid_of

PROMPTS = [[3, 7, 11], [20], [5, 4, 3, 2, 1, 9, 30, 66]]
GREEDY = SamplingParams(do_sample=False, max_new_tokens=12)
DRAWN = SamplingParams(
    temperature=2.0, top_k=20, max_new_tokens=12, num_return_sequences=2
)
BEAMS = SamplingParams(
    do_sample=False,
    num_beams=3,
    num_return_sequences=2,
    eos_ids=(1, 4, 9),
    max_new_tokens=12,
)
SLOTS, CONTEXT_LENGTH = 2, 24


@dataclass(frozen=True)
class Held:
    """Elements of the matrices on this rank by name, and bytes of its cache."""

    matrices: dict[str, int]
    cache: int


def decode(rank: int, config: Config) -> tuple[list[Any], Held]:
    config = inference_layout(config)
    sizes = {
        "tensor": config.parallel.tensor.size,
        "pipeline": config.parallel.pipeline.size,
    }
    grid = grid_of(**sizes) if max(sizes.values()) > 1 else Grid()
    stages = build_stages(
        config, grid, MODES[config.parallel.tensor.mode], torch.device("cpu")
    )
    stages.initialize(SEED, grid)
    (part,) = stages.models
    enlarge(part)
    model: LanguageModel = (
        StagedModel(part, grid.pp, config.model) if grid.pp.size > 1 else part
    )
    answers = [
        generate_tokens(model, PROMPTS, sampling, batch_size=2)
        for sampling in (GREEDY, DRAWN, BEAMS)
    ]
    engine = GenerationEngine(model, slots=SLOTS, context_length=CONTEXT_LENGTH)
    engine.add([1, 2], GREEDY, (0, 0))
    engine.step()
    return answers, Held(matrices(part), engine.cache.size_in_bytes())


def matrices(model: nn.Module) -> dict[str, int]:
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }


@functools.cache
def alone(family: str) -> tuple[list[Any], Held]:
    return decode(0, Layout(ranks=1, family=family).config)


def decode_own(rank: int, config: Config) -> tuple[list[Any], Held]:
    register()
    return decode(rank, config)


def test_a_pipelined_model_of_ones_own_decodes_like_one_process(pool: Pool) -> None:
    """Nothing of it is the families' own decoder; a stage does the same sums as the whole, so the bits are equal."""
    own = {"model_type": "STAGED_BLOCKS", "dtype": "bfloat16"}
    wanted, whole = decode_own(0, Layout(ranks=1, model=own).config)
    ranks = pool.run(decode_own, Layout(pipeline=4, model=own).config)
    assert [answers for answers, _ in ranks] == [wanted] * 4
    assert [held.cache for _, held in ranks] == [whole.cache // 4] * 4
    assert len({token for answers in wanted[0] for token in answers[0]}) > 3


LAYOUTS = [
    Layout(tensor=2, pipeline=2, mode="msp"),
    Layout(tensor=4, mode="fsp", family="internlm2"),
    Layout(pipeline=4, family="internlm"),
    Layout(pipeline=2, chunks=2, schedule="zbv", tensor=2),
    Layout(tensor=2, mode="isp", weight=4, family="post_norm"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_decode_like_one_process_and_hold_their_share(
    layout: Layout, pool: Pool
) -> None:
    wanted, whole = alone(layout.family)
    ranks = pool.run(decode, layout.config)
    assert [answers for answers, _ in ranks] == [wanted] * 4
    assert len({token for answers in wanted[0] for token in answers[0]}) > 3
    assert [held.cache for _, held in ranks] == [whole.cache // 4] * 4
    for name, elements in whole.matrices.items():
        parts = [held.matrices.get(name, 0) for _, held in ranks]
        assert sum(parts) >= elements
        rows = sum(parts) - elements
        assert rows == 0 or (
            name in ("embedding.weight", "head.weight") and rows < 4 * elements // VOCAB
        ), name


def test_isp_takes_the_largest_axis_that_divides_heads_and_widths() -> None:
    def tensor_size(**model: object) -> int:
        layout = Layout(tensor=2, mode="isp", weight=4, model=model)
        return inference_layout(layout.config).parallel.tensor.size

    assert tensor_size() == 4
    assert tensor_size(num_kv_attention_heads=2) == 2
    assert (
        tensor_size(num_attention_heads=6, num_kv_attention_heads=6, hidden_size=48)
        == 2
    )
    assert tensor_size(mlp_ratio=1.3, multiple_of=1) == 1  # a width of 41
    wide = Layout(
        tensor=1, mode="isp", weight=4, model={"num_kv_attention_heads": 2}
    ).config
    used = inference_layout(wide).parallel
    assert used.tensor.size == 2  # neither axis, but what it shares with the heads
    assert (
        "each rank holds 1/2 of its layers' weights, not 1/4"
        in warn_of_larger_shards(wide.parallel, used)
    )
    for whole in (
        Layout(tensor=2, mode="isp", weight=4),
        Layout(tensor=2, mode="fsp"),
        Layout(),
    ):
        assert (
            warn_of_larger_shards(
                whole.config.parallel, inference_layout(whole.config).parallel
            )
            == ""
        )
