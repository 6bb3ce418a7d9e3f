"""Bodies that would take long to parse are refused before they are parsed; what texts contain does not count."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest

from evomesh.serve import page_security
from evomesh.serve.page_security import parse_call
from evomesh.serve.requests import MAX_CONTAINERS, MAX_VALUES, ApiError
from evomesh.serve.schema import CompletionRequest, parse_request
from tests.support.serving import Served, serving, tiny_service
from tests.unit.serve.conftest import LIMITS


def completion(prompt: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": prompt}).encode()


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ([1] * (MAX_VALUES + 1), "131072 values"),
        ([[1, 2]] * (MAX_CONTAINERS + 1), "20000 lists"),
        ([["," * 9, 1]] * (MAX_CONTAINERS + 1), "20000 lists"),
        (["a"] * (MAX_VALUES + 1), "131072 values"),
    ],
)
def test_very_many_values_are_refused(prompt: Any, part: str) -> None:
    with pytest.raises(ApiError, match=part) as error:
        parse_request(CompletionRequest, completion(prompt))
    assert (error.value.status, error.value.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    "prompt",
    [
        [1] * (MAX_VALUES - 10),
        "," * (MAX_VALUES + 1),
        '\\",["' * MAX_VALUES,
        ["a, b, c, [d]"] * 100_000,
    ],
    ids=["ids", "commas", "quotes", "texts"],
)
def test_large_prompts_are_parsed(prompt: Any) -> None:
    assert parse_request(CompletionRequest, completion(prompt)).prompt == prompt


def test_a_call_of_the_page_has_the_same_limit() -> None:
    conversation = [{"role": "user", "content": "a"}] * (MAX_CONTAINERS + 1)
    body = json.dumps(
        {"data": [conversation], "fn_index": 0, "session_hash": "x"}
    ).encode()
    with pytest.raises(ApiError, match="20000 lists"):
        parse_call(body)


@pytest.fixture
def page_server(model: Any, tmp_path: Any) -> Any:
    page = pytest.importorskip("evomesh.serve.page")
    service = tiny_service(tmp_path, model, LIMITS)
    with serving(
        service, extend=lambda app: page.mount_page(app, service, None)
    ) as served:
        yield served


def test_the_page_parses_in_the_thread_for_it(
    page_server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def refuse(body: bytes) -> dict[str, Any]:
        names.append(threading.current_thread().name)
        raise ApiError(400, "no", code="invalid_value")

    path = "/gradio_api/queue/join"
    monkeypatch.setitem(page_security.CALL_PARSERS, path, refuse)
    assert httpx.post(page_server.url + path, json={}, timeout=60).status_code == 400
    assert [name.partition("_")[0] for name in names] == ["parser"]
