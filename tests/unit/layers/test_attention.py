from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from evomesh.layers import attention
from evomesh.layers.attention import SequenceBounds, _causal, _varlen, attend
from evomesh.layers.scores import (
    PLAIN_SCORES,
    ScoreRule,
    attend_to_visible,
    repeat_heads,
)
from evomesh.layers.sequence_bounds import single_sequence
from tests.support.covers import covers


def documents(lengths: list[int], padding: int = 0) -> SequenceBounds:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    bounds = torch.cat([bounds, bounds[-1:].expand(padding)]).int()
    return SequenceBounds(
        torch.cat([torch.arange(n) for n in lengths]), bounds, max(lengths)
    )


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    window: int | None = None,
    rule: ScoreRule = PLAIN_SCORES,
) -> Tensor:
    """softmax(q k^T / sqrt(H)) v with a dense mask, one head after the other; or with scores of another rule."""
    document = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor(lengths)
    )
    allowed = (document[:, None] == document[None]) & torch.ones(
        len(q), len(q), dtype=torch.bool
    ).tril()
    if window is not None:
        allowed = allowed.triu(1 - window)
    group = q.shape[1] // k.shape[1]
    heads = []
    for n in range(q.shape[1]):
        scores = q[:, n] @ k[:, n // group].T
        scores = scores * (rule.scale or q.shape[2] ** -0.5)
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        weights = torch.exp(scores - scores.max()) * allowed
        heads.append(weights / weights.sum(1, keepdim=True) @ v[:, n // group])
    return torch.stack(heads, dim=1)


RULES = [PLAIN_SCORES, ScoreRule(scale=0.3), ScoreRule(softcap=1.5)]


@covers(
    "model.sliding_window",
    "model.attn_logit_softcapping",
    "model.query_pre_attn_scalar",
)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 4, 150])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(
    "lengths", [[7], [3, 3, 3], [5, 1, 1, 9, 2], [1, 1, 6], [300, 140, 140, 3]]
)
def test_equals_dense_oracle_in_value_and_gradient(
    lengths: list[int], kv_heads: int, window: int | None, rule: ScoreRule
) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    q = torch.randn(total, 4, 6, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(total, kv_heads, 6, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    seen = torch.randn(total, 4, 6, dtype=torch.float64)
    module: Any = SimpleNamespace(window=window, scores=rule)
    ours = attend(q, k, v, documents(lengths, padding=2), module)
    expected = oracle(q, k, v, lengths, window, rule)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, [q, k, v], seen),
        torch.autograd.grad(expected, [q, k, v], seen),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_lengths_skip_padding_and_empty_documents() -> None:
    docs = SequenceBounds(
        torch.tensor([0, 1, 0, 1, 2]),
        torch.tensor([0, 2, 2, 5, 5, 5], dtype=torch.int32),
        3,
    )
    assert docs.lengths() == [2, 3]
    assert docs.span().tolist() == [2, 2, 3, 3, 3]


def test_span_counts_positions_before_the_first_token() -> None:
    assert single_sequence(2, start=5).span().tolist() == [7, 7]


@pytest.mark.parametrize(
    ("newer", "window", "keys_around"),
    [(True, None, (-1, 0)), (True, 3, (2, 0)), (False, None, None)],
)
def test_variable_length_kernel_gets_what_its_signature_knows(
    newer: bool,
    window: int | None,
    keys_around: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def signature_now(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        assert window_size == keys_around and enable_gqa and key.shape[1] == 2
        return query

    def signature_before(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool = False,
    ) -> Tensor:
        assert is_causal and key.shape[1] == 4 and torch.equal(key[:, 0], key[:, 1])
        return query

    kernel = signature_now if newer else signature_before
    monkeypatch.setitem(
        sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=kernel)
    )
    q, k = torch.randn(6, 4, 8), torch.randn(6, 2, 8)
    assert _varlen(q, k, k, documents([4, 2]), window) is q


def test_the_flash_kernel_gets_queries_that_make_up_for_its_own_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It divides by sqrt(H): the scores must come out as 0.3 q k^T."""

    def kernel(query: Tensor, *others: Tensor, window_size: tuple[int, int]) -> Tensor:
        return query / 8**0.5

    monkeypatch.setitem(
        sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=kernel)
    )
    q = torch.randn(6, 4, 8)
    found = _varlen(q, q, q, documents([4, 2]), scale=0.3)
    torch.testing.assert_close(found, 0.3 * q)


def test_a_soft_cap_never_reaches_the_flash_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_flash_takes", lambda q: True)
    module: Any = SimpleNamespace(window=None, scores=ScoreRule(softcap=1.5))
    q = torch.randn(6, 4, 8, dtype=torch.float64)
    found = attend(q, q, q, documents([4, 2]), module)
    expected = oracle(q, q, q, [4, 2], rule=module.scores)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "device, dtype, heads",
    [
        ("meta", torch.float32, 4),  # as on CUDA, whose kernel has no groups
        ("meta", torch.bfloat16, 2),
        ("cpu", torch.float32, 2),
    ],
)
def test_key_heads_are_repeated_for_the_kernel_of_float32(
    device: str,
    dtype: torch.dtype,
    heads: int,
    masked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q = torch.zeros(1, 4, 6, 8, device=device, dtype=dtype)
    k = v = torch.zeros(1, 2, 6, 8, device=device, dtype=dtype)
    seen: list[tuple[int, bool]] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert k.shape == v.shape
        seen.append((k.shape[1], options["enable_gqa"]))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    visible = torch.ones(6, 6, dtype=torch.bool, device=device)
    out = (
        attend_to_visible(q, k, v, visible)
        if masked
        else _causal(q, k, v, None, PLAIN_SCORES)
    )
    assert out.shape == q.shape
    assert seen == [(heads, heads != 4)]


def test_repeated_heads_are_those_of_their_group() -> None:
    q = torch.randn(2, 6, 5, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 5, 8, dtype=torch.float64).unbind(0)
    kernel = torch.nn.functional.scaled_dot_product_attention
    expected = kernel(q, k, v, is_causal=True, enable_gqa=True)
    found = kernel(q, repeat_heads(k, 3), repeat_heads(v, 3), is_causal=True)
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)
