"""Paths that are not a usable checkpoint: each is refused with what was found, where, and how to fix it.

Tested elsewhere: fallback, corruption, swapped and missing files (test_rot.py), pickles and zip bombs
(../test_pickles.py), other layouts (test_layouts.py), content and foreign folders (../test_resume.py), two
writers and the full disk (test_saving.py, test_faults.py).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.boxes import Box, LocalPart
from evomesh.checkpoint.native.commit import commit, new_attempt, new_record
from evomesh.checkpoint.native.compare import tensors_not_finite
from evomesh.checkpoint.native.find import Candidate, SaveFolder
from evomesh.checkpoint.native.format import layout_record
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.plan import TensorType, WriteItem
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.checkpoint.native.verify import verify
from evomesh.errors import UserError
from evomesh.storage.local import LocalStorage
from tests.support.nobody import as_nobody


@pytest.fixture
def root(tmp_path: Path) -> Path:
    manager = CheckpointWriter(str(tmp_path / "ckpts"))
    manager.save(
        4, {"w": torch.ones(4, 3), "v": torch.ones(2)}, {"step": 4}, {"lr": 1.0}
    )
    return tmp_path / "ckpts"


def complaint(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        action()
    return str(error.value)


def rewrite(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the commit body and seals it again, as somebody who means harm could."""
    path = root / "step-00000004/commit.json"
    body = json.loads(path.read_bytes())["body"]
    change(body)
    path.write_bytes(fmt.seal(body))


def reindex(root: Path, old: bytes, new: bytes) -> None:
    """The same for the index."""
    (index,) = (root / "step-00000004").glob("*-index.jsonl")
    data = index.read_bytes()
    assert old in data
    index.write_bytes(data.replace(old, new))

    def change(body: dict[str, Any]) -> None:
        body["index"] |= {
            "bytes": index.stat().st_size,
            "sha256": fmt.sha256(index.read_bytes()),
        }

    rewrite(root, change)


def newest(root: Path) -> str:
    return complaint(lambda: CheckpointReader().newest(SaveFolder.open(str(root))))


def resolve(path: object) -> str:
    return complaint(lambda: CheckpointReader().resolve(str(path)))


def test_relative_and_prefixed_paths_resolve(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.parent)
    for form in (
        "ckpts",
        "./ckpts",
        "local:ckpts",
        "local:./ckpts/",
        "ckpts/4",
        "local:ckpts/4/",
        str(root),
    ):
        assert CheckpointReader().resolve(form).step == 4
    text = complaint(lambda: CheckpointWriter("s4:bucket/x"))
    assert "unknown prefix 's4:'" in text and "local:PATH" in text and "boto3:" in text


def test_missing_and_empty_folders_list_what_is_next_to_them(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "steps 4" in resolve(root / "5")
    (root.parent / "empty").mkdir()
    (root.parent / "notes").mkdir()
    (root.parent / "ckpts.txt").write_text("")
    assert "the folder is empty; next to it: ckpts with steps 4\n" in resolve(
        root.parent / "empty"
    )
    assert "has no such folder; next to it: ckpts with steps 4\n" in resolve(
        root.parent / "elsewhere"
    )
    assert "next to it: notes; ckpts with steps 4\n" in resolve(root.parent / "note")
    # The folder above the save folder, as in llm_ckpts for llm_ckpts/demo.
    assert "; it holds ckpts with steps 4\n" in resolve(root.parent)
    assert "has no such folder\n" in resolve(root / "step-00000004" / "49")
    monkeypatch.chdir(root.parent / "notes")
    assert "'nowhere'; the current folder has no such folder\n" in resolve(
        Path("nowhere")
    )
    for number in range(12):
        (root.parent / "notes" / f"page{number:02}").write_text("")
    assert (
        "it holds page00, page01, page02, page03, page04, page05, page06, page07 and 4 more, but"
        in resolve(root.parent / "notes")
    )


def test_only_interrupted_saves(root: Path) -> None:
    (root / "step-00000004/commit.json").unlink()
    text = resolve(root)
    assert (
        "only interrupted saves" in text
        and "step-00000004" in text
        and "from scratch" in text
    )
    # For auto_resume that is a fresh start, said aloud.
    assert CheckpointReader().newest(SaveFolder.open(str(root))) is None


def test_a_newer_format(root: Path) -> None:
    rewrite(root, lambda body: body.update(version=2, software={"evomesh": "9.9"}))
    text = newest(root)
    assert (
        "format version 2" in text
        and "reads version 1" in text
        and "evomesh 9.9" in text
    )


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/b.safetensors", ".hidden", ""]
)
def test_file_names_that_leave_the_folder(root: Path, name: str) -> None:
    rewrite(root, lambda body: body["files"].__setitem__(0, [name, 1, ""]))
    assert "not a plain file name" in newest(root)


def test_symlinks_out_of_the_folder_do_no_harm(root: Path) -> None:
    (data,) = (root / "step-00000004").glob("*.safetensors")
    size = data.stat().st_size
    data.unlink()
    (root.parent / "secret").write_bytes(bytes(size))
    data.symlink_to(root.parent / "secret")
    assert "does not match its hash" in newest(root)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            b'"shape":[4,3]',
            b'"shape":[400000000000,3]',
            "do not cover F32[400000000000,3]",
        ),
        (b"[0,[0,0],[4,3],", b"[0,[0,-1],[4,3],", "offsets is -1, expected 0 to"),
        (b"[0,[0,0],[4,3],", b"[0,[1,0],[4,3],", "reaches outside"),
        (b"[0,[0,0],[4,3],", b"[7,[0,0],[4,3],", "file number 7"),
        (b"[0,[0,0],[4,3],", b"[0,[0,0],[4,3],99", "bytes 99"),
        (b'"dtype":"F32"', b'"dtype":"F99"', "unknown dtype 'F99'"),
        (b'{"dtype"', b'{"dtype', "not a tensor record"),
    ],
)
def test_an_index_with_wrong_entries_is_refused(
    root: Path, old: bytes, new: bytes, words: str
) -> None:
    reindex(root, old, new)
    text = newest(root)
    assert words in text


def test_a_tensor_that_the_index_lists_twice_is_refused(root: Path) -> None:
    (index,) = (root / "step-00000004").glob("*-index.jsonl")
    first, _ = index.read_bytes().splitlines(keepends=True)
    reindex(root, first, first + first)
    rewrite(root, lambda body: body.update(tensors=3))
    assert "the index lists 'v' twice" in newest(root)


def test_a_commit_file_that_is_not_a_record_is_refused(root: Path) -> None:
    path = root / "step-00000004/commit.json"
    for data in (
        b"",
        b"null",
        b"[]",
        b'{"body": 1, "sha256": ""}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"body":{},"sha256":"x"}',
    ):
        path.write_bytes(data)
        assert "commit.json" in newest(root)


@pytest.mark.parametrize("key", ["step", "attempt", "files", "index", "state"])
def test_a_record_without_a_field_is_refused(root: Path, key: str) -> None:
    rewrite(root, lambda body: body.pop(key))
    assert f"commit.json has a bad field (KeyError: '{key}')" in newest(root)


def test_a_failed_import_leaves_the_commit_of_another_job_alone(root: Path) -> None:
    """Both found the step free, and the other one committed first."""
    storage, folder = LocalStorage(), str(root / "step-00000004")
    record = new_record(4, new_attempt(), config={}, state={}, layout=layout_record(1))
    item = WriteItem("w", "F32", (2,), LocalPart(torch.ones(2), Box.whole((2,))))
    before = sorted(path.name for path in Path(folder).iterdir())
    with pytest.raises(UserError, match="another job committed step 4"):
        commit(storage, folder, [[item]], {"w": TensorType("F32", (2,))}, record)
    assert (
        sorted(path.name for path in Path(folder).iterdir() if path.name in before)
        == before
    )
    assert CheckpointReader().resolve(folder).step == 4


def test_nan_is_neither_saved_nor_overlooked(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointWriter(str(root))
    bad = torch.ones(4, 3)
    bad[1, 2] = torch.nan
    text = complaint(lambda: manager.save(5, {"w": bad}, {}, {}, final=True))
    assert "w[0, 0]: 1 of 12 values are NaN or infinite" in text
    huge = torch.full((4, 3), 3e38)  # finite, though its sum is not
    assert manager.save(6, {"w": huge}, {}, {}, final=True)
    monkeypatch.setattr("evomesh.checkpoint.native.write.not_finite", lambda tensor: 0)
    manager.save(7, {"w": bad}, {}, {})
    found = verify(
        Candidate(LocalStorage(), str(root / "step-00000007"), 7, True), "data"
    )
    monkeypatch.undo()
    assert list(tensors_not_finite(found)) == ["w: 1 values are NaN or infinite"]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written() -> None:
    # Tmp_path cannot be entered by another user.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        text = as_nobody(lambda: complaint(lambda: CheckpointWriter(name).claim()))
        Path(name).chmod(0o755)
        assert "EACCES" in text and name in text
        assert os.listdir(name) == []


def test_a_file_where_the_folder_should_be(root: Path) -> None:
    (root.parent / "file").write_text("")
    text = complaint(lambda: CheckpointWriter(str(root.parent / "file")).claim())
    assert (
        "file is a file" in text
        and "expected: a folder" in text
        and "ckpt.save_ckpt_folder" in text
    )
