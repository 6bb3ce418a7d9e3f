"""Long documents, which many packs read."""

from __future__ import annotations

from typing import Any

import pytest

from evomesh.data.packing.packs import PackPlan, PackRule
from evomesh.data.token_files import bin_dataset
from evomesh.data.token_files.lines import IntArray, parse_ranges
from tests.unit.data.conftest import WriteBin


def test_packs_inside_a_long_document_parse_its_line_once(
    write_bin: WriteBin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bin_dataset, "LONG", 100)
    documents = [
        list(range(1, 21)),
        list(range(100, 420)),
        list(range(30, 60)),
        list(range(500, 700)),
    ]
    parsed: list[list[int]] = []

    def count(
        file: memoryview, starts: IntArray, ends: IntArray, lengths: IntArray
    ) -> Any:
        parsed.append(lengths.tolist())
        return parse_ranges(file, starts, ends, lengths)

    monkeypatch.setattr(bin_dataset, "parse_ranges", count)
    last_long = bin_dataset.LongLineCache()  # shared by both files
    for name, stored in (
        ("train/en/a.bin", documents),
        ("train/en/b.bin", documents[::-1]),
    ):
        plan = PackPlan(
            [bin_dataset.BinDataset(write_bin(stored, name), last_long=last_long)],
            PackRule(16, 16),
        )
        stream = [
            token for document in plan.document_order for token in stored[document]
        ]
        parsed.clear()
        for pack in range(len(plan)):
            assert plan.read(pack).tokens.tolist() == stream[16 * pack : 16 * pack + 16]
        long = [lengths for lengths in parsed if max(lengths) >= 100]
        assert sorted(long) == [[200], [320]]
        assert last_long.found[0].name == name[-5:]
