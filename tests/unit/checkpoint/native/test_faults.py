"""Every call of a save fails once, or is the last before the power goes; checkpoints before it always load."""

from __future__ import annotations

import errno
import itertools
import logging
import shutil
from pathlib import Path

import pytest
import torch

from evomesh.checkpoint.native.find import SaveFolder
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import MAX_FAILED_SAVES, CheckpointWriter
from evomesh.storage.local import LocalStorage, SystemCalls
from tests.unit.checkpoint.native.disk import MODELS, Crash, Disk, Quick, digest, images

ERRNOS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.ESTALE)


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "w": torch.full((40, 3), float(step)),
        "optim.exp_avg.w": torch.full((40, 3), step + 0.5),
    }


def on(disk: SystemCalls, root: Path, **options: int) -> CheckpointWriter:
    writer = CheckpointWriter(str(root), **options)  # type: ignore[arg-type]
    writer.storage = LocalStorage(disk)
    writer.snapshot_storage = writer.storage
    return writer


def newest_step(root: Path) -> int:
    """Loads the newest checkpoint and checks that its tensors are those of its step."""
    found = CheckpointReader().newest(SaveFolder.open(str(root)))
    if found is None:
        return 0
    target = tensors(0)
    assert CheckpointReader().load(found, target) == {"step": found.step}
    for name, expected in tensors(found.step).items():
        assert torch.equal(target[name], expected)
    return found.step


def save(writer: CheckpointWriter, step: int) -> str | None:
    return writer.save(
        step, tensors(step), {"step": step}, {}, snapshot=step % 2 == 0 and step > 2
    )


@pytest.mark.slow
def test_power_loss_after_every_call(tmp_path: Path) -> None:
    root = tmp_path / "live" / "ckpts"
    root.parent.mkdir()
    disk = Disk()
    writer = on(disk, root, keep_last=2)
    returned = []  # (calls done when save came back, step)
    for step in range(1, 7):
        assert save(writer, step)
        returned.append((len(disk.calls), step))
    cases, seen = 0, {}
    for done, model, image in images(str(root.parent), disk.calls, tmp_path / "images"):
        safe = max([step for count, step in returned if count <= done], default=0)
        running = next((step for count, step in returned if count > done), safe)
        key = digest(image)
        if key not in seen:
            seen[key] = newest_step(image / "ckpts")
        assert seen[key] in {safe, running}, (done, model, disk.calls[:done][-3:])
        shutil.rmtree(image)
        cases += 1
    assert cases == (len(disk.calls) + 1) * len(MODELS) > 500


@pytest.mark.parametrize("skipped", ["fsync", "sync_folder"])
def test_the_power_loss_test_can_fail(tmp_path: Path, skipped: str) -> None:
    root = tmp_path / "live" / "ckpts"
    root.parent.mkdir()
    disk = Disk()
    writer = on(disk, root)
    for step in (1, 2):
        save(writer, step)
    kept = [call for call in disk.calls if call[0] != skipped]
    steps = []
    for done, _, image in images(str(root.parent), kept, tmp_path / "images"):
        if done == len(kept):
            try:
                steps.append(newest_step(image / "ckpts"))
            except CheckpointError:
                steps.append(-1)
    assert min(steps) < 2


def calls_of_a_save(root: Path) -> int:
    disk = Disk()
    writer = on(disk, root)
    save(writer, 1)
    before = len(disk.calls)
    save(writer, 2)
    return len(disk.calls) - before


def test_the_process_dies_in_every_call_and_the_next_one_resumes(
    tmp_path: Path,
) -> None:
    count = calls_of_a_save(tmp_path / "count")
    for number in range(count):
        root = tmp_path / str(number)
        save(on(Quick(), root), 1)
        disk = Disk(fail_at=number)
        with pytest.raises(Crash):
            save(on(disk, root), 2)
        assert newest_step(root) in (1, 2)
        assert save(on(Quick(), root, keep_last=2), 2)
        assert newest_step(root) == 2
        assert save(on(Quick(), root, keep_last=2), 3)
        assert newest_step(root) == 3


@pytest.mark.slow
def test_every_call_returns_an_error_and_training_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    count = calls_of_a_save(tmp_path / "count")
    for (number, code), sticky in itertools.product(
        itertools.product(range(count), ERRNOS), (False, True)
    ):
        root = tmp_path / f"{number}-{code}-{sticky}"
        save(on(Quick(), root), 1)
        writer = on(Quick(), root)
        writer.claim()
        disk = Disk(fail_at=number, error=code, sticky=sticky)
        writer.storage = LocalStorage(disk)
        caplog.clear()
        folder = save(writer, 2)
        assert disk.failed
        if folder is None:
            said = caplog.messages[-1]
            assert errno.errorcode[code] in said and str(root) in said, caplog.messages
        assert newest_step(root) in ((2,) if folder else (1, 2))
        writer.storage = LocalStorage(Quick())
        assert save(writer, 3) and newest_step(root) == 3
        shutil.rmtree(root)


def test_a_full_disk_gets_its_space_back(tmp_path: Path) -> None:
    disk = Disk(fail_at=7, error=errno.ENOSPC)
    writer = on(disk, tmp_path / "ckpts")
    assert save(writer, 1) is None
    assert not list((tmp_path / "ckpts").glob("step-*"))


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (errno.ESTALE, 75),
        (errno.ETIMEDOUT, 75),
        (errno.EHOSTDOWN, 75),
        (errno.EDQUOT, 2),
        (errno.EROFS, 2),
    ],
)
def test_a_network_file_system_that_is_away_asks_for_a_restart(
    tmp_path: Path, code: int, exit_code: int
) -> None:
    writer = on(Quick(), tmp_path / "ckpts")
    writer.claim()
    writer.storage = LocalStorage(Disk(fail_at=0, error=code, sticky=True))
    for step in range(1, MAX_FAILED_SAVES):
        assert save(writer, step) is None
    with pytest.raises(CheckpointError, match="third in a row") as caught:
        save(writer, 9)
    assert caught.value.exit_code == exit_code


def test_refusals_in_a_row_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = on(Quick(), tmp_path / "ckpts")
    save(writer, 1)
    writer.storage = LocalStorage(Disk(fail_at=0, error=errno.ENOSPC, sticky=True))
    for step in range(MAX_FAILED_SAVES - 1):
        assert save(writer, 3 + 2 * step) is None
        record = caplog.records[-1]
        assert record.levelno == logging.WARNING
        assert (
            f"refusal {step + 1} of 3 in a row" in record.getMessage()
            and "ckpt.keep_last" in record.getMessage()
        )
    with pytest.raises(
        CheckpointError,
        match=r"third in a row: .*ENOSPC(.|\n)*fix: free space, or keep",
    ) as caught:
        save(writer, 9)
    # Somebody must free space before a restart helps.
    assert caught.value.exit_code == 2
    with pytest.raises(CheckpointError, match="ENOSPC"):
        writer.save(11, tensors(11), {}, {}, final=True)
