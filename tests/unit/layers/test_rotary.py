from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from evomesh.config.rope import RopeScaling, scaling_problems
from evomesh.layers.rotary import RotaryEmbedding, split_and_rotate
from evomesh.layers.sequence_bounds import SequenceBounds, single_sequence
from tests.support.covers import covers
from tests.support.stock_rope import stock_frequencies


def test_angles_by_hand_in_float64() -> None:
    cos, sin = RotaryEmbedding(head_dim=4, base=100.0).tables(
        single_sequence(3), torch.float64
    )
    expected = torch.tensor([[p, p * 0.1] for p in range(3)], dtype=torch.float64)
    torch.testing.assert_close(cos, expected.cos(), rtol=1e-15, atol=0)
    torch.testing.assert_close(sin, expected.sin(), rtol=1e-15, atol=0)
    assert (
        RotaryEmbedding(4, 100.0).tables(single_sequence(3), torch.bfloat16)[0].dtype
        is torch.float32
    )


@covers("model.use_dynamic_ntk_rope")
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_dynamic_ntk_stretches_the_base_beyond_the_trained_length(
    factor: float,
) -> None:
    length, trained, head_dim = 12, 8, 6
    rotary = RotaryEmbedding(
        head_dim, 10000.0, dynamic_ntk=True, max_position=trained, factor=factor
    )
    base = 10000.0 * (factor * length / trained - (factor - 1)) ** (
        head_dim / (head_dim - 2)
    )
    angle = [math.cos(7 * base ** (-2 * i / head_dim)) for i in range(3)]
    assert rotary.tables(single_sequence(length), torch.float64)[0][
        7
    ].tolist() == pytest.approx(angle, rel=1e-13)
    plain = RotaryEmbedding(head_dim, 10000.0).tables(
        single_sequence(trained), torch.float64
    )[0]
    assert torch.equal(rotary.tables(single_sequence(trained), torch.float64)[0], plain)


def test_a_packed_document_is_stretched_by_its_own_length() -> None:
    rotary = RotaryEmbedding(6, 10000.0, dynamic_ntk=True, max_position=8)
    packed = SequenceBounds(
        torch.cat([torch.arange(12), torch.arange(5)]),
        torch.tensor([0, 12, 17, 17]).int(),
        12,
    )
    cos, _ = rotary.tables(packed, torch.float64)
    assert torch.equal(cos[:12], rotary.tables(single_sequence(12), torch.float64)[0])
    assert torch.equal(cos[12:], rotary.tables(single_sequence(5), torch.float64)[0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
def test_split_and_rotation_as_complex_numbers(interleaved: bool, queries: int) -> None:
    torch.manual_seed(0)
    tokens, groups, head_dim = 5, 2, 8
    qkv = torch.randn(
        tokens,
        groups * (queries + 2) * head_dim,
        dtype=torch.float64,
        requires_grad=True,
    )
    cos, sin = RotaryEmbedding(head_dim, 10000.0).tables(
        single_sequence(tokens), torch.float64
    )
    turn = torch.complex(cos, sin)[:, None, None]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        if interleaved:
            return torch.view_as_real(
                torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn
            ).flatten(-2)
        both = torch.complex(x[..., : head_dim // 2], x[..., head_dim // 2 :]) * turn
        return torch.cat([both.real, both.imag], dim=-1)

    heads = qkv.view(tokens, groups, queries + 2, head_dim)
    expected = (
        rotated(heads[:, :, :queries]).flatten(1, 2),
        rotated(heads[:, :, queries : queries + 1]).squeeze(2),
        heads[:, :, -1],
    )
    ours = split_and_rotate(
        qkv, cos, sin, kv_heads=groups, head_dim=head_dim, interleaved=interleaved
    )
    seen = [torch.randn_like(x) for x in expected]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    (a,), (b,) = (
        torch.autograd.grad(ours, qkv, seen),
        torch.autograd.grad(expected, qkv, seen),
    )
    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def stock_tables(
    settings: dict[str, Any],
    head_dim: int,
    length: int,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Cosines and sines of transformers' own table [length, H/2], its float32 made float64."""
    config = pytest.importorskip("transformers").LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 500.0, **settings},
    )
    frequencies, factor = stock_frequencies(config, length, monkeypatch)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos() * factor, angles.sin() * factor


LONG = {
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
}
LONG["long_factor"] = [2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


@covers(
    "model.rope_scaling.type",
    "model.rope_scaling.factor",
    "model.rope_scaling.original_max_position_embeddings",
    "model.rope_scaling.low_freq_factor",
    "model.rope_scaling.high_freq_factor",
    "model.rope_scaling.beta_fast",
    "model.rope_scaling.beta_slow",
    "model.rope_scaling.attention_factor",
    "model.rope_scaling.mscale",
    "model.rope_scaling.mscale_all_dim",
    "model.rope_scaling.truncate",
    "model.rope_scaling.short_factor",
    "model.rope_scaling.long_factor",
)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("linear", {"factor": 3.0}),
        ("llama3", YARN | {"low_freq_factor": 1.0, "high_freq_factor": 2.0}),
        ("llama3", YARN | {"low_freq_factor": 0.25, "high_freq_factor": 4.0}),
        ("yarn", YARN),
        ("yarn", YARN | {"attention_factor": 1.5}),
        ("yarn", YARN | {"beta_fast": 2.0, "beta_slow": 0.125, "truncate": False}),
        ("yarn", YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}),
        ("longrope", LONG),
        ("longrope", LONG | {"factor": 2.0}),
        ("longrope", LONG | {"attention_factor": 1.25}),
    ],
)
@pytest.mark.parametrize("length", [12, 40])
def test_scaled_tables_equal_those_of_transformers(
    kind: str, settings: dict[str, Any], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling = RopeScaling.model_validate({"type": kind, **settings}, strict=False)
    assert not scaling_problems(scaling, 16)
    rotary = RotaryEmbedding(16, 500.0, max_position=64, scaling=scaling)
    found = rotary.tables(single_sequence(length), torch.float64)
    expected = stock_tables({"rope_type": kind, **settings}, 16, length, monkeypatch)
    plain = RotaryEmbedding(16, 500.0).tables(single_sequence(length), torch.float64)
    for ours, theirs, unscaled in zip(found, expected, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
        assert not torch.allclose(ours, unscaled)


def test_longrope_looks_at_each_packed_document_alone() -> None:
    scaling = RopeScaling.model_validate({"type": "longrope", **LONG}, strict=False)
    rotary = RotaryEmbedding(16, 500.0, max_position=64, scaling=scaling)
    packed = SequenceBounds(
        torch.cat([torch.arange(20), torch.arange(5)]),
        torch.tensor([0, 20, 25, 25]).int(),
        20,
    )
    cos, _ = rotary.tables(packed, torch.float64)
    assert torch.equal(cos[:20], rotary.tables(single_sequence(20), torch.float64)[0])
    assert torch.equal(cos[20:], rotary.tables(single_sequence(5), torch.float64)[0])
