"""The training data of a config: types, report, refused input, layouts and resume."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomesh.config.data import DataConfig
from evomesh.data.build import TrainData, build_train_data, check_manifest
from evomesh.data.config_folders import other_tokenizer
from evomesh.data.packing.corpus import Corpus
from evomesh.errors import UserError
from tests.support.covers import covers
from tests.support.nobody import as_nobody

VOCAB = 1000


def config(tmp_path: Path, **values: Any) -> DataConfig:
    options = {
        "seq_len": 8,
        "micro_num": 2,
        "micro_bsz": 2,
        "num_worker": 0,
        "train_folder": str(tmp_path / "train"),
    }
    return DataConfig(**(options | values))


def documents(seed: int, count: int = 60, low: int = 1) -> list[list[int]]:
    rng = np.random.RandomState(seed)
    return [rng.randint(low, VOCAB, rng.randint(1, 30)).tolist() for _ in range(count)]


@pytest.fixture
def tree(write_bin: Any, tmp_path: Path) -> Path:
    """Write three files of two types, and a file that is not data."""
    write_bin(documents(1), "train/en/b/x.bin")
    write_bin(documents(2), "train/en/a.bin")
    write_bin(documents(3), "train/cn/deep/er/z.bin", dtype="int32")
    (tmp_path / "train" / "raw.jsonl").write_text('{"text": "beside"}\n')
    return tmp_path


def take_packs(
    data: TrainData, dp_rank: int = 0, dp_size: int = 1, steps: int = 3
) -> list[list[int]]:
    """Return the tokens of all packs that a rank reads in its first steps."""
    stream = data.stream(dp_rank=dp_rank, dp_size=dp_size)
    packs = [pack for _ in range(steps) for pack in next(stream).tokens.tolist()]
    stream.close()
    return packs


@covers("promise:raw-jsonl-beside-types")
def test_types_and_report_follow_the_files(tree: Path) -> None:
    data = build_train_data(config(tree), VOCAB)
    assert data.types == ["cn", "en"]
    assert [row["file"] for row in data.report] == [
        "cn/deep/er/z.bin",
        "en/a.bin",
        "en/b/x.bin",
    ]
    for row, seed in zip(data.report, (3, 2, 1), strict=True):
        tokens = sum(map(len, documents(seed)))
        assert (row["documents"], row["tokens"]) == (60, tokens)
        assert (row["packs"], row["dropped"], row["filtered"]) == (
            tokens // 16,
            tokens % 16,
            0,
        )
    assert data.num_packs == sum(row["packs"] for row in data.report)
    assert json.loads(json.dumps(data.manifest)) == data.manifest


@covers("promise:type-folders")
def test_the_documented_types_are_found(write_bin: Any, tmp_path: Path) -> None:
    names = ["ar", "cn", "code", "en", "ja", "kaoshi"]
    for number, name in enumerate(names, 1):
        write_bin([[number] * 16], f"train/{name}/data/set/x.bin")
    data = build_train_data(config(tmp_path, micro_num=6), VOCAB)
    assert data.types == names
    batch = next(data.stream())
    assert torch.equal(batch.type_ids + 1, batch.tokens)


@covers("data.micro_num", "data.micro_bsz", "data.packed_length")
def test_a_batch_has_the_documented_shapes_and_padded_bounds(tree: Path) -> None:
    batch = next(build_train_data(config(tree), VOCAB).stream())
    assert (
        batch.tokens.shape
        == batch.labels.shape
        == batch.position_ids.shape
        == batch.type_ids.shape
        == (2, 16)
    )
    assert batch.tokens.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    longest = 0
    for micro in range(2):
        bounds = batch.cu_seqlens[micro].tolist()
        assert bounds[0] == 0
        assert bounds[-1] == 16
        assert bounds == sorted(bounds)
        for low, high in pairwise(bounds):
            assert batch.position_ids[micro, low:high].tolist() == list(
                range(high - low)
            )
            longest = max(longest, high - low)
    assert batch.max_seqlen == longest
    assert set(batch.type_ids.flatten().tolist()) <= {0, 1}


@pytest.mark.parametrize("workers", [0, 3])
def test_all_layouts_of_a_global_batch_see_the_same_packs(
    tree: Path, workers: int
) -> None:
    expected = None
    for micro_num, dp_size in ((4, 1), (2, 2), (1, 4)):
        data = build_train_data(
            config(tree, micro_num=micro_num, num_worker=workers), VOCAB
        )
        shares = [take_packs(data, rank, dp_size, steps=12) for rank in range(dp_size)]
        steps = [
            sorted(
                pack
                for share in shares
                for pack in share[step * micro_num : (step + 1) * micro_num]
            )
            for step in range(12)
        ]
        assert expected in (None, steps)
        expected = steps


def test_a_rank_reads_the_packs_that_internevo_gives_it(tree: Path) -> None:
    data = build_train_data(config(tree, micro_num=2), VOCAB)
    assert isinstance(data, Corpus)
    indices = np.arange(data.num_packs)
    np.random.RandomState(1024).shuffle(indices)
    for rank in range(3):
        expected = [
            data.read(int(pack)).tokens.tolist() for pack in indices[rank::3][:8]
        ]
        assert take_packs(data, rank, 3, steps=4) == expected


@covers("data.num_worker")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_in_the_second_pass_is_exact(tree: Path, workers: int) -> None:
    data = build_train_data(config(tree, num_worker=workers), VOCAB)
    stream = data.stream()
    for _ in range(40):  # into the second pass
        next(stream)
    state = json.loads(json.dumps(stream.state()))
    straight = [next(stream).tokens.tolist() for _ in range(5)]
    stream.close()
    again = build_train_data(config(tree, num_worker=workers), VOCAB)
    resumed = again.stream(state=state)
    assert [next(resumed).tokens.tolist() for _ in range(5)] == straight
    resumed.close()
    assert len(json.dumps(state)) < 500


def test_skipping_consumes_a_batch(tree: Path) -> None:
    data = build_train_data(config(tree, num_worker=1), VOCAB)
    skipping, reading = data.stream(), data.stream()
    skipping.skip()
    next(reading)
    assert skipping.state() == reading.state()
    assert torch.equal(next(skipping).tokens, next(reading).tokens)
    assert skipping.state() == reading.state()
    skipping.close()
    reading.close()


def test_synthetic_data_is_internevos() -> None:
    data = build_train_data(DataConfig(seq_len=64, num_worker=0), VOCAB)
    assert isinstance(data, Corpus)
    rng = np.random.RandomState(1999)
    period, repeats = (
        rng.randint(1, 30, size=1_000_000),
        rng.randint(10, 200, size=1_000_000),
    )
    order = np.arange(1_000_000)
    np.random.RandomState(1024).shuffle(order)
    for pack in (0, 1, 777):
        n, r = int(period[order[pack]]), int(repeats[order[pack]])
        while n * r < 64:
            r *= 2
        assert data.read(pack).tokens.tolist() == ([n, r] + list(range(n)) * r)[:64]
    assert data.types == ["en", "cn", "code"]
    assert data.warnings


@covers("data.fixed_random_dataset_seqlen")
def test_synthetic_data_of_any_length_is_packed() -> None:
    data = build_train_data(
        DataConfig(seq_len=512, fixed_random_dataset_seqlen=False, num_worker=0), VOCAB
    )
    batch = next(data.stream())
    assert batch.tokens.shape == (1, 512)
    assert batch.cu_seqlens.shape[1] >= 2


def assert_refused(
    part: str, section: DataConfig, vocab: int = VOCAB, **stream: Any
) -> str:
    """Check that a config's data is refused with a message that has ``part``; return the message."""
    with pytest.raises(UserError) as caught:
        next(build_train_data(section, vocab).stream(**stream))
    assert part in str(caught.value), str(caught.value)
    return str(caught.value)


def test_a_data_folder_that_is_missing_or_a_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in assert_refused(str(tmp_path / "train"), config(tmp_path))
    (tmp_path / "file").write_text("")
    assert_refused(
        "Not a directory", config(tmp_path, train_folder=str(tmp_path / "file"))
    )


@pytest.mark.slow
def test_an_unreadable_data_folder_is_refused() -> None:
    # Tmp_path cannot be entered by another user.
    with tempfile.TemporaryDirectory() as name:

        def attempt() -> str:
            with pytest.raises(UserError) as caught:
                build_train_data(DataConfig(train_folder=name, seq_len=8), 100)
            return str(caught.value)

        Path(name).chmod(0o000)
        text = as_nobody(attempt)
        Path(name).chmod(0o700)
    assert "Permission denied" in text and name in text and "user" in text


def test_a_folder_without_token_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert_refused("it contains: nothing", config(tmp_path))
    (tmp_path / "train" / "x.jsonl").write_text("{}")
    assert "evomesh tokenize" in assert_refused(
        "it contains: x.jsonl", config(tmp_path)
    )


def test_a_meta_without_token_file_is_refused(tree: Path) -> None:
    os.remove(tree / "train/en/a.bin")
    assert_refused("a.bin.meta: the meta has no token file", config(tree))


def test_an_id_outside_the_vocabulary_is_reported_with_file_and_line(
    write_bin: Any, tmp_path: Path
) -> None:
    path = write_bin([[1] * 40, [2, 1000] * 40])
    assert_refused(f"{path} line 2", config(tmp_path))
    Path(f"{path}.json").write_text(
        '{"max_id": 1000, "max_id_line": 2, "vocab_size": 1001}'
    )
    assert "at least 1001" in assert_refused(f"{path} line 2", config(tmp_path))


def test_a_file_written_twice_gives_a_warning(write_bin: Any, tmp_path: Path) -> None:
    write_bin(documents(1) * 2)
    assert (
        "rows 60 .. 119 have the same sizes as rows 0 .. 59"
        in build_train_data(config(tmp_path), VOCAB).warnings[0]
    )
    write_bin(documents(1, 120))
    assert build_train_data(config(tmp_path), VOCAB).warnings == []


def test_data_without_a_document_of_min_length_is_refused(tree: Path) -> None:
    text = assert_refused("all 180 documents are shorter", config(tree, min_length=50))
    assert "min_length is 50" in text
    assert "29 tokens" in text


def test_a_path_names_exactly_one_type(write_bin: Any, tmp_path: Path) -> None:
    write_bin(documents(1), "train/en/code/a.bin")
    write_bin(documents(1), "train/code/a.bin")
    assert "two types, en and code" in assert_refused("en/code/a.bin", config(tmp_path))
    write_bin(documents(1), "flat/a.bin")
    assert_refused("no type", config(tmp_path, train_folder=str(tmp_path / "flat")))


def test_less_than_one_global_batch_is_refused(write_bin: Any, tmp_path: Path) -> None:
    write_bin([[1] * 50])
    text = assert_refused(
        "3 packs of 16 tokens, one step needs 8", config(tmp_path), dp_size=4
    )
    assert "micro_num 2 x 4" in text


def test_data_that_fills_no_pack_is_refused_unless_it_is_carried_or_padded(
    write_bin: Any, tmp_path: Path
) -> None:
    write_bin([[1] * 10], "train/en/a.bin")
    write_bin([[1] * 15], "train/en/b.bin")
    text = assert_refused("25 tokens in 2 files,", config(tmp_path))
    assert "en/b.bin, has 15, one pack needs 16" in text
    data = build_train_data(config(tmp_path, remainder="carry", micro_num=1), VOCAB)
    assert (data.num_packs, [row["packs"] for row in data.report]) == (1, [0, 1])
    assert build_train_data(config(tmp_path, remainder="pad"), VOCAB).num_packs == 2


def test_data_that_changed_since_the_checkpoint_is_refused(
    tree: Path, write_bin: Any
) -> None:
    before = build_train_data(config(tree), VOCAB)
    state = before.stream().state()
    write_bin(documents(9), "train/en/a.bin")
    write_bin(documents(8), "train/en/new.bin")
    os.remove(tree / "train/cn/deep/er/z.bin")
    os.remove(tree / "train/cn/deep/er/z.bin.meta")
    after = build_train_data(config(tree), VOCAB)
    with pytest.raises(UserError, match="the data changed since the checkpoint"):
        after.stream(state=state)
    with pytest.raises(UserError) as caught:
        check_manifest(before.manifest, after.manifest)
    for line in ("removed: cn/deep/er/z.bin", "added: en/new.bin", "changed: en/a.bin"):
        assert line in str(caught.value)


def test_a_resume_without_the_data_folder_is_refused_by_file(tree: Path) -> None:
    """Without a folder a run trains on random tokens, which have no hash."""
    with_data = build_train_data(config(tree), VOCAB)
    random = build_train_data(config(tree, train_folder=None), VOCAB)
    for before, after in ((with_data, random), (random, with_data)):
        with pytest.raises(UserError, match=r"removed: .*\n +added: "):
            check_manifest(before.manifest, after.manifest)


def test_a_tokenizer_path_that_is_a_typo_gives_a_warning(tree: Path) -> None:
    present, absent = str(tree / "train"), str(tree / "tokenzier.json")
    data = build_train_data(config(tree, tokenizer_path=present), VOCAB)
    assert not any("tokenizer_path" in line for line in data.warnings)
    data = build_train_data(config(tree, tokenizer_path=absent), VOCAB)
    assert any(f"tokenizer_path={absent!r} does not" in line for line in data.warnings)


@pytest.mark.parametrize("folder", ["train", "valid"])
def test_a_tokenizer_that_did_not_make_the_files_gives_a_warning(
    tree: Path, write_bin: Any, folder: str
) -> None:
    written = write_bin(documents(4), f"{folder}/en/a.bin")
    tokenizer = tree / "tokenizer.json"
    tokenizer.write_text('{"model": {}}')
    ours = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    options = {"tokenizer_path": str(tokenizer), "valid_every": 1}
    options["valid_folder"] = str(tree / "valid")
    for made_with in (None, ours):
        record = {} if made_with is None else {"tokenizer_hash": made_with}
        Path(f"{written}.json").write_text(json.dumps(record))
        assert other_tokenizer(config(tree, **options)) == []
    Path(f"{written}.json").write_text('{"tokenizer_hash": "8888888888888"}')
    (warning,) = other_tokenizer(config(tree, **options))
    assert warning.startswith(f"{written}: made with another tokenizer (tokenizer 8888")
    assert f"than data.tokenizer_path={str(tokenizer)!r} ({ours[:12]})" in warning
    other = config(tree, **options | {"tokenizer_path": None})
    (warning,) = other_tokenizer(other, str(tokenizer))
    assert f"than --tokenizer {tokenizer} ({ours[:12]})" in warning


def test_a_file_that_yields_no_pack_gives_a_warning(tree: Path, write_bin: Any) -> None:
    write_bin([[1, 2]], "train/en/tiny.bin")
    assert build_train_data(config(tree), VOCAB).warnings == [
        "en/tiny.bin yields no pack: 2 tokens after filtering, a pack needs 16"
    ]


def test_a_file_whose_documents_are_all_too_short_is_refused(
    tree: Path, write_bin: Any
) -> None:
    """Also one of many: what it holds would vanish from the run."""
    write_bin([[1, 2], [3, 4, 5]], "train/en/tiny.bin")
    assert build_train_data(config(tree, min_length=3), VOCAB).warnings
    found = r"all 2 documents of en/tiny.bin .*\n.*at most 3 tokens.*min_length is 4"
    with pytest.raises(UserError, match=found):
        build_train_data(config(tree, min_length=4), VOCAB)


def test_fewer_documents_than_min_length_gives_a_warning(
    write_bin: Any, tmp_path: Path
) -> None:
    write_bin([[1] * 30] * 10)
    assert (
        "has 10 documents, fewer than min_length 20"
        in build_train_data(config(tmp_path, min_length=20), VOCAB).warnings[0]
    )
    assert build_train_data(config(tmp_path, min_length=10), VOCAB).warnings == [
        "en/a.bin: rows 5 .. 9 have the same sizes as rows 0 .. 4: was the file written twice in append mode? "
        f"check: evomesh data verify {tmp_path}/train/en/a.bin"
    ]


@covers("data.min_length_dict")
def test_min_length_dict_sets_the_limit_by_path(tree: Path) -> None:
    data = build_train_data(
        config(tree, min_length=5, min_length_dict={"en/b": 10, "cn": 0}), VOCAB
    )
    kept = {row["file"]: row["documents"] - row["filtered"] for row in data.report}
    limits = {"en/b/x.bin": (1, 10), "cn/deep/er/z.bin": (3, 0), "en/a.bin": (2, 5)}
    assert kept == {
        name: sum(len(one) >= low for one in documents(seed))
        for name, (seed, low) in limits.items()
    }
    assert_refused(
        "several keys: en, en/b", config(tree, min_length_dict={"en": 1, "en/b": 10})
    )


@covers("data.data_order_path")
def test_an_order_file_sets_the_order_and_must_list_every_file(tree: Path) -> None:
    order = tree / "data_order.txt"
    order.write_bytes(b"en/b/x.bin\r\n\r\ncn/deep/er/z.bin\nen/a.bin\n")
    data = build_train_data(config(tree, data_order_path=str(order)), VOCAB)
    assert [row["file"] for row in data.report] == [
        "en/b/x.bin",
        "cn/deep/er/z.bin",
        "en/a.bin",
    ]
    assert data.types == ["cn", "en"]
    order.write_text("en/b/x.bin\nen/c.bin\n")
    text = assert_refused(
        "not listed: cn/deep/er/z.bin", config(tree, data_order_path=str(order))
    )
    assert "not in" in text
    assert "en/c.bin" in text


def test_symbolic_links_are_followed_once(tree: Path) -> None:
    os.symlink(tree / "train/en", tree / "train/ja")
    os.symlink(tree / "train", tree / "train/ja/b/loop")
    data = build_train_data(config(tree), VOCAB)
    names = [row["file"] for row in data.report]
    assert [name for name in names if name.startswith("ja/")] == [
        "ja/a.bin",
        "ja/b/x.bin",
    ]
    assert len(names) == 5


@pytest.mark.parametrize(
    "lines",
    [
        [[-5, -6, -7, -8] * 10] * 20,
        [[0, 0, 0, 0] * 10] * 20,
        [[2]] * 800,
        [[7] + [-5] * 39] * 20,
    ],
    ids=["masked", "zeros", "single tokens", "masked but the first"],
)
def test_a_file_without_a_target_is_refused(
    write_bin: Any, tmp_path: Path, lines: list[list[int]]
) -> None:
    """Training on it would log a loss of 0 and end well."""
    write_bin(documents(1), "train/en/a.bin")
    write_bin(lines, "train/en/b.bin")
    with pytest.raises(UserError, match=r"none of 800 tokens is a target") as caught:
        build_train_data(config(tmp_path), VOCAB)
    assert caught.value.where.endswith("train/en/b.bin")
