"""The key/value cache against a forward pass over all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evomesh.config.families import architecture_of
from evomesh.generate.cache import KeyValueCache
from evomesh.layers.products import linear
from evomesh.layers.sequence_bounds import single_sequence
from tests.support.covers import covers
from tests.support.decoders import VOCAB, tiny

CPU = torch.device("cpu")


WINDOWS = [
    {},
    {"model_type": "MISTRAL", "sliding_window": 6},
    {
        "model_type": "QWEN2",
        "no_bias": False,
        "o_bias": False,
        "sliding_window": 9,
        "layer_types": ("sliding_attention", "full_attention"),
    },
    {"model_type": "SMOLLM3", "nope_layers": (1,), "sliding_window": 6},
    {
        "model_type": "GEMMA3",
        "tie_word_embeddings": True,
        "qk_norm": True,
        "sliding_window": 9,
        "layer_types": ("sliding_attention", "full_attention"),
        "local_rope_base": 50.0,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 20.0,
        **architecture_of("GEMMA3"),
    },
    {"qk_norm": True, **architecture_of("OLMO2")},
]


@covers("model.sliding_window", "model.layer_types")
@pytest.mark.parametrize("changes", WINDOWS)
def test_cached_logits_equal_uncached_logits_whatever_the_sequences_do(
    changes: dict[str, Any],
) -> None:
    """A third sequence joins two, the first leaves, the others are swapped: each continues as if alone."""
    model = tiny(**changes)
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(VOCAB, (30,), generator=draw).tolist() for _ in range(3)]
    with torch.inference_mode():
        wanted = [
            model.logits(model(torch.tensor(row), single_sequence(30))) for row in rows
        ]
        cache = KeyValueCache(3, 30)
        slots, lengths = [0, 1], [5, 12, 8]

        def read(new: list[int]) -> None:
            docs, attend = cache.prefill([lengths[row] for row in new], CPU)
            ids = torch.tensor(
                [token for row in new for token in rows[row][: lengths[row]]]
            )
            got = model.logits(model(ids, docs, attend))
            expected = torch.cat([wanted[row][: lengths[row]] for row in new])
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)

        def go_on(steps: int) -> None:
            for _ in range(steps):
                docs, attend = cache.decode_step(CPU)
                ids = torch.tensor([rows[row][lengths[row]] for row in slots])
                got = model.logits(model(ids, docs, attend))
                expected = torch.stack([wanted[row][lengths[row]] for row in slots])
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
                for row in slots:
                    lengths[row] += 1

        read([0, 1])
        go_on(3)
        read([2])
        slots = [0, 1, 2]
        go_on(3)
        cache.release(0)
        slots = [2, 1]  # the last one takes the free slot
        go_on(3)
        cache.reorder([1, 0])
        slots = [1, 2]
        go_on(3)
        cache.reorder([1, 1])
        lengths[2] = cache.lengths[0]
        slots = [2, 2]
        docs, attend = cache.decode_step(CPU)
        got = model.logits(model(torch.tensor([rows[2][lengths[2]]] * 2), docs, attend))
        torch.testing.assert_close(
            got, wanted[2][lengths[2]].expand(2, -1), rtol=0, atol=1e-12
        )


def test_a_released_slot_keeps_no_trace() -> None:
    model = tiny()
    cache = KeyValueCache(2, 8)
    with torch.inference_mode():
        docs, attend = cache.prefill([3, 6], CPU)
        model(torch.arange(9), docs, attend)
        cache.release(0)
        cache.release(0)
    assert cache.lengths == []
    assert all(not part.any() for tensors in cache._layers.values() for part in tensors)


def test_memory_is_that_of_all_slots() -> None:
    model = tiny()
    cache = KeyValueCache(3, 10)
    with torch.inference_mode():
        docs, attend = cache.prefill([2], CPU)
        model(torch.arange(2), docs, attend)
    # K and v, layers, slots, tokens, heads, width, bytes.
    assert cache.size_in_bytes() == 2 * 2 * 3 * 10 * 2 * 8 * 8


@pytest.mark.parametrize(("slots", "lengths"), [(1, [2, 2]), (2, [2, 9])])
def test_no_room(slots: int, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="no room"):
        KeyValueCache(slots, 8).prefill(lengths, CPU)


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 32, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_decoding_products_are_those_of_training(rows: int, bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(n, 12, dtype=torch.float64, generator=draw) for n in (rows, 7)
    )
    offset = torch.randn(7, dtype=torch.float64, generator=draw) if bias else None
    with torch.no_grad():
        got = linear(x, weight, offset)
    assert got.is_contiguous()
    torch.testing.assert_close(
        got, torch.nn.functional.linear(x, weight, offset), rtol=0, atol=1e-14
    )


def test_a_layer_with_a_window_keeps_no_more_than_it() -> None:
    """Two layers of 4 slots, 2 heads, 8 wide, keys and values, in float64: 100 tokens in one, 9 in the other."""
    model = tiny(**WINDOWS[2])
    cache = KeyValueCache(4, 100)
    docs, attend = cache.prefill([12], CPU)
    with torch.inference_mode():
        model(torch.arange(12), docs, attend)
    assert cache.size_in_bytes() == 4 * 2 * 8 * 2 * 8 * (100 + 9)
