"""Uploads to a server that speaks the hub's protocol: what arrives, and what is refused before and by it."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.huggingface.exported_folder import MARK, ExportMark
from evomesh.checkpoint.huggingface.push import PushOptions, push
from evomesh.errors import UserError
from tests.support.hub import TOKEN, FakeHub, Repo
from tests.unit.checkpoint.huggingface.hf_models import export, model_config, save_model

REPO = "me/tiny"


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def hub(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The server, empty; the client takes its address when it is loaded, so constants are set."""
    server.repos.clear()
    server.stored.clear()
    server.refuse.clear()
    server.requests.clear()
    server.answers_html = False
    use_endpoint(monkeypatch, server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several shards, with the mark of a run's export."""
    place = tmp_path_factory.mktemp("push")
    _, found = save_model(place / "c", model_config(dtype="float32"))
    options = ExportOptions(
        max_shard_bytes=20_000, mark=ExportMark("..", 7, found.attempt), compare=False
    )
    return export(found, place / "model", options, lambda _: None)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in exported.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def sent(folder: Path, repo: str = REPO, **options: object) -> list[str]:
    lines: list[str] = []
    push(str(folder), repo, PushOptions(**options), lines.append)  # type: ignore[arg-type]
    return lines


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARK
    }


def test_every_byte_arrives(hub: FakeHub, folder: Path) -> None:
    lines = sent(folder)
    repo = hub.repos[REPO]
    assert repo.branches == {"main": files(folder)}
    assert len([name for name in files(folder) if name.endswith("safetensors")]) > 1
    assert not repo.private and repo.messages == ["Upload model"]
    assert f"{hub.url}/{REPO}/commit/" in lines[-1]
    assert TOKEN not in "".join(lines)


def test_options(hub: FakeHub, folder: Path) -> None:
    sent(folder, private=True, revision="step/100", message="a better one")
    repo = hub.repos[REPO]
    assert repo.private and repo.messages == ["a better one"]
    assert repo.branches == {"main": {}, "step/100": files(folder)}


def test_a_second_push_replaces_the_files(hub: FakeHub, folder: Path) -> None:
    sent(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    sent(folder)
    assert hub.repos[REPO].branches["main"] == files(folder)


def test_a_name_without_an_owner_is_the_users(hub: FakeHub, folder: Path) -> None:
    sent(folder, "tiny")
    assert hub.repos["me/tiny"].branches["main"] == files(folder)


def test_private_is_not_pushed_to_a_public_repository(
    hub: FakeHub, folder: Path
) -> None:
    hub.repos[REPO] = Repo(private=False)
    with pytest.raises(UserError, match="the repository exists and is public"):
        sent(folder, private=True)
    assert hub.repos[REPO].branches == {"main": {}}


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def odd_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": [')


def missing_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])


def empty_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"")


def tensor_not_in_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))


def another_size(folder: Path) -> None:
    path = folder / "config.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"vocab_size": 64}))


@pytest.mark.parametrize(
    "damage",
    [
        no_config,
        odd_config,
        missing_shard,
        cut_shard,
        empty_shard,
        tensor_not_in_index,
        another_size,
    ],
)
def test_what_is_no_model_never_leaves(
    hub: FakeHub, folder: Path, damage: Callable[[Path], None]
) -> None:
    damage(folder)
    with pytest.raises(UserError) as caught:
        sent(folder)
    assert caught.value.exit_code == 2
    assert hub.requests == []


def test_without_a_tokenizer_there_is_a_warning(hub: FakeHub, folder: Path) -> None:
    assert any(line.startswith("warning: the tokenizer") for line in sent(folder))


@pytest.mark.parametrize("repo", ["a/b/c", "a b", "", "https://x/y", "-a/b"])
def test_a_name_that_is_none(hub: FakeHub, folder: Path, repo: str) -> None:
    with pytest.raises(UserError, match="cannot name a repository"):
        sent(folder, repo)
    assert hub.requests == []


CREATE = "/api/repos/create"
COMMIT = "/api/models/me/tiny/commit"


@pytest.mark.parametrize(
    ("path", "status", "code", "words"),
    [
        (CREATE, 401, 2, "the token is not valid: 401 (refused with 401)"),
        (CREATE, 403, 2, "the token may not write to this repository: 403"),
        (CREATE, 404, 2, "there is no such repository, or the token may not see it"),
        (CREATE, 400, 2, "the hub refuses the upload: 400 (refused with 400)"),
        (CREATE, 503, 75, "the hub answers 503"),
        (COMMIT, 403, 2, "the token may not write to this repository: 403"),
        (COMMIT, 401, 2, "the token is not valid: 401"),
        ("/lfs/", 403, 2, "the token may not write to this repository: 403"),
    ],
)
def test_what_the_hub_refuses(
    hub: FakeHub, folder: Path, path: str, status: int, code: int, words: str
) -> None:
    hub.refuse[path] = status
    with pytest.raises(UserError) as caught:
        sent(folder)
    text = str(caught.value)
    assert words in text and hub.url in text and TOKEN not in text
    assert caught.value.exit_code == code
    assert hub.repos.get(REPO, Repo()).branches == {"main": {}}


def test_a_wrong_token(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(UserError, match="the token is not valid: 401") as caught:
        sent(folder)
    assert "hf_another" not in str(caught.value)


def test_no_token(
    hub: FakeHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no token") as caught:
        sent(folder)
    assert "hf auth login" in str(caught.value) and hub.requests == []


def test_offline(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nothing can be uploaded") as caught:
        sent(folder)
    assert "HF_HUB_OFFLINE" in str(caught.value) and hub.requests == []


def test_without_the_client(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError) as caught:
        sent(folder)
    assert "pip install 'evomesh[hub]'" in str(caught.value)


def test_nobody_listens(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    use_endpoint(monkeypatch, url)
    with pytest.raises(UserError, match="the hub cannot be reached") as caught:
        sent(folder)
    assert url in str(caught.value) and caught.value.exit_code == 75


def test_a_server_that_is_no_hub(hub: FakeHub, folder: Path) -> None:
    hub.answers_html = True
    with pytest.raises(UserError, match="the server's answer is not that of a hub"):
        sent(folder)


@pytest.mark.slow
def test_the_command(hub: FakeHub, folder: Path) -> None:
    """In a new process, which loads the client as a user's does."""
    words = ["convert", "push", str(folder), REPO, "--message", "by hand"]
    variables = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    for token, code in ((TOKEN, 0), ("hf_another", 2)):
        done = subprocess.run(
            [sys.executable, "-c", "from evomesh.cli.main import main; main()", *words],
            env=os.environ | variables | {"HF_TOKEN": token},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert token not in done.stdout + done.stderr
    assert "the token is not valid: 401" in done.stderr
    assert hub.repos[REPO].branches["main"] == files(folder)
    assert hub.repos[REPO].messages == ["by hand"]


@pytest.mark.parametrize("path", ["nowhere", "s3://bucket/model"])
def test_a_folder_that_is_not_there(hub: FakeHub, path: str) -> None:
    with pytest.raises(UserError):
        push(path, REPO, PushOptions(), print)
    assert hub.requests == []
