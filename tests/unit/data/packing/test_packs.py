"""Packing compared with the worked example and with a token-by-token oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomesh.config.data import DataConfig
from evomesh.data.packing.corpus import Corpus
from evomesh.data.packing.packs import PackPlan, PackRule
from evomesh.data.token_files.bin_dataset import BinDataset
from tests.support.covers import covers

pytestmark = covers("promise:pack-sample-into-one")

IGNORED = -100
PADDING = -1


class MemorySource:
    """Documents in memory."""

    name = "memory"

    def __init__(self, documents: list[list[int]], type_id: int = 0) -> None:
        self.documents = documents
        self.type_id = type_id
        self.lengths = np.array([len(document) for document in documents], np.int64)

    def read(self, documents: Any) -> Any:
        return np.array(
            [token for i in documents for token in self.documents[int(i)]], np.int64
        )


def in_stream_order(documents: list[list[int]]) -> MemorySource:
    """Return documents stored so that the fixed shuffle restores the given order."""
    order = np.arange(len(documents))
    np.random.RandomState(1024).shuffle(order)
    placed: list[list[int]] = [[]] * len(documents)
    for position, index in enumerate(order):
        placed[index] = documents[position]
    return MemorySource(placed)


class StreamToken(NamedTuple):
    document: int  # PADDING: of no document
    position: int
    token: int


def oracle(
    documents: list[list[int]], rule: PackRule, pad: bool = False
) -> list[dict[str, list[int]]]:
    """Return the packs of one stream, built one token at a time; padding is one more document of zeros."""
    order = np.arange(len(documents))
    np.random.RandomState(1024).shuffle(order)
    stream = [
        StreamToken(i, j, token)
        for i in order.tolist()
        for j, token in enumerate(documents[i])
    ]
    if pad and len(stream) % rule.packed_length:
        missing = rule.packed_length - len(stream) % rule.packed_length
        stream += [StreamToken(PADDING, j, 0) for j in range(missing)]
    packs = []
    for k in range(len(stream) // rule.packed_length):
        pack = stream[k * rule.packed_length : (k + 1) * rule.packed_length]
        starts = [n for n in range(len(pack)) if starts_segment(pack, n, rule)]
        packs.append(
            {
                "tokens": [abs(one.token) for one in pack],
                "labels": [
                    label_of(pack, n, documents, rule) for n in range(len(pack))
                ],
                "position_ids": [
                    n - max(start for start in starts if start <= n)
                    for n in range(len(pack))
                ],
                "cu_seqlens": [*starts, len(pack)],
            }
        )
    return packs


def starts_segment(pack: list[StreamToken], n: int, rule: PackRule) -> bool:
    """Return whether attention restarts at position n of a pack."""
    if rule.one_sample:
        return n % rule.seq_len == 0
    document_start = [one.document for one in pack].index(pack[n].document)
    if rule.order == "internevo":
        return (n - document_start) % rule.seq_len == 0
    return n == document_start


def label_of(
    pack: list[StreamToken], n: int, documents: list[list[int]], rule: PackRule
) -> int:
    """Return the token that position n of a pack predicts, or ``IGNORED``."""
    document, position, _ = pack[n]
    last_of_pack = n == len(pack) - 1
    if last_of_pack and (rule.one_sample or rule.order == "xtuner"):
        target = 0  # never trained
    elif rule.order == "xtuner":
        target = pack[n + 1].token
    elif document == PADDING or position + 1 == len(documents[document]):
        target = 0
    else:
        target = documents[document][position + 1]
    return target if target > 0 else IGNORED


def as_dict(pack: Any) -> dict[str, list[int]]:
    return {
        name: getattr(pack, name).tolist()
        for name in ("tokens", "labels", "position_ids", "cu_seqlens")
    }


def read_packs(plan: PackPlan) -> list[dict[str, list[int]]]:
    return [as_dict(plan.read(k)) for k in range(len(plan))]


EXAMPLE = [[1, 2], [3, 4], [5, 6, 7], [8, 9, 10, 11, 12, 13]]  # of InternEvo's guide


def test_the_worked_example_is_packed_as_documented() -> None:
    plan = PackPlan([in_stream_order(EXAMPLE)], PackRule(packed_length=5, seq_len=3))
    assert len(plan) == 2
    assert plan.dropped == 3
    assert as_dict(plan.read(0)) == {
        "tokens": [1, 2, 3, 4, 5],
        "labels": [2, IGNORED, 4, IGNORED, 6],
        "position_ids": [0, 1, 0, 1, 0],
        "cu_seqlens": [0, 2, 4, 5],
    }
    assert as_dict(plan.read(1)) == {
        "tokens": [6, 7, 8, 9, 10],
        "labels": [7, IGNORED, 9, 10, 11],
        "position_ids": [0, 1, 0, 1, 2],
        "cu_seqlens": [0, 2, 5],
    }


def test_one_sample_has_no_target_at_the_pack_end_and_ignores_document_borders() -> (
    None
):
    plan = PackPlan(
        [in_stream_order(EXAMPLE)],
        PackRule(packed_length=6, seq_len=3, one_sample=True),
    )
    assert as_dict(plan.read(0)) == {
        "tokens": [1, 2, 3, 4, 5, 6],
        "labels": [2, IGNORED, 4, IGNORED, 6, IGNORED],
        "position_ids": [0, 1, 2, 0, 1, 2],
        "cu_seqlens": [0, 3, 6],
    }


@covers("data.seq_len")
def test_a_long_segment_is_split_and_its_labels_cross_the_split() -> None:
    plan = PackPlan(
        [MemorySource([list(range(1, 11))])], PackRule(packed_length=8, seq_len=3)
    )
    assert as_dict(plan.read(0)) == {
        "tokens": [1, 2, 3, 4, 5, 6, 7, 8],
        "labels": [2, 3, 4, 5, 6, 7, 8, 9],
        "position_ids": [0, 1, 2, 0, 1, 2, 0, 1],
        "cu_seqlens": [0, 3, 6, 8],
    }


def test_negative_and_zero_ids_are_inputs_but_not_targets() -> None:
    plan = PackPlan(
        [MemorySource([[5, -6, 0, 7]])], PackRule(packed_length=4, seq_len=4)
    )
    pack = plan.read(0)
    assert pack.tokens.tolist() == [5, 6, 0, 7]
    assert pack.labels.tolist() == [IGNORED, IGNORED, 7, IGNORED]


def test_xtuner_trains_across_documents_but_not_past_the_pack() -> None:
    plan = PackPlan(
        [in_stream_order(EXAMPLE)], PackRule(packed_length=5, seq_len=5, order="xtuner")
    )
    assert plan.read(0).labels.tolist() == [2, 3, 4, 5, IGNORED]


documents = st.lists(st.lists(st.integers(-9, 9), max_size=12), min_size=1, max_size=9)


@covers("data.pack_sample_into_one", "data.remainder", "data.order")
@given(
    documents,
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["internevo", "xtuner"]),
)
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("remainder", ["drop", "pad"])
def test_packs_equal_those_of_a_token_by_token_oracle(
    remainder: Any,
    found: list[list[int]],
    seq_len: int,
    micro_bsz: int,
    one_sample: bool,
    order: Any,
) -> None:
    rule = PackRule(seq_len * micro_bsz, seq_len, one_sample, order)
    plan = PackPlan([MemorySource(found)], rule, remainder)
    expected = oracle(found, rule, pad=remainder == "pad")
    assert read_packs(plan) == expected


@given(documents, documents, st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_carry_is_one_stream_of_all_files(
    first: list[list[int]], second: list[list[int]], length: int
) -> None:
    plan = PackPlan(
        [MemorySource(first, 3), MemorySource(second, 5)],
        PackRule(length, length),
        "carry",
    )
    alone = [PackPlan([MemorySource(one)], PackRule(1, 1)) for one in (first, second)]
    stream = [int(plan.read(k).tokens[0]) for plan in alone for k in range(len(plan))]
    types = [3] * len(alone[0]) + [5] * len(alone[1])
    assert len(plan) == len(stream) // length
    packs = [plan.read(k) for k in range(len(plan))]
    assert [t for pack in packs for t in pack.tokens.tolist()] == stream[
        : len(plan) * length
    ]
    assert [t for pack in packs for t in pack.type_ids.tolist()] == types[
        : len(plan) * length
    ]


def test_corpus_numbers_packs_in_file_order() -> None:
    plans = [PackPlan([MemorySource([[n] * 5], n)], PackRule(2, 2)) for n in (1, 2, 3)]
    corpus = Corpus(DataConfig(), plans)
    assert len(corpus) == 6
    assert [corpus.read(k).tokens[0] for k in range(6)] == [1, 1, 2, 2, 3, 3]
    assert [corpus.read(k).type_ids[0] for k in range(6)] == [1, 1, 2, 2, 3, 3]


def test_short_documents_are_packed_as_if_they_were_not_in_the_file(
    write_bin: Any,
) -> None:
    rng = np.random.RandomState(0)
    stored = [rng.randint(1, 90, rng.randint(0, 20)).tolist() for _ in range(50)]
    path: Path = write_bin(stored)
    kept = [document for document in stored if len(document) >= 8]
    filtered = PackPlan([BinDataset(path, min_length=8)], PackRule(16, 16))
    without_short = PackPlan([MemorySource(kept)], PackRule(16, 16))
    assert read_packs(filtered) == read_packs(without_short)
