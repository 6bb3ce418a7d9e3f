"""Packing loss against the packs themselves, read one by one."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from evomesh.config.data import DataConfig
from evomesh.data.packing.rows import make_plan
from evomesh.data.survey.packing_loss import SEQ_LENS, packing_loss, packing_losses
from evomesh.data.token_files.bin_dataset import BinDataset

OPTIONS: dict[str, dict[str, Any]] = {
    "drop": {},
    "pad": {"remainder": "pad"},
    "carry": {"remainder": "carry"},
    "long packs": {"micro_bsz": 4},
    "one sample": {"pack_sample_into_one": True, "micro_bsz": 2},
    "xtuner": {"order": "xtuner", "micro_bsz": 2},
    "min_length": {"min_length": 9},
    "rows": {"use_packed_dataset": False, "micro_bsz": 2},
    "padded rows": {"use_packed_dataset": False, "micro_bsz": 3, "remainder": "pad"},
}


def files(write_bin: Any) -> list[Any]:
    """Two files in which every token has its own id, so that a pack says what is in it."""
    generator = np.random.default_rng(0)
    paths = []
    next_id = 1
    for name, count in (("train/en/a.bin", 23), ("train/cn/b.bin", 9)):
        documents = []
        for length in generator.integers(1, 40, count).tolist():
            documents.append(list(range(next_id, next_id + length)))
            next_id += length
        paths.append(write_bin(documents, name))
    return paths


def by_reading(sources: list[BinDataset], config: DataConfig) -> dict[str, int]:
    """Read every pack and count what is in it and what is missing."""
    streams = [[source] for source in sources]
    if config.remainder == "carry":
        streams = [sources]
    document_of: dict[int, tuple[int, int]] = {}
    lengths: dict[tuple[int, int], int] = {}
    for number, source in enumerate(sources):
        for document in range(len(source)):
            ids = source.read(np.array([document])).tolist()
            lengths[number, document] = len(ids)
            for token in ids:
                document_of[token] = (number, document)
    seen: set[int] = set()
    packs = 0
    padding = 0
    segments: Counter[tuple[int, int]] = Counter()
    for stream in streams:
        plan = make_plan(stream, config)
        for number in range(len(plan)):
            pack = plan.read(number)
            packs += 1
            padding += int((pack.tokens == 0).sum())
            seen |= set(pack.tokens.tolist()) - {0}
            for start, stop in pairwise(pack.cu_seqlens.tolist()):
                inside = set(pack.tokens[start:stop].tolist()) - {0}
                for document in {document_of[token] for token in inside}:
                    segments[document] += 1
    split = [document for document, count in segments.items() if count > 1]
    return {
        "packs": packs,
        "padding": padding,
        "dropped": len(document_of) - len(seen),
        "split": len(split),
        "split_tokens": sum(lengths[document] for document in split),
    }


@pytest.mark.parametrize("seq_len", [7, 16, 500])
@pytest.mark.parametrize("name", OPTIONS)
def test_counts_are_those_of_the_packs(write_bin: Any, name: str, seq_len: int) -> None:
    config = DataConfig(seq_len=seq_len, **OPTIONS[name])
    paths = files(write_bin)
    sources = [BinDataset(path, min_length=config.min_length) for path in paths]
    row = packing_loss(sources, config)
    expected = by_reading(sources, config)
    if name == "one sample" and seq_len < 500:
        assert expected["split"] > 0
    # A document that ends in a dropped tail is split there too: only a part is seen.
    partly = row["split"] - expected["split"]
    assert 0 <= partly <= len(sources)
    for key in ("packs", "padding", "dropped"):
        assert row[key] == expected[key], key
    stored = sum(source.tokens for source in sources)
    kept = sum(source.kept_tokens for source in sources)
    assert (row["tokens"], row["short"]) == (stored, stored - kept)


def test_split_documents_are_those_in_several_segments(write_bin: Any) -> None:
    # Stored in such an order that the fixed shuffle leaves 4, 3, 6 and 3 tokens.
    order = np.arange(4)
    np.random.RandomState(1024).shuffle(order)
    stored: list[list[int]] = [[]] * 4
    for place, length in zip(order.tolist(), (4, 3, 6, 3), strict=True):
        stored[place] = [1] * length
    source = BinDataset(write_bin(stored))

    def split(**options: Any) -> tuple[int, int, int]:
        row = packing_loss([source], DataConfig(**options))
        return row["split"], row["split_tokens"], row["dropped"]

    # Packs of 8: the 6 are in both, where the second pack ends with the last document.
    assert split(seq_len=8) == (1, 6, 0)
    # Segments of 5 in packs of 10: the 6 cross the pack and 3 of it are there.
    assert split(seq_len=5, micro_bsz=2) == (1, 6, 6)
    # One pack of 16 and segments of 4: the document of 6 alone is longer.
    assert split(seq_len=4, micro_bsz=4) == (1, 6, 0)
    assert split(seq_len=4, micro_bsz=4, order="xtuner") == (0, 0, 0)
    # At 4, 8 and 12 whatever the documents: the 3 end at 7, the 6 at 13, the last at 16.
    assert split(seq_len=4, micro_bsz=4, pack_sample_into_one=True) == (1, 6, 0)


def test_rows_are_in_order_and_mark_the_config(write_bin: Any) -> None:
    sources = [BinDataset(path) for path in files(write_bin)]
    rows = packing_losses(sources, DataConfig(seq_len=3000, micro_bsz=2))
    assert [row["seq_len"] for row in rows] == sorted([*SEQ_LENS, 3000])
    assert [row["seq_len"] for row in rows if row["is_config"]] == [3000]
    # What fills no pack is dropped, not refused as in training.
    assert rows[-1]["packs"] == 0
    assert rows[-1]["dropped"] == rows[-1]["tokens"]
