from __future__ import annotations

from evomesh.optim.groups import has_weight_decay

NAMES = [
    "embedding.weight",
    "layers.0.attention.wqkv.weight",
    "layers.0.attention.wqkv.bias",
    "layers.0.attention_norm.weight",
    "layers.0.ffn_norm.bias",
    "norm.weight",
    "head.weight",
]


def kept(*no_decay: str) -> list[str]:
    return [name for name in NAMES if not has_weight_decay(name, no_decay)]


def test_everything_is_decayed_by_default() -> None:
    assert kept() == []


def test_each_kind_can_be_left_out() -> None:
    assert kept("bias") == [NAMES[2], NAMES[4]]
    assert kept("norm") == [NAMES[3], NAMES[4], NAMES[5]]
    assert kept("embedding") == [NAMES[0]]
    assert kept("bias", "norm", "embedding") == [NAMES[0], *NAMES[2:6]]
