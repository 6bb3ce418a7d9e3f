"""Means over target tokens, however the tokens are divided into batches."""

from __future__ import annotations

import math

import pytest
import torch

from evomesh.layers.loss import LossOutput
from evomesh.train.tally import LossTally

NLL = torch.tensor([0.5, 2.0, 0.0, 1.0, 4.0])
CORRECT = torch.tensor([True, False, True, True, False])
LABELS = torch.tensor([7, 7, -100, 7, 7])
TYPES = torch.tensor([0, 0, 0, 2, 2])


def tally_of(*parts: slice) -> LossTally:
    tally = LossTally(["cn", "code", "en"], torch.device("cpu"))
    for part in parts:
        tally.add(
            LossOutput(torch.tensor(0.0), NLL[part], CORRECT[part]),
            LABELS[part],
            TYPES[part],
        )
    return tally


def test_means_weigh_every_target_equally_and_absent_types_are_absent() -> None:
    assert tally_of(slice(None)).summary() == {
        "loss": 7.5 / 4,
        "acc": 0.5,
        "perplexity": pytest.approx(math.exp(7.5 / 4)),
        "loss/cn": 1.25,
        "acc/cn": 0.5,
        "perplexity/cn": pytest.approx(math.exp(1.25)),
        "tokens/cn": 2,
        "loss/en": 2.5,
        "acc/en": 0.5,
        "perplexity/en": pytest.approx(math.exp(2.5)),
        "tokens/en": 2,
    }


def test_unequal_parts_give_the_same_means() -> None:
    assert (
        tally_of(slice(0, 1), slice(1, 5)).summary() == tally_of(slice(None)).summary()
    )


def test_nothing_but_ignored_labels_gives_nothing() -> None:
    assert tally_of(slice(2, 3)).summary() == {}


def test_an_overflow_in_one_type_stays_there() -> None:
    tally = LossTally(["cn", "code", "en"], torch.device("cpu"))
    nll = NLL.clone()
    nll[0] = math.inf
    tally.add(LossOutput(torch.tensor(0.0), nll, CORRECT), LABELS, TYPES)
    summary = tally.summary()
    assert summary["loss/cn"] == math.inf
    assert summary["loss/en"] == 2.5
