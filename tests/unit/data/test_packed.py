"""Packing against the worked example and a token-by-token oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomesh.data.packing.packs import PackedCorpus, PackPlan, PackRule
from evomesh.data.token_files.bin_dataset import BinDataset

IGN = -100


class Listed:
    """Documents in memory."""

    name = "listed"

    def __init__(self, documents: list[list[int]], type_id: int = 0) -> None:
        self.documents, self.type_id = documents, type_id
        self.lengths = np.array([len(document) for document in documents], np.int64)

    def read(self, documents: Any) -> Any:
        return np.array([token for i in documents for token in self.documents[int(i)]], np.int64)


def unshuffled(documents: list[list[int]]) -> Listed:
    """Documents placed so that the fixed shuffle brings them back into the given order."""
    order = np.arange(len(documents))
    np.random.RandomState(1024).shuffle(order)
    placed: list[list[int]] = [[]] * len(documents)
    for place, index in enumerate(order):
        placed[index] = documents[place]
    return Listed(placed)


def oracle(documents: list[list[int]], rule: PackRule, pad: bool = False) -> list[dict[str, list[int]]]:
    """The rules of one stream, one token at a time."""
    order = list(range(len(documents)))
    array = np.arange(len(documents))
    np.random.RandomState(1024).shuffle(array)
    order = [int(i) for i in array]
    stream = []  # token, next token of the same document or None, next of the stream or None, document
    for i in order:
        for j, token in enumerate(documents[i]):
            stream.append((token, documents[i][j + 1] if j + 1 < len(documents[i]) else None, i))
    packs = []
    length = rule.packed_length
    count = len(stream) // length + (1 if pad and len(stream) % length else 0)
    for k in range(count):
        part = stream[k * length : (k + 1) * length]
        tokens = [abs(token) for token, _, _ in part]
        labels = []
        for n, (_, inner, _) in enumerate(part):
            if rule.order == "xtuner":
                target = part[n + 1][0] if n + 1 < len(part) else None
            else:
                target = None if rule.one_sample and n == length - 1 else inner
            labels.append(target if target is not None and target > 0 else IGN)
        cu, indexes = [0], []
        for n, (_, _, document) in enumerate(part):
            new = n > 0 and document != part[n - 1][2]
            if rule.one_sample:
                new = n > 0 and n % rule.seq_len == 0
            elif rule.order == "internevo" and indexes and indexes[-1] == rule.seq_len - 1:
                new = True
            if new:
                cu.append(n)
            indexes.append(0 if new or n == 0 else indexes[-1] + 1)
        missing = length - len(part)
        if missing:
            if not rule.one_sample:
                start, limit = len(part), length if rule.order == "xtuner" else rule.seq_len
                for n in range(missing):
                    if n % limit == 0:
                        cu.append(start + n)
                    indexes.append(n % limit)
            else:
                for n in range(len(part), length):
                    if n % rule.seq_len == 0:
                        cu.append(n)
                    indexes.append(n % rule.seq_len)
            tokens += [0] * missing
            labels += [IGN] * missing
        packs.append({"tokens": tokens, "labels": labels, "indexes": indexes, "cu_seqlens": [*cu, length]})
    return packs


def as_dict(pack: Any) -> dict[str, list[int]]:
    return {name: getattr(pack, name).tolist() for name in ("tokens", "labels", "indexes", "cu_seqlens")}


EXAMPLE = [[1, 2], [3, 4], [5, 6, 7], [8, 9, 10, 11, 12, 13]]


def test_worked_example_of_the_cut_mode() -> None:
    plan = PackPlan([unshuffled(EXAMPLE)], PackRule(packed_length=5, seq_len=3))
    assert len(plan) == 2
    assert plan.dropped == 3
    assert as_dict(plan.read(0)) == {
        "tokens": [1, 2, 3, 4, 5],
        "labels": [2, IGN, 4, IGN, 6],
        "indexes": [0, 1, 0, 1, 0],
        "cu_seqlens": [0, 2, 4, 5],
    }
    assert as_dict(plan.read(1)) == {
        "tokens": [6, 7, 8, 9, 10],
        "labels": [7, IGN, 9, 10, 11],
        "indexes": [0, 1, 0, 1, 2],
        "cu_seqlens": [0, 2, 5],
    }


def test_one_sample_loses_the_target_at_the_pack_end_and_ignores_document_borders() -> None:
    plan = PackPlan([unshuffled(EXAMPLE)], PackRule(packed_length=6, seq_len=3, one_sample=True))
    assert as_dict(plan.read(0)) == {
        "tokens": [1, 2, 3, 4, 5, 6],
        "labels": [2, IGN, 4, IGN, 6, IGN],
        "indexes": [0, 1, 2, 0, 1, 2],
        "cu_seqlens": [0, 3, 6],
    }


def test_a_piece_longer_than_seq_len_is_split_and_its_labels_go_on() -> None:
    plan = PackPlan([Listed([list(range(1, 11))])], PackRule(packed_length=8, seq_len=3))
    assert as_dict(plan.read(0)) == {
        "tokens": [1, 2, 3, 4, 5, 6, 7, 8],
        "labels": [2, 3, 4, 5, 6, 7, 8, 9],
        "indexes": [0, 1, 2, 0, 1, 2, 0, 1],
        "cu_seqlens": [0, 3, 6, 8],
    }


def test_negative_and_zero_ids_are_inputs_but_no_targets() -> None:
    plan = PackPlan([Listed([[5, -6, 0, 7]])], PackRule(packed_length=4, seq_len=4))
    pack = plan.read(0)
    assert pack.tokens.tolist() == [5, 6, 0, 7]
    assert pack.labels.tolist() == [IGN, IGN, 7, IGN]


def test_xtuner_trains_across_documents_but_not_past_the_pack() -> None:
    plan = PackPlan([unshuffled(EXAMPLE)], PackRule(packed_length=5, seq_len=5, order="xtuner"))
    assert plan.read(0).labels.tolist() == [2, 3, 4, 5, IGN]


documents = st.lists(st.lists(st.integers(-9, 9), max_size=12), min_size=1, max_size=9)


@given(
    documents, st.integers(1, 4), st.integers(1, 3), st.booleans(), st.sampled_from(["internevo", "xtuner"])
)
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("remainder", ["drop", "pad"])
def test_any_documents_pack_as_the_oracle_says(
    remainder: Any, found: list[list[int]], seq_len: int, micro_bsz: int, one_sample: bool, order: Any
) -> None:
    rule = PackRule(seq_len * micro_bsz, seq_len, one_sample, order)
    plan = PackPlan([Listed(found)], rule, remainder)
    expected = oracle(found, rule, pad=remainder == "pad")
    assert [as_dict(plan.read(k)) for k in range(len(plan))] == expected


@given(documents, documents, st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_carry_is_one_stream_of_all_files(
    first: list[list[int]], second: list[list[int]], length: int
) -> None:
    plan = PackPlan([Listed(first, 3), Listed(second, 5)], PackRule(length, length), "carry")
    alone = [PackPlan([Listed(one)], PackRule(1, 1)) for one in (first, second)]
    stream = [int(plan.read(k).tokens[0]) for plan in alone for k in range(len(plan))]
    types = [3] * len(alone[0]) + [5] * len(alone[1])
    assert len(plan) == len(stream) // length
    packs = [plan.read(k) for k in range(len(plan))]
    assert [t for pack in packs for t in pack.tokens.tolist()] == stream[: len(plan) * length]
    assert [t for pack in packs for t in pack.type_ids.tolist()] == types[: len(plan) * length]


def test_corpus_numbers_packs_in_file_order() -> None:
    plans = [PackPlan([Listed([[n] * 5], n)], PackRule(2, 2)) for n in (1, 2, 3)]
    corpus = PackedCorpus(plans)
    assert len(corpus) == 6
    assert [corpus.read(k).tokens[0] for k in range(6)] == [1, 1, 2, 2, 3, 3]
    assert [corpus.read(k).type_ids[0] for k in range(6)] == [1, 1, 2, 2, 3, 3]


def test_pack_of_a_file_reads_the_same_with_min_length(write_bin: Any) -> None:
    rng = np.random.RandomState(0)
    found = [rng.randint(1, 90, rng.randint(0, 20)).tolist() for _ in range(50)]
    path: Path = write_bin(found)
    kept = [document for document in found if len(document) >= 8]
    one = PackPlan([BinDataset(path, min_length=8)], PackRule(16, 16))
    other = PackPlan([Listed(kept)], PackRule(16, 16))
    assert [as_dict(one.read(k)) for k in range(len(one))] == [
        as_dict(other.read(k)) for k in range(len(other))
    ]
