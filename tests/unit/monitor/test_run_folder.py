from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from evomesh.config.schema import RunConfig
from evomesh.monitor.run_folder import (
    rank_name,
    run_folder,
    start_of_new_folder,
    tensorboard_folder,
)
from tests.support.covers import covers

pytestmark = covers("promise:tensorboard")

NOW = datetime(2023, 7, 7, 12, 26, 58)


@covers("tensorboard_folder")
def test_folders_are_those_of_internevo() -> None:
    run = RunConfig(job_name="7b_train")
    folder = run_folder(run, NOW)
    assert folder == Path("RUN/7b_train/07-07-12.26.58")
    name = rank_name(dp=0, tp=1, pp=2, main=True)
    assert (
        tensorboard_folder(run, folder, name)
        == folder / "tensorboards" / "main_dp=0_tp=1_pp=2"
    )
    own = RunConfig(run_dir="here", tensorboard_folder="there")
    assert run_folder(own, NOW) == Path("here")
    assert tensorboard_folder(own, Path("here"), "dp=0_tp=0_pp=0") == Path(
        "there/dp=0_tp=0_pp=0"
    )


def test_two_runs_of_one_second_have_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunConfig(job_name="job")
    now = NOW.timestamp()
    assert start_of_new_folder(run, now) == now
    run_folder(run, NOW).mkdir(parents=True)
    assert start_of_new_folder(run, now) == now + 1
    # A folder that the user names is a run's own choice, also where it exists.
    named = RunConfig(job_name="job", run_dir=str(tmp_path))
    assert start_of_new_folder(named, now) == now
