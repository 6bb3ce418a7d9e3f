"""``use_packed_dataset=False``: one document a row, cut and padded, against rows that are built one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomesh.config.data import DataConfig
from evomesh.data.build import build_train_data
from evomesh.data.packing.corpus import open_corpus
from evomesh.data.packing.packs import PackPlan, PackRule
from evomesh.data.packing.rows import RowPlan, make_plan
from evomesh.errors import UserError
from tests.support.covers import covers
from tests.support.xtuner import token_files
from tests.unit.data.packing.test_packs import MemorySource, as_dict, in_stream_order
from tests.unit.data.packing.test_streaming import take, texts, tokenizer, write

__all__ = ["tokenizer"]  # a fixture
pytestmark = covers("data.use_packed_dataset")

IGNORED = -100


def oracle(documents: list[list[int]], seq_len: int) -> dict[str, list[int]]:
    """Return one micro-batch, a row after the other, as InternEvo describes it."""
    pack: dict[str, list[int]] = {
        "tokens": [],
        "labels": [],
        "position_ids": [],
        "cu_seqlens": [0],
    }
    for document in documents:
        cut = document[:seq_len]
        padding = seq_len - len(cut)
        following = [token if token > 0 else IGNORED for token in cut[1:]]
        last = [IGNORED] if cut else []
        pack["tokens"] += [abs(token) for token in cut] + [0] * padding
        pack["labels"] += following + last + [IGNORED] * padding
        pack["position_ids"] += [*range(len(cut)), *range(padding)]
        start = pack["cu_seqlens"][-1]
        pack["cu_seqlens"] += [start + len(cut)] if cut and padding else []
        pack["cu_seqlens"].append(start + seq_len)
    return pack  # fmt: skip


def test_the_example_of_the_module() -> None:
    plan = RowPlan(
        [in_stream_order([[1, 2, 3], [4, 5, 6, 7, 8]])], PackRule(8, 4, rows=2)
    )
    assert as_dict(plan.read(0)) == {
        "tokens": [1, 2, 3, 0, 4, 5, 6, 7],
        "labels": [2, 3, IGNORED, IGNORED, 5, 6, 7, IGNORED],
        "position_ids": [0, 1, 2, 0, 0, 1, 2, 3],
        "cu_seqlens": [0, 3, 4, 8],
    }
    assert (len(plan), plan.dropped) == (1, 1)


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.integers(-9, 9), max_size=7), min_size=1, max_size=9
    ),
    seq_len=st.integers(1, 5),
    rows=st.integers(1, 3),
    remainder=st.sampled_from(["drop", "pad"]),
)
def test_rows_equal_those_of_the_oracle(
    documents: list[list[int]], seq_len: int, rows: int, remainder: str
) -> None:
    rule = PackRule(rows * seq_len, seq_len, rows=rows)
    plan = RowPlan([in_stream_order(documents)], rule, remainder)
    full, rest = divmod(len(documents), rows)
    assert len(plan) == full + (1 if rest and remainder == "pad" else 0)
    in_rows = 0
    for number in range(len(plan)):
        members = documents[number * rows : (number + 1) * rows]
        found = as_dict(plan.read(number))
        missing = (rows - len(members)) * seq_len
        expected = oracle(members, seq_len)
        for key in ("tokens", "labels"):
            fill = 0 if key == "tokens" else IGNORED
            assert found[key] == expected[key] + [fill] * missing
        if not missing:
            assert found["position_ids"] == expected["position_ids"]
            assert found["cu_seqlens"] == expected["cu_seqlens"]
        spans = [(span.offset, span.stop - span.start) for span in plan.spans(number)]
        lengths = [min(len(member), seq_len) for member in members]
        assert spans == [(row * seq_len, length) for row, length in enumerate(lengths)]
        in_rows += sum(lengths)
    assert plan.dropped == sum(map(len, documents)) - in_rows


def test_a_document_knows_its_micro_batch() -> None:
    source = MemorySource([[1], [2, 3], [4, 5, 6], [7]])
    plan = RowPlan([source], PackRule(4, 2, rows=2))
    for document in range(4):
        (pack,) = plan.packs_of(0, document)
        assert document in [span.document for span in plan.spans(pack)]


def options(folder: Path, **values: Any) -> DataConfig:
    sizes = {"seq_len": 16, "micro_bsz": 3, "micro_num": 2}
    return DataConfig(
        train_folder=str(folder), use_packed_dataset=False, **sizes | values
    )


def test_token_files_give_batches_of_rows_and_resume(tmp_path: Path) -> None:
    """Documents of 24 tokens in rows of 16; steps are the same for one rank and for two."""
    token_files(tmp_path, {"en/a.bin": 20, "en/b.bin": 13})
    config = options(tmp_path)
    data = build_train_data(config, 64)
    assert data.num_packs == 20 // 3 + 13 // 3
    dropped = [row["dropped"] for row in data.report]
    assert dropped == [2 * 24 + 18 * 8, 1 * 24 + 12 * 8]
    batch = next(iter(data.stream()))
    assert batch.tokens.shape == (2, 48)
    assert batch.cu_seqlens.tolist() == [[0, 16, 32, 48, 48]] * 2
    assert (batch.labels.view(2, 3, 16)[:, :, -1] == IGNORED).all()
    halves = [next(iter(data.stream(rank, 2))).tokens for rank in range(2)]
    whole = options(tmp_path, micro_num=4)
    both = next(iter(build_train_data(whole, 64).stream())).tokens
    assert sorted(both.tolist()) == sorted([row for half in halves for row in half.tolist()])  # fmt: skip


def test_shared_index_is_not_that_of_packs(tmp_path: Path) -> None:
    token_files(tmp_path / "data", {"en/a.bin": 9})
    sizes = {"use_shm": True, "shm_path": str(tmp_path / "shm")}
    packed = options(tmp_path / "data", **sizes).model_copy(
        update={"use_packed_dataset": True}
    )
    for config, packs in (
        (packed, 9 * 24 // 48),
        (options(tmp_path / "data", **sizes), 3),
    ):
        assert open_corpus(config, 64).num_packs == packs
    assert type(make_plan([MemorySource([[1]])], packed)) is PackPlan


def test_too_few_documents_are_refused_with_the_number(tmp_path: Path) -> None:
    token_files(tmp_path, {"en/a.bin": 2})
    with pytest.raises(
        UserError, match="2 documents after filtering, a micro-batch needs 3"
    ):
        open_corpus(options(tmp_path), 64)


def test_streaming_text_has_one_document_a_row(tmp_path: Path, tokenizer: Path) -> None:
    folder = write(tmp_path / "text", texts(40))
    config = options(folder, type="streaming", tokenizer_path=str(tokenizer))
    data = build_train_data(config, 2000)
    stream = data.stream()
    iterator = iter(stream)
    first = [next(iterator) for _ in range(2)]
    state = stream.state()
    following = take(iterator, 2)
    for batch in first:
        assert batch.tokens.shape == (2, 48)
        starts = batch.position_ids.view(2, 3, 16)[:, :, 0]
        assert not starts.any()  # each row begins a segment
    assert take(iter(data.stream(state=state)), 2) == following
