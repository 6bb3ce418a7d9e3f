"""The choice of the split that is read from a folder, and the error where it is ambiguous."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomesh.data.records.reader import read_records, record_text
from evomesh.data.records.rows import find_split_files
from evomesh.data.records.source_files import open_files
from evomesh.errors import UserError


@pytest.mark.parametrize(
    ("files", "use", "split", "expected"),
    [
        ("data/train_sft-00000-of-00001.txt data/test_sft-00000-of-00001.txt", "train", None, [0]),
        ("data/train_sft-00000-of-00001.txt data/test_sft-00000-of-00001.txt", "valid", None, [1]),
        ("data/train_sft-00000-of-00001.txt data/train_gen-00000-of-00001.txt", "train", "train_gen", [1]),
        ("data/train_sft-00000-of-00001.txt data/train_gen-00000-of-00001.txt", "train", None,
         "several candidate splits: train_gen, train_sft"),
        ("data/train_sft-00000-of-00001.txt data/train_gen-00000-of-00001.txt", "train", "train_new",
         "no split 'train_new'(.|\n)*one of train_gen, train_sft, or 'all'"),
        ("data/train_sft-00000-of-00001.txt data/train_gen-00000-of-00001.txt", "train", "all", [0, 1]),
        ("data/en-00000-of-00001.txt data/fr-00000-of-00001.txt", "train", None, "candidate splits: en, fr(.|\n)*'en'"),
        ("data/en-00000-of-00001.txt data/fr-00000-of-00001.txt", "valid", "fr", [1]),
        ("data/en-00000-of-00002.txt data/en-00001-of-00002.txt", "train", None, [0, 1]),
        ("wiki/data-00000-of-00002.txt wiki/data-00001-of-00002.txt", "train", None, [0, 1]),
        ("c4/c4-train.00000-of-00002.txt c4/c4-validation.00000-of-00002.txt", "train", None, [0]),
        ("validation.txt test.txt train.txt", "valid", None, [0]),
        ("validation.txt test.txt train.txt", "valid", "test", [1]),
        ("validation.txt test.txt train.txt", "valid", "dev", [0]),
        ("test.txt dev/test/a.txt", "train", None, "only held-out files(.|\n)*split_name='test'"),
        ("a.txt b.txt", "train", "validation", "none: no file's path names a split"),
        ("wiki_train_a.txt wiki_train_b.txt", "train", None, [0, 1]),
    ],
)  # fmt: skip
def test_split_is_chosen_by_purpose_or_name(
    tmp_path: Path, files: str, use: str, split: str | None, expected: list[int] | str
) -> None:
    for name in files.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("w5\n")
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected) as caught:
            find_split_files(str(tmp_path), "k", None, use, split)
        assert caught.value.where == (
            "data.split_name" if use == "train" else "data.valid_split_name"
        )
        return
    found = {
        str(file.full_path.relative_to(tmp_path))
        for file in find_split_files(str(tmp_path), "k", None, use, split)[0]
    }
    assert found == {files.split()[number] for number in expected}


def test_folders_that_datasets_saved_name_the_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["w5", "w6"]})
    datasets.DatasetDict({"en": table, "fr": table.select([1])}).save_to_disk(
        str(tmp_path / "x")
    )
    with pytest.raises(UserError, match="candidate splits: en, fr"):
        find_split_files(str(tmp_path), "k", None, "train")
    (found,), _ = find_split_files(str(tmp_path), "k", None, "train", "fr")
    assert found.full_path.parent == tmp_path / "x/fr"


def test_training_warns_of_files_whose_names_mark_them_as_held_out(
    tmp_path: Path,
) -> None:
    for name in ("a.txt", "sub/valid.txt", "sub/test.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("w5\n")
    (found,), warnings = find_split_files(str(tmp_path), "k", None, "train")
    assert found.full_path.name == "a.txt"
    assert warnings == [
        "left out: 2 files such as sub/test.txt, for a name with test; "
        'data.split_name="all" reads all files'
    ]
    assert find_split_files(str(tmp_path), "k", None, "train", "all")[1] == []
    assert find_split_files(str(tmp_path), "k", None, "valid")[1] == []


TREES = {
    "shards": "data/train-00000-of-00002 data/train-00001-of-00002 data/test-00000-of-00001 train.jsonl extra/a.jsonl",
    "custom splits": "data/train-00000-of-00001 data/train_gen-00000-of-00001 data/test_sft-00000-of-00001 more.txt",
    "beside parquet": "train.parquet README.md notes.txt .cache/x.txt",
    "copies in other formats": "TinyV2-train.txt Tiny-train.txt Tiny-valid.txt data/train-00000-of-00001-ab.parquet "
    "data/validation-00000-of-00001-ab.parquet",
    "most frequent": "a.jsonl b.jsonl c.json d.txt e.txt",
    "equally frequent": "a.txt b.parquet",
    "folders": "train/a.jsonl train/b.jsonl valid/a.jsonl eval/c.jsonl",
    "words": "my-train.jsonl my_dev.jsonl my.eval.jsonl",
    "hidden": ".git/a.jsonl __MACOSX/b.jsonl c.jsonl .d.jsonl",
    "no split": "x/a.jsonl y/b.jsonl",
}


def write_tree(root: Path, names: str) -> None:
    """Write files that hold their own names, in the format that the name ends with (parquet without one)."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in names.split():
        path = root / name
        if not path.suffix or "-of-" in path.suffix:
            path = path.with_name(f"{path.name}.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            table = pyarrow.table({"text": [name]})
            parquet.write_table(table, path)
        elif path.suffix == ".json":
            path.write_text(json.dumps([{"text": name}]))
        elif path.suffix == ".jsonl":
            path.write_text(json.dumps({"text": name}) + "\n")
        else:
            path.write_text(name)


@pytest.mark.parametrize("tree", TREES)
def test_the_files_are_those_that_datasets_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: str
) -> None:
    datasets = pytest.importorskip("datasets")
    write_tree(tmp_path / "d", TREES[tree])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = datasets.load_dataset(str(tmp_path / "d"), cache_dir=str(tmp_path / "c"))
    for purpose, split in (("train", "train"), ("valid", "validation")):
        if split not in loaded:
            continue
        files, _ = find_split_files(str(tmp_path / "d"), "k", None, purpose, split)
        found = []
        for opened, stream, _ in open_files(files):
            for record in read_records(stream, opened):
                found.append(record_text(record, "text"))
        assert sorted(found) == sorted(loaded[split]["text"])


def test_shards_of_a_subset_win_inside_it(tmp_path: Path) -> None:
    write_tree(tmp_path, "en/data/train-00000-of-00001 en/copy.txt fr/a.txt")
    files, _ = find_split_files(str(tmp_path), "k", "en", "train")
    assert [file.format for file in files] == ["parquet"]
