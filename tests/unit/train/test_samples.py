"""Asking the model in training: it is put back as it was, with the random numbers of the training."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from evomesh.train.samples import evaluated


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("fails", [False, True])
def test_the_training_continues_with_its_mode_and_its_random_numbers(
    fails: bool,
) -> None:
    module = nn.Dropout()
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    expected = draw()
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    with (
        pytest.raises(KeyError) if fails else torch.no_grad(),
        evaluated(module, torch.device("cpu")),
    ):
        assert not module.training
        draw()
        if fails:
            raise KeyError
    assert module.training and draw() == expected
    module.eval()
    with evaluated(module, torch.device("cpu")):
        pass
    assert not module.training
