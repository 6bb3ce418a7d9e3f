from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evomesh.monitor.tensorboard import TensorBoardWriter
from tests.support.covers import covers

pytestmark = covers("promise:tensorboard")


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_scalars_and_texts_can_be_read_back(tmp_path: Path) -> None:
    board = TensorBoardWriter(tmp_path, queue=2)
    for step in range(3):
        board.scalars(step, {"loss": 2.0 - step, "val/en_loss": 0.5})
    board.text("config", "address http://user:secret@host/")
    board.close()
    assert scalars(tmp_path, "loss") == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert scalars(tmp_path, "val/en_loss")[0] == (0, 0.5)
    assert b"secret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


@covers(
    "tensorboard",
    "tensorboard.queue_max_length",
    "monitor.tensorboard",
    "monitor.tensorboard.queue_max_length",
)
def test_steps_are_buffered_up_to_the_queue(tmp_path: Path) -> None:
    board = TensorBoardWriter(tmp_path, queue=2)
    size = lambda: sum(path.stat().st_size for path in tmp_path.iterdir())  # noqa: E731
    board.flush()
    empty = size()
    board.scalars(0, {"a": 1.0, "b": 2.0, "c": 3.0})
    assert size() == empty
    board.scalars(1, {"a": 1.0})
    assert size() > empty
    board.close()


def test_a_resumed_run_hides_what_it_writes_again(tmp_path: Path) -> None:
    first = TensorBoardWriter(tmp_path)
    for step in range(5):
        first.scalars(step, {"loss": 1.0})
    first.close()
    second = TensorBoardWriter(tmp_path, step=3)
    second.scalars(3, {"loss": 7.0})
    second.close()
    assert scalars(tmp_path, "loss") == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 7.0)]


@covers("resume_tb_folder")
def test_curves_of_an_earlier_run_are_copied_in(tmp_path: Path) -> None:
    old = TensorBoardWriter(tmp_path / "old")
    old.scalars(0, {"loss": 1.0})
    old.close()
    new = TensorBoardWriter(tmp_path / "new", step=1, resume_from=tmp_path / "old")
    new.scalars(1, {"loss": 2.0})
    new.close()
    assert scalars(tmp_path / "new", "loss") == [(0, 1.0), (1, 2.0)]
