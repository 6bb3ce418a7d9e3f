"""A user without a name or a home folder gets sentences, not tracebacks."""

from __future__ import annotations

import getpass
import pwd
from datetime import datetime
from pathlib import Path

import pytest

from evomesh.config.folders import shared_role
from evomesh.config.schema import RunConfig
from evomesh.config.user import expand_home, user_name
from evomesh.data.token_files.folders import check_folder
from evomesh.errors import UserError
from evomesh.monitor.run_folder import run_folder, tensorboard_folder
from evomesh.storage.urls import open_storage
from evomesh.train.stop import StopFile

PACKAGE = Path(__file__).parents[3] / "evomesh"


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number without a passwd entry."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)


def test_a_number_stands_for_the_name(nobody: None) -> None:
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    assert user_name().startswith("number ")
    with pytest.raises(
        UserError, match=r"cannot read the folder nowhere: .*as user number"
    ):
        check_folder("nowhere", "data.train_folder")


@pytest.mark.parametrize(
    "url", ["s3://runs/data", "boto3:s3://runs.127.0.0.1:9000/data", "s3:http://h/b/c"]
)
def test_data_in_a_store_is_refused_with_what_to_do(url: str) -> None:
    with pytest.raises(UserError, match=f"found {url}, but data is read") as refused:
        check_folder(url, "data.train_folder")
    assert "copy the files" in refused.value.fix


@pytest.mark.parametrize("path", ["~/data", "~", "~no-such-user/data"])
def test_a_home_folder_that_does_not_exist(nobody: None, path: str) -> None:
    with pytest.raises(
        UserError, match="home folder, and this user has none"
    ) as caught:
        expand_home(path)
    assert caught.value.where == path and "HOME" in caught.value.fix


def test_a_home_folder_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert expand_home("~/data") == Path("/somewhere/data")
    assert expand_home("a/~") == Path("a/~")


def test_every_folder_of_a_run_may_begin_with_a_tilde(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for url in ("~/ckpts", "local:~/ckpts"):
        assert open_storage(url)[1] == str(tmp_path / "ckpts")
        assert shared_role(url, str(tmp_path / "ckpts"))
    run = RunConfig(run_dir="~/run", tensorboard_folder="~/board")
    now = datetime(2026, 1, 31)
    assert run_folder(run, now) == tmp_path / "run"
    assert tensorboard_folder(run, tmp_path, "a") == tmp_path / "board/a"
    StopFile("~/stop")
    assert (tmp_path / "stop").read_text() == "0\n"


def test_nothing_asks_the_system_directly() -> None:
    asking = ("expanduser(", "Path.home(", "getuser(", "getpwuid(")
    found = [
        f"{path.relative_to(PACKAGE)}: {call}"
        for path in PACKAGE.rglob("*.py")
        for call in asking
        if path.name != "user.py" and call in path.read_text()
    ]
    assert not found, "use evomesh.config.user"
