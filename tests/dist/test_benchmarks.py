"""The harness's requests answered by the model as it is in the run: the scores of one process's model."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any, cast

import pytest

from evomesh.data.tokenizer import Tokenizer
from evomesh.evaluate.native import HarnessModel
from evomesh.train.samples import evaluated
from tests.dist.layouts import Layout
from tests.dist.test_samples import LAYOUTS, built
from tests.support.pool import Pool
from tests.support.tolerances import LAYOUT

pytest.importorskip("lm_eval")


class LetterTokenizer:
    """A letter for each of 64 ids."""

    leading = ()
    bos_id = None
    path = "letters"

    def encode(self, text: str) -> list[int]:
        return [(ord(letter) - 48) % 64 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(48 + token) for token in ids)


@dataclass
class Request:
    """What the harness hands over of a generation request."""

    args: tuple[str, dict[str, Any]]


SETTINGS: dict[str, Any] = {
    "tokenizer": cast(Tokenizer, LetterTokenizer()),
    "eos_ids": (1,),
    "context_length": 40,  # longer than a pack of the run
}


# Two batches where one rank has all data, and one pack for each of four ranks.
TEXTS = 16


def texts() -> list[tuple[None, list[int], list[int]]]:
    draw = random.Random(5)
    return [
        (
            None,
            [draw.randrange(64) for _ in range(draw.randrange(1, 45))],
            [draw.randrange(64) for _ in range(draw.randrange(1, 5))],
        )
        for _ in range(TEXTS)
    ]


def questions() -> list[Request]:
    options = {"max_gen_toks": 4, "do_sample": False}
    drawn = {**options, "do_sample": True, "temperature": 3.0}
    prompts = ["abc", "x", "0123456789" * 3, "no"]
    return [
        Request((prompt, {**how, "until": ["q", "5"]}))
        for prompt in prompts
        for how in (options, drawn)
    ]


def ask(model: HarnessModel) -> tuple[list[tuple[float, bool]], list[str]]:
    scores = model._loglikelihood_tokens(texts(), disable_tqdm=True)
    return scores, model.generate_until(questions(), disable_tqdm=True)


def in_the_run(rank: int, layout: Layout) -> tuple[list[tuple[float, bool]], list[str]]:
    from evomesh.train.benchmarks import RunHarnessModel

    stages, passes = built(layout, rank)
    with evaluated(stages.module, passes.device):
        return ask(RunHarnessModel(passes, **SETTINGS))


@functools.cache
def alone(family: str, vocab_size: int) -> tuple[list[tuple[float, bool]], list[str]]:
    stages, _ = built(Layout(family=family, ranks=1, model={"vocab_size": vocab_size}))
    (model,) = stages.models
    model.eval()
    return ask(HarnessModel(model, **SETTINGS))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scores_and_answers_are_those_of_one_process(
    pool: Pool, layout: Layout
) -> None:
    vocab_size = layout.config.model.vocab_size
    expected_scores, expected_texts = alone(layout.family, vocab_size)
    for scores, answers in pool.run(in_the_run, layout, ranks=layout.ranks):
        for (logprob, greedy), (expected, expected_greedy) in zip(
            scores, expected_scores, strict=True
        ):
            assert logprob == pytest.approx(expected, rel=LAYOUT)
            assert greedy == expected_greedy
        assert answers == expected_texts
