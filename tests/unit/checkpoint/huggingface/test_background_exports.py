"""Exports beside a run: their order, what the run's end waits for, and what may be deleted."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from evomesh.checkpoint.huggingface import background_exports
from evomesh.checkpoint.huggingface.background_exports import (
    BackgroundExports,
    ExportPlan,
)
from evomesh.checkpoint.huggingface.export_job import ExportJob, ExportResult
from evomesh.checkpoint.huggingface.exported_folder import (
    MARK,
    ExportMark,
    delete_old,
    delete_unfinished,
    read_mark,
)
from evomesh.checkpoint.native.find import open_checkpoint
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.config.export_hf import ExportHfConfig
from evomesh.config.schema import CheckpointConfig
from evomesh.storage.base import LockTakenError
from evomesh.storage.local import LocalStorage
from tests.support.covers import covers

WAIT_S = 60.0  # until a test fails; nothing here takes that long


class FakeExport:
    """An export that ends when the test lets it, or when the run gives it up."""

    def __init__(self, job: ExportJob, result: ExportResult) -> None:
        self.job, self.result = job, result
        self.may_end = threading.Event()
        self.was_ended = False

    def wait(self) -> ExportResult:
        assert self.may_end.wait(WAIT_S)
        if self.was_ended:
            return ExportResult(error="it was ended")
        if not self.result.error:
            folder = Path(self.job.out)
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            ExportMark(self.job.run, self.job.step, self.job.attempt).complete(folder)
        return self.result

    def end(self) -> None:
        self.was_ended = True
        self.may_end.set()


class FakeExports:
    """Starts fake exports, and lets a test wait until one was started."""

    def __init__(self) -> None:
        self.started: list[FakeExport] = []
        self.results: dict[int, ExportResult] = {}
        self.refuses: set[int] = set()
        self._changed = threading.Condition()

    def __call__(self, job: ExportJob) -> FakeExport:
        if job.step in self.refuses:
            raise OSError(12, "Cannot allocate memory")
        result = self.results.get(job.step, ExportResult())
        export = FakeExport(job, result)
        with self._changed:
            self.started.append(export)
            self._changed.notify_all()
        return export

    def number(self, count: int) -> FakeExport:
        """Return the export that was started as number ``count``, once it was."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.started) >= count, WAIT_S)
        return self.started[count - 1]


class Run:
    """A writer of tiny checkpoints whose commits are exported."""

    def __init__(self, root: Path, fakes: FakeExports, **plan: int) -> None:
        self.root = root
        self.fakes = fakes
        self.plan = ExportPlan(str(root), root / "hf", **plan)
        self.exports = BackgroundExports(self.plan, fakes)
        self.writer = CheckpointWriter(str(root), listener=self.exports, keep_last=1)

    def save(self, *steps: int) -> None:
        for step in steps:
            assert self.writer.save(step, {"w": torch.full((3,), float(step))}, {}, {})

    def finish(
        self, is_complete: bool = True, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self.exports.finish(is_complete=is_complete, should_stop=should_stop)

    def steps(self) -> list[int]:
        return [export.job.step for export in self.fakes.started]

    def checkpoints(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.root.glob("step-*"))


@pytest.fixture
def fakes() -> FakeExports:
    return FakeExports()


@pytest.fixture
def run(tmp_path: Path, fakes: FakeExports) -> Iterator[Run]:
    made = Run(tmp_path / "ckpts", fakes)
    made.exports.start()
    yield made
    made.exports.give_up()


def test_one_at_a_time_and_the_newest_replaces_what_waits(
    run: Run, fakes: FakeExports, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run.save(5)
    first = fakes.number(1)
    run.save(10, 15)
    assert len(fakes.started) == 1
    assert "step 10 is not exported: step 15 was saved before its turn" in caplog.text
    first.may_end.set()
    fakes.number(2).may_end.set()
    run.finish()
    assert run.steps() == [5, 15]
    assert sorted(path.name for path in (run.root / "hf").glob("hf-*")) == [
        "hf-00000005",
        "hf-00000015",
    ]


def test_retention_spares_what_is_exported_and_what_waits_for_it(
    run: Run, fakes: FakeExports
) -> None:
    run.save(5)
    first = fakes.number(1)
    run.save(10, 15, 20)
    # keep_last is 1, and the newest two always stay; 10 was replaced by later ones.
    assert run.checkpoints() == [5, 15, 20]
    first.may_end.set()
    second = fakes.number(2)
    run.save(25)
    assert run.checkpoints() == [20, 25]
    second.may_end.set()
    fakes.number(3).may_end.set()
    run.finish()


@covers("ckpt.export_hf.every")
def test_every_leaves_steps_out_but_never_the_last(
    tmp_path: Path, fakes: FakeExports
) -> None:
    run = Run(tmp_path, fakes, every=10)
    run.exports.start()
    for count, step in enumerate((10, 20), start=1):
        run.save(step)
        fakes.number(count).may_end.set()
        run.save(step + 5)
    finishing = threading.Thread(target=run.finish)
    finishing.start()
    fakes.number(3).may_end.set()
    finishing.join(WAIT_S)
    assert run.steps() == [10, 20, 25]


@pytest.mark.parametrize("how", ["result", "start"])
def test_a_failure_is_one_warning_with_the_command(
    run: Run, fakes: FakeExports, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    if how == "start":
        fakes.refuses.add(5)
    else:
        fakes.results[5] = ExportResult(error="logits differ by up to 3")
    run.save(5)
    if how == "result":
        fakes.number(1).may_end.set()
    run.finish()  # the last one is not tried again
    lines = [
        record.getMessage()
        for record in caplog.records
        if record.levelname == "WARNING" and "step 5" in record.getMessage()
    ]
    cause = "logits differ by up to 3" if how == "result" else "Cannot allocate memory"
    folder = run.root / "step-00000005"
    out = run.root / "hf" / "hf-00000005"
    assert len(lines) == 1
    assert cause in lines[0]
    assert lines[0].endswith(f"by hand: evomesh convert to-hf {folder} {out}")
    assert not out.exists()


def test_after_a_failure_the_next_one_is_exported(run: Run, fakes: FakeExports) -> None:
    fakes.results[5] = ExportResult(error="no")
    run.save(5)
    fakes.number(1).may_end.set()
    run.save(10)
    fakes.number(2).may_end.set()
    run.finish()
    assert [path.name for path in (run.root / "hf").glob("hf-*")] == ["hf-00000010"]


@pytest.mark.parametrize("signal_when", ["before the end", "while it waits"])
def test_a_signal_ends_the_wait(
    run: Run,
    fakes: FakeExports,
    signal_when: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(background_exports, "GRACE_S", 0.0)
    run.save(5)
    first = fakes.number(1)
    run.save(10)
    run.finish(signal_when == "while it waits", lambda: True)
    assert first.was_ended and len(fakes.started) == 1
    assert "the export of step 5 was given up; by hand: evomesh convert" in caplog.text
    assert "step 10 is not exported; by hand: evomesh convert to-hf" in caplog.text


def test_a_run_without_a_checkpoint_waits_for_nothing(run: Run) -> None:
    run.finish()


def test_a_checkpoint_is_exported_once(run: Run, fakes: FakeExports) -> None:
    run.save(5)
    fakes.number(1).may_end.set()
    run.finish()
    again = Run(run.root, fakes)
    again.exports.start()
    record = again.writer.folder.candidates()[0]
    checkpoint = open_checkpoint(record.storage, record.folder)
    again.writer.continue_from(checkpoint)
    again.finish()
    assert run.steps() == [5]
    # Without its folder the next run exports it, though nothing is saved in between.
    shutil.rmtree(run.root / "hf" / "hf-00000005")
    third = Run(run.root, fakes)
    third.writer.continue_from(checkpoint)
    third.exports.start()
    fakes.number(2).may_end.set()
    third.finish()
    assert run.steps() == [5, 5]


def test_another_job_that_exports_to_the_folder(
    run: Run,
    fakes: FakeExports,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    taken: list[str] = []

    def refuse(_: LocalStorage, path: str, holder: str) -> None:
        taken.append(path)
        raise LockTakenError(path, "process 7")

    run.writer.claim()
    monkeypatch.setattr(LocalStorage, "lock", refuse)
    run.save(5)
    run.finish()
    assert taken == [str(run.root / "hf" / ".writer")]
    assert "step 5 was not exported (another live job writes here: process 7)" in (
        caplog.text
    )
    assert fakes.started == []


def complete(root: Path, step: int, run: str = "..") -> Path:
    folder = root / f"hf-{step:08d}"
    (folder / "more").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "more" / "a.jinja").write_text("a")
    ExportMark(run, step, "00000000").complete(folder)
    return folder


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@covers("ckpt.export_hf.keep")
def test_old_exports_are_deleted(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        complete(tmp_path, step)
    deleted = delete_old(tmp_path, "..", 2, 15, print)
    assert [folder.name for folder in deleted] == ["hf-00000005"]
    assert names(tmp_path) == ["hf-00000010", "hf-00000015", "hf-00000020"]


def add_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def change_size(folder: Path) -> None:
    (folder / "config.json").write_text("{ }")


def remove_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def replace_by_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def link_inside(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")


def pin(folder: Path) -> None:
    folder.with_name(folder.name + ".pin").touch()


def take_mark(folder: Path) -> None:
    (folder / MARK).unlink()


def unfinished_mark(folder: Path) -> None:
    ExportMark("..", 5, "00000000").begin(folder)


def odd_mark(folder: Path) -> None:
    (folder / MARK).write_text('{"run": "..", "step": "5", "attempt": 0, "files": {}}')


def of_another_run(folder: Path) -> None:
    ExportMark("../../other", 5, "00000000").complete(folder)


@pytest.mark.parametrize(
    "change",
    [
        add_file,
        change_size,
        remove_file,
        replace_by_link,
        link_inside,
        pin,
        take_mark,
        unfinished_mark,
        odd_mark,
        of_another_run,
    ],
)
def test_an_export_that_is_not_as_it_was_written_stays(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    old = complete(tmp_path, 5)
    change(old)
    complete(tmp_path, 10)
    before = names(tmp_path)
    warnings: list[str] = []
    assert delete_old(tmp_path, "..", 1, 10, warnings.append) == []
    assert names(tmp_path) == before
    # Only what somebody changed is warned of, not another run's or a pinned one.
    changed = (add_file, change_size, remove_file, replace_by_link, link_inside)
    assert bool(warnings) == (change in (*changed, unfinished_mark))


def test_unfinished_exports_are_deleted_and_those_of_others_stay(
    tmp_path: Path,
) -> None:
    killed = tmp_path / ".hf-00000005.0a1b2c3d.tmp"
    by_hand = tmp_path / ".hf-00000005.0a1b2c3e.tmp"
    for folder in (killed, by_hand):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    ExportMark("..", 5, "00000000").begin(killed)
    whole = complete(tmp_path, 10)
    delete_unfinished(tmp_path)
    assert names(tmp_path) == [by_hand.name, whole.name]


def test_a_mark_names_every_file(tmp_path: Path) -> None:
    mark = read_mark(complete(tmp_path, 5))
    assert mark is not None
    assert mark.files == {"config.json": 2, "more/a.jinja": 1}


@covers("ckpt.export_hf", "ckpt.export_hf.folder")
@pytest.mark.parametrize("save", ["{}/ckpts", "local:{}/ckpts/", "s3://bucket/ckpts"])
def test_where_exports_go(tmp_path: Path, save: str) -> None:
    folder = save.format(tmp_path)
    config = CheckpointConfig(
        save_ckpt_folder=folder,
        enable_save_ckpt=True,
        enable_internevo2hf_ckpt=True,
        export_hf=ExportHfConfig(folder=f"{tmp_path}/hf", keep=3),
    )
    plan = ExportPlan.of(config)
    assert plan is not None and plan.root == tmp_path / "hf" and plan.keep == 3
    if not save.startswith("s3"):
        inside = config.model_copy(update={"export_hf": ExportHfConfig()})
        plan = ExportPlan.of(inside)
        assert plan is not None and plan.root == tmp_path / "ckpts" / "hf"
    off = config.model_copy(update={"enable_internevo2hf_ckpt": False})
    assert ExportPlan.of(off) is None
