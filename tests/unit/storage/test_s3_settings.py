"""Settings of S3 in the environment that boto3 does not accept: one message, before any request."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.errors import UserError
from evomesh.storage.urls import open_storage

pytest.importorskip("boto3")

SETTINGS = [
    ({"AWS_PROFILE": "nobody"}, "profile (nobody) could not be found"),
    ({"AWS_ENDPOINT_URL": "not a url"}, "Invalid endpoint: not a url"),
    ({"AWS_REGION": "mars base"}, "mars base"),
    ({"AWS_DEFAULT_REGION": "a/b"}, "a/b"),
    ({"AWS_RETRY_MODE": "odd"}, "odd"),
    ({"AWS_DEFAULTS_MODE": "odd"}, "odd"),
    ({"AWS_SECRET_ACCESS_KEY": ""}, "aws_secret_access_key"),
    ({"EVOMESH_S3_READ_TIMEOUT": "soon"}, "EVOMESH_S3_READ_TIMEOUT='soon'"),
    ({"EVOMESH_S3_CONNECT_TIMEOUT": "-1"}, "EVOMESH_S3_CONNECT_TIMEOUT='-1'"),
]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-words")


@pytest.mark.parametrize(
    ("variables", "message"), SETTINGS, ids=[next(iter(pair[0])) for pair in SETTINGS]
)
def test_settings_that_cannot_be_used(
    keys: None, variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        open_storage("s3://bucket/folder")
    assert message in str(refused.value)
    assert next(iter(variables)) in str(refused.value), "the variable is named"
    assert "secret-words" not in str(refused.value)
    assert refused.value.exit_code == 2


def test_local_folders_do_not_ask_for_them(
    keys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variables, _ in SETTINGS:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    storage, path = open_storage(f"local:{tmp_path}")
    assert storage.list(path) == []
