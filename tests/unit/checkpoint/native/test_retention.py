"""Retention deletes what this program wrote, and nothing of anybody else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evomesh.checkpoint.native.find import Candidate, SaveFolder, open_checkpoint
from evomesh.checkpoint.native.format import CommitRecord
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.cli import ckpt
from evomesh.errors import UserError
from evomesh.storage.local import LocalStorage
from tests.unit.checkpoint.native.disk import Quick


def writer_of(root: Path, **options: int) -> CheckpointWriter:
    writer = CheckpointWriter(str(root), **options)  # type: ignore[arg-type]
    writer.storage = writer.snapshot_storage = LocalStorage(Quick())
    return writer


def save(writer: CheckpointWriter, *steps: int, snapshot: bool = False) -> None:
    for step in steps:
        assert writer.save(
            step, {"w": torch.full((3,), float(step))}, {}, {}, snapshot=snapshot
        )


def steps(root: Path) -> list[str]:
    return sorted(
        path.name for path in root.glob("step-*") if not path.name.endswith(".pin")
    )


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING
    ]


@pytest.mark.parametrize("keep_last", [None, 1])
@pytest.mark.parametrize("committed", [False, True])
def test_a_linked_step_folder_is_left_alone_with_all_that_is_behind_it(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    keep_last: int | None,
    committed: bool,
) -> None:
    root, elsewhere = tmp_path / "ckpts", tmp_path / "archive"
    save(writer_of(elsewhere), 3)
    if not committed:
        (elsewhere / "step-00000003/commit.json").unlink()
    before = sorted((elsewhere / "step-00000003").iterdir())
    root.mkdir()
    (root / "step-00000003").symlink_to(elsewhere / "step-00000003")
    writer = (
        writer_of(root) if keep_last is None else writer_of(root, keep_last=keep_last)
    )
    save(writer, 5, 6, 7)
    assert sorted((elsewhere / "step-00000003").iterdir()) == before
    assert "step-00000003" in steps(root)
    # A verified checkpoint behind a link is kept with a warning; without retention nothing is due.
    expected = 0 if committed and keep_last is None else 1
    assert len([text for text in warned(caplog) if "is a link" in text]) == expected


@pytest.mark.parametrize(
    "name",
    [
        "weights.pt",
        "notes/",
        "model.safetensors",
        ".hidden",
        "0badc0de-r00000.safetensors.bak",
    ],
)
@pytest.mark.parametrize("own_too", [False, True])
def test_a_step_folder_with_files_of_another_program_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, own_too: bool
) -> None:
    foreign = tmp_path / "step-00000002"
    foreign.mkdir()
    if name.endswith("/"):
        (foreign / name).mkdir()
    else:
        (foreign / name).write_text("of another program")
    if own_too:
        (foreign / "0badc0de-r00000.safetensors").write_text("of an interrupted save")
    before = sorted(path.name for path in foreign.iterdir())
    save(writer_of(tmp_path, keep_last=1), 5, 6, 7)
    assert sorted(path.name for path in foreign.iterdir()) == before
    # Once, though there were three saves.
    (text,) = [text for text in warned(caplog) if "step-00000002" in text]
    assert name.rstrip("/") in text


def test_a_checkpoint_to_which_somebody_added_a_file_stays(tmp_path: Path) -> None:
    writer = writer_of(tmp_path, keep_last=1)
    save(writer, 1)
    (tmp_path / "step-00000001/eval.json").write_text("{}")
    save(writer, 2, 3, 4)
    assert steps(tmp_path) == ["step-00000001", "step-00000003", "step-00000004"]
    assert len(list((tmp_path / "step-00000001").iterdir())) == 4


def test_files_of_others_in_the_newest_folder_stay_and_leftovers_go(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    (folder / "0badc0de-r00001.safetensors").write_text("left by an interrupted save")
    (folder / "0badc0de-index.jsonl").write_text("left by an interrupted save")
    save(writer_of(tmp_path), 3)
    assert len(list(folder.iterdir())) == 3 and steps(tmp_path) == ["step-00000003"]
    (folder / "README").write_text("mine")
    save(writer_of(tmp_path), 2)  # retention looks at the newest folder again
    assert (folder / "README").exists()


@pytest.mark.parametrize("missing", ["commit.json", "*.safetensors", "*.jsonl", "*"])
def test_a_pinned_checkpoint_stays_whatever_is_missing_in_it(
    tmp_path: Path, missing: str
) -> None:
    writer = writer_of(tmp_path, keep_last=1)
    save(writer, 1)
    (tmp_path / "step-00000001.pin").touch()
    for path in list((tmp_path / "step-00000001").glob(missing)):
        path.unlink()
    save(writer, 2, 3, 4)
    assert steps(tmp_path) == ["step-00000001", "step-00000003", "step-00000004"]


@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_a_pin_counts_whatever_it_is(tmp_path: Path, kind: str) -> None:
    writer = writer_of(tmp_path, keep_last=1)
    save(writer, 1)
    pin = tmp_path / "step-00000001.pin"
    pin.mkdir() if kind == "folder" else pin.symlink_to(tmp_path / "nowhere")
    save(writer, 2, 3, 4)
    assert "step-00000001" in steps(tmp_path)


@pytest.mark.parametrize(
    "lost", [["commit.json"], ["commit.json", "*.jsonl"], ["commit.json", "*-r*"]]
)
@pytest.mark.parametrize("keep_last", [None, 1])
def test_a_checkpoint_that_lost_its_commit_record_stays(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    lost: list[str],
    keep_last: int | None,
) -> None:
    """All its data may be there: somebody moved the record away, or a repair is in progress."""
    options = {} if keep_last is None else {"keep_last": keep_last}
    writer = writer_of(tmp_path, **options)
    save(writer, 1)
    for pattern in lost:
        for path in (tmp_path / "step-00000001").glob(pattern):
            path.unlink()
    left = sorted((tmp_path / "step-00000001").iterdir())
    save(writer, 2, 3)
    assert left and sorted((tmp_path / "step-00000001").iterdir()) == left
    assert len([text for text in warned(caplog) if "lost its commit.json" in text]) == 1


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("calls", range(6))
def test_what_a_killed_deletion_left_is_deleted_by_the_next_save(
    tmp_path: Path, calls: int
) -> None:
    """The third save deletes step 1 and is killed before its call number ``calls``: mark, record, and so on."""
    writer = writer_of(tmp_path, keep_last=1)
    save(writer, 1, 2)
    left = calls
    delete, create = writer.storage.delete, writer.storage.create

    def counted(call: Callable[[str], Any]) -> Callable[[str], Any]:
        def run(path: str) -> Any:
            nonlocal left
            if "step-00000001" in path:
                if left == 0:
                    raise Killed
                left -= 1
            return call(path)

        return run

    writer.storage.delete = counted(delete)  # type: ignore[method-assign]
    writer.storage.create = counted(create)  # type: ignore[method-assign]
    if calls < 5:
        with pytest.raises(Killed):
            save(writer, 3)
    else:
        save(writer, 3)
    save(writer_of(tmp_path, keep_last=1), 4)
    assert steps(tmp_path) == ["step-00000003", "step-00000004"]


def test_a_marked_folder_is_an_interrupted_save_and_nothing_else(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "0badc0de-unfinished").touch()
    with pytest.raises(UserError) as caught:
        open_checkpoint(LocalStorage(), str(folder))
    assert "an interrupted save (0badc0de-unfinished)" in str(caught.value)


def test_the_mark_of_a_save_is_gone_once_it_is_committed(tmp_path: Path) -> None:
    save(writer_of(tmp_path), 1)
    suffixes = {path.suffix for path in (tmp_path / "step-00000001").iterdir()}
    assert suffixes == {".jsonl", ".safetensors", ".json"}


def test_a_damaged_checkpoint_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = writer_of(tmp_path, keep_last=2)
    save(writer, 1)
    next((tmp_path / "step-00000001").glob("*.safetensors")).unlink()
    save(writer, 2, 3, 4, 5)
    assert steps(tmp_path) == ["step-00000001", "step-00000004", "step-00000005"]
    assert len([text for text in warned(caplog) if "is missing" in text]) == 1


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder of others", "file"])
def test_a_save_never_writes_into_what_is_not_its_own(
    tmp_path: Path, kind: str
) -> None:
    root, place = tmp_path / "ckpts", tmp_path / "elsewhere"
    root.mkdir()
    taken = root / "step-00000005"
    if kind == "folder of others":
        taken.mkdir()
        (taken / "model.bin").write_text("x")
    elif kind == "file":
        taken.write_text("x")
    else:
        if kind == "link":
            place.mkdir()
        taken.symlink_to(place)
    writer = writer_of(root)
    folder = writer.save(5, {"w": torch.ones(3)}, {"step": 5}, {}, final=True)
    assert folder is not None and folder.startswith(f"{taken}-")
    assert not place.exists() or list(place.iterdir()) == []
    found = CheckpointReader().newest(SaveFolder.open(str(root)))
    assert found is not None and found.folder == folder


def test_prune_obeys_the_same_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(writer_of(tmp_path / "other"), 1)
    root = tmp_path / "ckpts"
    save(writer_of(root), 2, 3, 4, 5, 6)
    (root / "step-00000001").symlink_to(tmp_path / "other/step-00000001")
    (root / "step-00000002/mine.txt").write_text("x")
    (root / "step-00000003.pin").touch()
    ckpt.prune(str(root), keep_last=2)
    kept = [
        "step-00000001",
        "step-00000002",
        "step-00000003",
        "step-00000005",
        "step-00000006",
    ]
    assert steps(root) == kept
    assert "5 checkpoints stay" in capsys.readouterr().out
    assert len(list((tmp_path / "other/step-00000001").iterdir())) == 3


def test_snapshots_never_share_the_folder_of_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "ckpts")
    for snapshots in (f"{tmp_path}/ckpts/", f"local:{tmp_path}/link", str(tmp_path)):
        with pytest.raises(UserError, match="snapshot folder"):
            SaveFolder.open(f"local:{tmp_path}/ckpts", snapshots)


def test_failing_to_delete_does_not_fail_the_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = writer_of(tmp_path, keep_last=1)
    save(writer, 1, 2)

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    writer.storage.delete = refuse  # type: ignore[method-assign]
    save(writer, 3, 4)
    assert "old checkpoints were not deleted" in warned(caplog)[-1]


def test_a_run_from_scratch_keeps_its_own_next_to_later_steps_of_another_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(writer_of(tmp_path), 70, 80, 90)
    save(writer_of(tmp_path, keep_last=2), 1, 2, 3, 4)
    later = [f"step-{step:08}" for step in (70, 80, 90)]
    assert steps(tmp_path) == ["step-00000003", "step-00000004", *later]
    (text,) = warned(caplog)
    assert "(90, 80, 70)" in text


def test_later_steps_that_the_resume_skipped_as_damaged_are_not_another_run_s(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(writer_of(tmp_path), 5, 8, 9)
    for step in (8, 9):
        (data,) = (tmp_path / f"step-{step:08}").glob("*.safetensors")
        content = data.read_bytes()
        data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    writer = writer_of(tmp_path, keep_last=2)
    reader = CheckpointReader()
    resumed = reader.newest(writer.folder)
    assert resumed is not None
    writer.continue_from(resumed, reader.skipped)
    caplog.clear()
    save(writer, 6, 7)
    (text,) = warned(caplog)
    assert "(9, 8) than this run's 6 were skipped as damaged" in text
    assert "another run" not in text
    assert len(steps(tmp_path)) == 4  # 6 and 7 beside the damaged ones


def test_once_a_run_has_passed_another_run_s_steps_they_are_old_like_its_own(
    tmp_path: Path,
) -> None:
    save(writer_of(tmp_path), 7, 8)
    save(writer_of(tmp_path, keep_last=2), 6, 9, 10)
    assert steps(tmp_path) == ["step-00000009", "step-00000010"]


def test_snapshots_of_a_run_from_scratch_stay_too(tmp_path: Path) -> None:
    save(writer_of(tmp_path), 70, 80, snapshot=True)
    save(writer_of(tmp_path), 1, 2, 3, snapshot=True)
    kept = [f"step-{step:08}" for step in (2, 3, 70, 80)]
    assert steps(tmp_path / "snapshot") == kept


def test_of_a_step_that_several_runs_committed_the_last_written_is_the_newest(
    tmp_path: Path,
) -> None:
    for hour in (1, 3, 2, 4):
        save(writer_of(tmp_path), 5)
        set_created(tmp_path, f"2026-01-01T0{hour}:00:00Z")
    found = SaveFolder.open(str(tmp_path)).candidates()
    hours = [CommitRecord.from_bytes(commit_of(each)).created[12] for each in found]
    assert hours == ["4", "3", "2", "1"]


def commit_of(candidate: Candidate) -> bytes:
    return Path(candidate.folder, "commit.json").read_bytes()


def set_created(root: Path, time: str) -> None:
    """Write the time into the commit record that was written last."""
    records = list(root.glob("step-*/commit.json"))
    newest = max(records, key=lambda path: path.stat().st_mtime_ns)
    record = CommitRecord.from_bytes(newest.read_bytes())
    newest.write_bytes(replace(record, created=time).to_bytes())
