"""The choice of the split that is read from a folder, and the error where it is ambiguous."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.data.records.rows import find_split_files
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
        "2 file(s) such as sub/test.txt are left out because their names contain test; "
        'data.split_name="all" reads all files'
    ]
    assert find_split_files(str(tmp_path), "k", None, "train", "all")[1] == []
    assert find_split_files(str(tmp_path), "k", None, "valid")[1] == []
