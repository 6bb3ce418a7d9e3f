"""Saves in the background, snapshots, retention, forecast of disk need, and the one-writer rule."""

from __future__ import annotations

import functools
import logging
import os
import threading
from pathlib import Path

import pytest
import torch

from evomesh.checkpoint.native.disk_space import check_space
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import MAX_FAILED_SAVES, CheckpointWriter
from evomesh.errors import UserError
from evomesh.quantities import readable
from evomesh.storage.base import StorageWriter
from evomesh.storage.local import LocalStorage
from tests.support.covers import covers
from tests.support.interpreter import Interpreter
from tests.unit.checkpoint.native.disk import Quick


class Gate(LocalStorage):
    """Files can be made only while the gate is open."""

    def __init__(self) -> None:
        super().__init__(Quick())
        self.open_gate = threading.Event()
        self.arrived = threading.Event()

    def create(self, path: str) -> StorageWriter:  # type: ignore[override]
        if path.endswith(".safetensors"):
            self.arrived.set()
            assert self.open_gate.wait(10)
        return super().create(path)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((1000,), value)}


def loaded(writer: CheckpointWriter) -> tuple[int, float]:
    found = CheckpointReader().newest(writer.folder)
    assert found is not None
    target = tensors(-1)
    CheckpointReader().load(found, target)
    return found.step, float(target["w"][0])


def quick(root: Path, **options: object) -> CheckpointWriter:
    writer = CheckpointWriter(str(root), **options)  # type: ignore[arg-type]
    writer.storage = writer.snapshot_storage = LocalStorage(Quick())
    return writer


def test_a_background_save_holds_the_values_at_the_call(tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path))
    gate = writer.storage = Gate()
    live = tensors(1)
    writer.prepare(live, blocking=False)
    writer.save(1, live, {}, {}, blocking=False)
    gate.arrived.wait(10)
    live["w"].fill_(99)  # training continues
    assert CheckpointReader().newest(writer.folder) is None
    gate.open_gate.set()
    assert writer.wait() == f"{tmp_path}/step-00000001"
    assert loaded(writer) == (1, 1.0)


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path))
    gate = writer.storage = Gate()
    writer.save(1, tensors(1), {}, {}, blocking=False)
    gate.arrived.wait(10)
    timer = threading.Timer(0.2, gate.open_gate.set)
    timer.start()
    assert writer.save(2, tensors(2), {}, {}, blocking=False)
    writer.wait()
    assert sorted(c.step for c in writer.folder.candidates() if c.committed) == [1, 2]
    timer.join()


def test_an_error_in_the_background_comes_with_the_next_wait(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    writer = quick(tmp_path)
    writer.claim()

    def full(path: str) -> StorageWriter:
        raise OSError(28, "No space left on device", path)

    writer.storage.create = full  # type: ignore[method-assign]
    for step in range(1, MAX_FAILED_SAVES):
        writer.save(step, tensors(1), {}, {}, blocking=False)
        assert writer.wait() is None and "No space left" in caplog.messages[-1]
    writer.save(9, tensors(1), {}, {}, blocking=False)
    with pytest.raises(UserError, match="No space left"):
        writer.wait()


@covers("ckpt.snapshot_ckpt_folder")
def test_snapshots_keep_two_and_never_lose_the_newest(tmp_path: Path) -> None:
    writer = quick(tmp_path)
    writer.save(1, tensors(1), {}, {})
    for step in range(2, 7):
        writer.save(step, tensors(step), {}, {}, snapshot=True)
        assert loaded(writer) == (step, step)
    assert [c.step for c in writer.folder.candidates()] == [6, 5, 1]
    assert CheckpointReader().resolve(f"local:{tmp_path}/snapshot/1/").step == 6
    writer.save(6, tensors(60), {}, {})
    assert loaded(writer) == (6, 60.0)  # the normal one wins a tie


@covers("ckpt.keep_last", "ckpt.keep_every")
def test_retention_keeps_the_newest_the_multiples_and_the_pinned(
    tmp_path: Path,
) -> None:
    writer = quick(tmp_path, keep_last=3, keep_every=10)
    for step in range(1, 31):
        writer.save(step, tensors(step), {}, {})
        if step == 5:
            (tmp_path / "step-00000005.pin").touch()
    assert [c.step for c in writer.folder.candidates()] == [30, 29, 28, 20, 10, 5]


def test_retention_never_deletes_the_last_two_that_verify(tmp_path: Path) -> None:
    first = quick(tmp_path)
    for step in (1, 2, 3, 4):
        first.save(step, tensors(step), {}, {})
    for step in (3, 4):  # rot that only reading finds
        (file,) = (tmp_path / f"step-0000000{step}").glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    first.close()
    writer = quick(tmp_path, keep_last=1)
    writer.save(5, tensors(5), {}, {})
    assert {2, 5} <= {c.step for c in writer.folder.candidates()}
    writer.save(6, tensors(6), {}, {})
    assert {5, 6} <= {c.step for c in writer.folder.candidates()}


def test_leftovers_of_interrupted_saves_go_after_the_next_commit(
    tmp_path: Path,
) -> None:
    writer = quick(tmp_path)
    for step in (3, 9):
        (tmp_path / f"step-0000000{step}").mkdir()
        (tmp_path / f"step-0000000{step}" / "0badc0de-r00000.safetensors").write_bytes(
            b"x"
        )
        (tmp_path / f"step-0000000{step}" / "0badc0de-unfinished").touch()
    writer.save(5, tensors(5), {}, {})
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [
        "step-00000005",
        "step-00000009",
    ]
    writer.save(9, tensors(9), {}, {})
    assert len(list((tmp_path / "step-00000009").iterdir())) == 3


def test_ten_saves_need_the_space_of_three(tmp_path: Path) -> None:
    writer = quick(tmp_path, keep_last=2)
    most = 0
    for step in range(1, 201):
        writer.save(step, tensors(step), {}, {})
        most = max(most, len(list(tmp_path.glob("step-*"))))
    assert most == 2


class Small(LocalStorage):
    def __init__(self, free: int) -> None:
        super().__init__()
        self.free = free

    def free_bytes(self, folder: str) -> int:
        return self.free


def test_forecast_of_disk_need() -> None:
    assert readable(3 << 19) == "1.5 MiB"
    line = check_space(Small(10 << 20), "ckpts", one=1 << 20, held=0, saves=5)
    assert (
        line
        == "one checkpoint takes 1.0 MiB, 5 of them 5.0 MiB; 10.0 MiB are free in ckpts"
    )
    assert "NOT ENOUGH" in check_space(
        Small(3 << 20), "ckpts", one=1 << 20, held=0, saves=5
    )
    assert "NOT ENOUGH" not in check_space(
        Small(3 << 20), "ckpts", one=1 << 20, held=0, saves=5, keep_last=2
    )
    with pytest.raises(UserError, match="cannot hold two checkpoints"):
        check_space(Small(1 << 20), "ckpts", one=1 << 20, held=0)
    check_space(Small(1 << 20), "ckpts", one=1 << 20, held=1)


def hold(root: str) -> None:
    writer = CheckpointWriter(root)
    writer.claim()
    print(f"holding as {os.getpid()}", flush=True)
    threading.Event().wait()


def try_to_save(root: str) -> None:
    try:
        CheckpointWriter(root).save(1, tensors(1), {}, {})
    except UserError as error:
        print(error, flush=True)


@pytest.mark.slow
def test_two_writers_one_wins_the_other_says_why(tmp_path: Path) -> None:
    interpreter = Interpreter()
    try:
        holder = interpreter.start(functools.partial(hold, str(tmp_path)))
        holder.wait_for("holding")
        text = interpreter.run(functools.partial(try_to_save, str(tmp_path))).stdout
        assert (
            f"another live job writes here: process {holder.pid} on" in text
            and "save_ckpt_folder" in text
        )
        holder.kill()  # the lock of a killed job is free at once
        assert (
            interpreter.run(functools.partial(try_to_save, str(tmp_path))).stdout == ""
        )
    finally:
        interpreter.close()
    assert loaded(CheckpointWriter(str(tmp_path))) == (1, 1.0)


def test_a_writer_past_the_lock_cannot_replace_a_commit(tmp_path: Path) -> None:
    """As on a store without locks: both saw the folder empty, one publishes first."""
    one, two = quick(tmp_path), quick(tmp_path)
    gate = two.storage = Gate()
    two.save(1, tensors(2), {}, {}, blocking=False)
    gate.arrived.wait(10)
    one.save(1, tensors(1), {}, {})
    gate.open_gate.set()
    with pytest.raises(UserError, match="another job committed step 1"):
        two.wait(final=True)
    assert loaded(CheckpointWriter(str(tmp_path))) == (1, 1.0)


def test_each_refusal_is_reported_also_the_one_that_ends_the_run(
    tmp_path: Path,
) -> None:
    writer = CheckpointWriter(str(tmp_path / "c"))
    heard: list[str] = []
    writer.on_refusal = heard.append
    refusal = CheckpointError("the disk is full", where="c")
    for _ in range(MAX_FAILED_SAVES - 1):
        writer._on_failed_save(refusal, final=False)
    with pytest.raises(CheckpointError, match="third in a row"):
        writer._on_failed_save(refusal, final=False)
    assert heard == ["c: the disk is full"] * MAX_FAILED_SAVES
