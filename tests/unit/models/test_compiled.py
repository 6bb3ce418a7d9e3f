"""Blocks are compiled once, however many there are and however documents are packed, by torch's own counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evomesh.layers.attention import AttentionFunction, attend
from evomesh.layers.sequence_bounds import SequenceBounds
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import build_model, initialize_weights
from tests.support.decoders import tiny_config

pytestmark = pytest.mark.slow

LAYERS = 12  # more than torch compiles one function for, before it gives up (recompile_limit, 8)
T = 48
PACKS = [(48,), (24, 24), (3, 5, 40), (7,) * 6 + (6,), (1,) * 48]


def counters() -> dict[str, Counter[str]]:
    """Return torch's own counts; importing them imports the compiler, for seconds."""
    from torch._dynamo.utils import counters

    return counters


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs, guards and autograd as ever, but without generating code, which takes minutes here."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager")
    )
    torch._dynamo.reset()
    counters().clear()
    yield
    torch._dynamo.reset()


def model_of(**changes: Any) -> LanguageModel:
    model = build_model(tiny_config(num_layers=LAYERS, **changes))
    initialize_weights(model, seed=1)
    return model


def documents(lengths: Sequence[int]) -> SequenceBounds:
    bounds = torch.tensor((0, *lengths)).cumsum(0).int()
    return SequenceBounds(
        torch.cat([torch.arange(n) for n in lengths]), bounds, max(lengths)
    )


def train(
    model: LanguageModel, lengths: Sequence[int], attend: AttentionFunction = attend
) -> dict[str, Tensor]:
    """Gradients of one forward and backward."""
    model.zero_grad()
    ids = torch.arange(T) % model.config.vocab_size
    model.loss(
        model(ids, documents(lengths), attend), ids, grad_scale=1 / T
    ).scaled_sum.backward()
    return {
        name: parameter.grad.clone() for name, parameter in model.named_parameters()
    }


def graphs() -> int:
    return int(counters()["stats"]["unique_graphs"])


@pytest.mark.parametrize("recompute", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lengths_and_number_of_documents_compile_nothing_anew(
    dtype: str, recompute: float
) -> None:
    model = model_of(dtype=dtype, compile=True, checkpoint=recompute)
    train(model, PACKS[0])
    first = graphs()
    # Before and behind attention, in the block and in its attention: not of each layer.
    assert 0 < first <= 4
    for lengths in PACKS[1:]:
        train(model, lengths, partial(attend))  # a new one each time, as in generation
    assert graphs() == first
    # None was left to run uncompiled.
    assert counters()["frames"]["total"] == counters()["frames"]["ok"]


def test_compiled_gradients_are_those_of_the_eager_model() -> None:
    compiled, eager = model_of(compile=True), model_of(compile=False)
    for lengths in PACKS:
        ours, theirs = train(compiled, lengths), train(eager, lengths)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-12)
    assert graphs()
