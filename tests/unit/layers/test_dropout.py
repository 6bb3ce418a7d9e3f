"""Dropout masks: the generator against its published numbers, and what a mask may depend on."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from evomesh.config.schema import ModelConfig
from evomesh.data.batch import Batch
from evomesh.layers.attention import attend
from evomesh.layers.dropout import MaskNumbers, drop_columns, philox
from evomesh.layers.scores import PLAIN_SCORES, ScoreRule
from evomesh.layers.sequence_bounds import SequenceBounds, micro_batch_bounds
from evomesh.models.registry import build_model, initialize_weights
from tests.support.covers import covers

# Known answers of philox4x32-10 in the authors' library: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip
T, D = 24, 10


def words(text: str) -> torch.Tensor:
    return torch.tensor([int(word, 16) for word in text.split()])


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_generator_gives_its_published_numbers(
    counter: str, key: str, answer: str
) -> None:
    found = philox(words(key), tuple(words(counter)))
    assert torch.equal(torch.stack(found), words(answer))


def plain_words(seed: int, step: int, counter: list[int]) -> list[int]:
    """Philox in Python's integers: the words that a mask compares with the rate."""
    keys = [seed, step]
    a, b, c, d = counter
    for _ in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (y >> 32) ^ b ^ keys[0], y % 2**32, (x >> 32) ^ d ^ keys[1], x % 2**32  # fmt: skip
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return [a, b, c, d]


def numbers(
    first: int = 0, layer: int = 0, seed: int = 5, step: int = 3
) -> MaskNumbers:
    tokens = torch.arange(first, first + T)
    return MaskNumbers.of_pack(torch.tensor([seed, step]), tokens).at_layer(layer)


def mask(found: MaskNumbers, site: int = 1, rate: float = 0.4) -> torch.Tensor:
    ones = torch.ones(T, D, dtype=torch.float64)
    return drop_columns(ones, rate, found, site, rank=0)


@covers("model.drop_rate")
def test_each_element_is_decided_by_its_seed_step_layer_token_and_column() -> None:
    first, layer, site, rate = 2**32 - 7, 2, 1, 0.4  # some tokens need a second word
    found = mask(numbers(first, layer), site, rate)
    for token, column in product(range(T), range(D)):
        number = first + token
        counter = [number % 2**32, number >> 32, column // 4, 4 * layer + site]
        word = plain_words(5, 3, counter)[column % 4]
        expected = 1 / (1 - rate) if word >= rate * 2**32 else 0.0
        assert found[token, column].item() == expected


@pytest.mark.parametrize(
    "other", [{"seed": 6}, {"step": 4}, {"layer": 1}, {"first": T}], ids=str
)
def test_another_seed_step_layer_or_token_is_another_mask(
    other: dict[str, int],
) -> None:
    assert not torch.equal(mask(numbers()), mask(numbers(**other)))


def test_sites_differ_and_the_share_is_the_rate() -> None:
    assert not torch.equal(mask(numbers(), site=1), mask(numbers(), site=2))
    many = MaskNumbers.of_pack(torch.tensor([1, 1]), torch.arange(2000))
    dropped = drop_columns(torch.ones(2000, 500), 0.3, many, 1, rank=0) == 0
    # Five standard deviations of a million draws.
    assert abs(dropped.double().mean() - 0.3) < 5 * (0.3 * 0.7 / 1e6) ** 0.5


def test_a_shard_has_its_rows_of_the_mask() -> None:
    whole = mask(numbers())
    half = torch.ones(T // 2, D, dtype=torch.float64)
    assert torch.equal(drop_columns(half, 0.4, numbers(), 1, rank=1), whole[T // 2 :])


def test_without_a_rate_or_outside_training_nothing_is_computed() -> None:
    x = torch.ones(T, D)
    assert drop_columns(x, 0.0, numbers(), 1, rank=0) is x
    assert drop_columns(x, 0.4, None, 1, rank=0) is x


class _Module:
    """What ``attend`` reads of an attention module."""

    class placement:
        class axis:
            rank = 0

    def __init__(self, window: int | None, drop_rate: float, scores: ScoreRule) -> None:
        self.window, self.drop_rate, self.scores = window, drop_rate, scores


@covers("model.attn_drop_rate")
@pytest.mark.parametrize(
    ("window", "rule"),
    [
        (None, PLAIN_SCORES),
        (6, PLAIN_SCORES),
        (6, ScoreRule(scale=0.5, softcap=1.5)),
        (None, ScoreRule(scale=0.2)),
    ],
)
def test_attention_drops_single_probabilities(
    window: int | None, rule: ScoreRule
) -> None:
    torch.manual_seed(0)
    q = torch.randn(T, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, T, 2, 8, dtype=torch.float64)
    cuts = torch.tensor([0, 9, T], dtype=torch.int32)
    bounds = SequenceBounds(torch.zeros(T), cuts, 15, None, numbers(2**32 - 7, 3))
    module: Any = _Module(window, 0.3, rule)
    found = attend(q, k, v, bounds, module)
    expected = torch.zeros_like(q)
    for start, stop in ((0, 9), (9, T)):
        for token, head in product(range(start, stop), range(4)):
            first = max(start, token + 1 - (window or T))
            seen = k[first : token + 1, head // 2]
            scores = seen @ q[token, head] * (rule.scale or 8**-0.5)
            if rule.softcap is not None:
                scores = rule.softcap * torch.tanh(scores / rule.softcap)
            share = scores.softmax(0)
            number = 2**32 - 7 + token
            for key in range(first, token + 1):
                place = key - start
                counter = [number % 2**32, (number >> 32) | head << 16, place // 4, 4 * 3 + 3]  # fmt: skip
                word = plain_words(5, 3, counter)[place % 4]
                if word >= 0.3 * 2**32:
                    expected[token, head] += share[key - first] / 0.7 * v[key, head // 2]  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    bounds.numbers = None
    undropped = attend(q, k, v, bounds, module)
    module.drop_rate = 0.0
    assert torch.equal(undropped, attend(q, k, v, bounds, module))


def batch_of(packs: list[int]) -> Batch:
    rows = torch.arange(12)[None] + torch.tensor(packs)[:, None]
    bounds = torch.tensor([[0, 5, 12]] * len(packs), dtype=torch.int32)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(len(packs), -1)
    return Batch(rows, rows, positions, rows * 0, bounds, 7)


def test_a_pack_has_the_same_numbers_on_every_rank() -> None:
    whole = batch_of([0, 1, 2, 3]).numbered(7, 2, dp_rank=0, dp_size=1).numbers
    second = batch_of([1, 3]).numbered(7, 2, dp_rank=1, dp_size=2).numbers
    assert whole is not None and second is not None
    assert torch.equal(second.tokens, whole.tokens[1::2])
    assert whole.tokens.flatten().tolist() == list(range(48))


@pytest.mark.parametrize("recompute", [0.0, 1.0])
def test_model_drops_in_training_only_and_recomputes_the_same_masks(
    recompute: float,
) -> None:
    shape: dict[str, Any] = dict(
        model_type="LLAMA2", num_layers=2, hidden_size=16, num_attention_heads=2,
        vocab_size=40, mlp_ratio=1.0, multiple_of=8, dtype="float64", init_type="normal",
    )  # fmt: skip
    rates = {"drop_rate": 0.3, "attn_drop_rate": 0.3}
    batch = batch_of([0])
    gradients = []
    for extra in ({"checkpoint": 0.0}, {"checkpoint": recompute}):
        model = build_model(ModelConfig(**shape, **rates, **extra))
        initialize_weights(model, seed=1)
        bounds = micro_batch_bounds(batch.numbered(7, 0, 0, 1), 0)
        model(batch.tokens[0], bounds).square().sum().backward()
        gradients.append(
            [p.grad for n, p in model.named_parameters() if "head" not in n]
        )
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    plain = build_model(ModelConfig(**shape))
    initialize_weights(plain, seed=1)
    unnumbered = micro_batch_bounds(batch, 0)
    assert torch.equal(
        model(batch.tokens[0], unnumbered), plain(batch.tokens[0], unnumbered)
    )
    assert not torch.equal(
        model(batch.tokens[0], bounds), plain(batch.tokens[0], unnumbered)
    )
