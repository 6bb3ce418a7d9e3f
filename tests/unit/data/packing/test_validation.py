"""Validation sets: every target once, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomesh.config.data import DataConfig
from evomesh.data.build import build_valid_data
from evomesh.errors import UserError
from tests.support.covers import covers

IGNORED = -100


def config(tmp_path: Path, **values: Any) -> DataConfig:
    options = {
        "seq_len": 8,
        "micro_num": 3,
        "micro_bsz": 2,
        "valid_folder": str(tmp_path / "valid"),
    }
    return DataConfig(**(options | values))


def pairs_of(found: list[list[int]], seq_len: int) -> list[tuple[int, int, int]]:
    """Return (position in its segment, input, target) of every token that has a next one in its document."""
    return sorted(
        (position % seq_len, abs(document[position]), document[position + 1])
        for document in found
        for position in range(len(document) - 1)
        if document[position + 1] > 0
    )


@covers("data.valid_micro_num")
@pytest.mark.parametrize("dp_size", [1, 2, 5])
@pytest.mark.parametrize("micro_num", [1, 3])
def test_every_target_is_seen_once(
    write_bin: Any, tmp_path: Path, dp_size: int, micro_num: int
) -> None:
    rng = np.random.RandomState(0)
    first, second = (
        [rng.randint(-5, 99, rng.randint(1, 40)).tolist() for _ in range(37)]
        for _ in range(2)
    )
    write_bin(first, "valid/en/a.bin")
    write_bin(second, "valid/en/b.bin")
    (found,) = build_valid_data(config(tmp_path, valid_micro_num=micro_num), 100)
    assert found.name == "en"
    got, counts = [], []
    for rank in range(dp_size):
        batches = list(found.batches(rank, dp_size))
        counts.append(len(batches))
        for batch in batches:
            assert batch.tokens.shape == (micro_num, 16)
            used = batch.labels != IGNORED
            got += list(
                zip(
                    batch.position_ids[used].tolist(),
                    batch.tokens[used].tolist(),
                    batch.labels[used].tolist(),
                    strict=True,
                )
            )
    assert sorted(got) == pairs_of(first + second, 8)
    assert counts == [found.num_batches(dp_size)] * dp_size


def test_a_long_document_is_split_into_segments_that_predict_the_next_one(
    write_bin: Any, tmp_path: Path
) -> None:
    write_bin([[1, 2, 3], [4, 5], [6] * 19 + [7]], "valid/en/a.bin")
    (found,) = build_valid_data(config(tmp_path, valid_micro_num=2), 100)
    batch = next(found.batches(0, 1))
    assert batch.cu_seqlens.tolist() == [[0, 3, 5, 13, 16], [0, 8, 12, 16, 16]]
    assert (
        batch.labels[0].tolist()
        == [2, 3, IGNORED, 5, IGNORED] + [6] * 8 + [IGNORED] * 3
    )
    assert batch.labels[1].tolist() == [6] * 10 + [7, IGNORED] + [IGNORED] * 4


def test_every_folder_is_a_validation_set(write_bin: Any, tmp_path: Path) -> None:
    for name in (
        "valid/en/a.bin",
        "valid/code/x/a.bin",
        "valid/code/y/a.bin",
        "valid/more/x/b.bin",
    ):
        write_bin([[1, 2, 3]], name)
    assert [found.name for found in build_valid_data(config(tmp_path), 100)] == [
        "code/x",
        "en",
        "more/x",
        "y",
    ]


@covers("data.valid_min_length")
def test_documents_have_no_minimum_length_by_default(
    write_bin: Any, tmp_path: Path
) -> None:
    write_bin([[1, 2]] * 5, "valid/en/a.bin")
    write_bin([[1, 2], [1, 2, 3]] * 5, "valid/cn/a.bin")
    (every, _) = build_valid_data(config(tmp_path), 100)
    assert len(every.sources[0].lengths) == 10
    Path(tmp_path / "valid/en/a.bin").rename(tmp_path / "a.bin")
    Path(tmp_path / "valid/en/a.bin.meta").unlink()
    (long,) = build_valid_data(config(tmp_path, valid_min_length=3), 100)
    assert long.sources[0].lengths.tolist() == [3] * 5


def test_a_set_without_a_document_that_is_long_enough_is_refused(
    write_bin: Any, tmp_path: Path
) -> None:
    write_bin([[1, 2]] * 5, "valid/en/a.bin")
    write_bin([[1, 2]] * 3, "valid/cn/a.bin")
    write_bin([[1, 2, 3]] * 5, "valid/ar/a.bin")
    with pytest.raises(UserError) as caught:
        build_valid_data(config(tmp_path, valid_min_length=3), 100)
    assert (
        "none of the 3 documents of the validation set cn has data.valid_min_length=3 tokens, the longest has 2"
        in caught.value.found
    )
    assert caught.value.where == "data.valid_folder" and caught.value.fix


@pytest.mark.parametrize(
    "documents", [[[5]] * 4, [[-5, -6, -7]] * 4, [[3, -4], [2], [9, 0]], [[0, 0]]]
)
def test_a_set_without_a_target_is_refused(
    write_bin: Any, tmp_path: Path, documents: list[list[int]]
) -> None:
    write_bin(documents, "valid/en/a.bin")
    write_bin([[1, 2]] * 5, "valid/cn/a.bin")
    assert not pairs_of(documents, 8)
    tokens = sum(map(len, documents))
    with pytest.raises(
        UserError, match=f"en/a.bin: none of {tokens} tokens is a target"
    ):
        build_valid_data(config(tmp_path), 100)


def test_without_a_folder_the_set_is_synthetic() -> None:
    (found,) = build_valid_data(DataConfig(seq_len=64), 100)
    assert (found.name, found.num_packs) == ("val", 500)


@covers("data.allow_tokenizer_mismatch")
def test_training_and_validation_data_need_the_same_tokenizer(
    write_bin: Any, tmp_path: Path
) -> None:
    for part, digest in (("train", "a"), ("valid", "b")):
        path = write_bin([[1, 2, 3]], f"{part}/en/a.bin")
        Path(f"{path}.json").write_text(f'{{"tokenizer_hash": "{digest * 64}"}}')
    both = {"train_folder": str(tmp_path / "train")}
    with pytest.raises(UserError, match="two tokenizers"):
        build_valid_data(config(tmp_path, **both), 100)
    assert build_valid_data(
        config(tmp_path, allow_tokenizer_mismatch=True, **both), 100
    )
