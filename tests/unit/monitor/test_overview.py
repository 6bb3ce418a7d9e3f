"""What the files of a run folder tell."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from evomesh.errors import UserError
from evomesh.monitor.overview import (
    RunOverview,
    find_run,
    last_objects,
    read_overview,
    wait_for_run,
)
from evomesh.monitor.status import RankStatus, encode

NOW = 1000.0


def overview(*ranks: RankStatus) -> RunOverview:
    return RunOverview(Path("run"), NOW, list(ranks))


def rank(phase: str = "train", age: float = 0.0) -> RankStatus:
    return RankStatus(0, phase=phase, time=NOW - age)


@pytest.mark.parametrize(
    ("ranks", "state"),
    [
        ([], "unknown"),
        ([rank(), rank()], "running"),
        ([rank(), rank(age=60)], "running"),  # the silent one is marked in the table
        ([rank(age=60), rank(age=11)], "silent"),
        ([rank("done", 1e6), rank("done", 1e6)], "done"),
        ([rank("done"), rank()], "running"),
        ([rank("done"), rank(age=60)], "silent"),
        ([rank("failed"), rank("stopped"), rank(age=60)], "failed"),
        ([rank("stopped", 1e6), rank("stopped", 1e6)], "stopped"),
    ],
)
def test_the_state_of_a_run(ranks: list[RankStatus], state: str) -> None:
    assert overview(*ranks).state == state


def test_files_of_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "status").mkdir()
    (tmp_path / "status/a.jsonl").write_bytes(encode(RankStatus(1)))
    (tmp_path / "status/b.jsonl").write_bytes(encode(RankStatus(0)))
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0}\n{"step": 1, "loss": "NaN", "tgs (tokens/gpu/second)": 10}\n{"st'
    )
    (tmp_path / "alerts.jsonl").write_text('{"kind": "started"}\n')
    view = read_overview(tmp_path, NOW)
    assert [one.rank for one in view.ranks] == [0, 1]
    assert view.metrics["step"] == 1
    assert str(view.figure("loss")) == "nan"
    assert view.figure("lr") is None
    assert view.tokens_per_second == 20
    assert view.alerts == [{"kind": "started"}]


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(f'{{"number": {number:>9}}}\n' for number in range(50_000)))
    assert [row["number"] for row in last_objects(path, 2)] == [49_998, 49_999]
    assert len(last_objects(path, 10**6)) < 15_000
    assert last_objects(tmp_path / "none", 2) == []


def test_a_run_is_found_by_its_folder_or_one_above(tmp_path: Path) -> None:
    for number, name in enumerate(("job/a", "job/b", "other/c")):
        folder = tmp_path / "RUN" / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").touch()
        age = 100 - number if name != "job/b" else 1
        for path in (folder / "metrics.jsonl", folder):
            os.utime(path, (NOW - age, NOW - age))
    root = tmp_path / "RUN"
    assert find_run(root / "job/a") == root / "job/a"
    assert find_run(root / "job") == root / "job/b"
    assert find_run(root) == root / "job/b"
    assert find_run(root / "other") == root / "other/c"


@pytest.mark.parametrize(
    ("name", "words"), [("gone", "does not exist"), ("empty", "not a run folder")]
)
def test_what_is_not_a_run_is_refused(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        find_run(tmp_path / name)


def test_a_run_that_has_not_begun_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "RUN" / "demo" / "01-31-12.00.00"

    def begin() -> None:
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("{}\n")

    later = threading.Timer(0.1, begin)
    later.start()
    assert wait_for_run(Path("RUN"), 0.005) == Path("RUN/demo/01-31-12.00.00")
    line = f"no run in {tmp_path / 'RUN'} yet: waiting for one; Ctrl-C ends this\n"
    assert capsys.readouterr().err == line
    assert wait_for_run(folder, 0.005) == folder
    assert capsys.readouterr().err == ""
    later.join()
