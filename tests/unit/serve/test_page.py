"""What a client of the chat page cannot do: read files, bring files, reach what the page does not use, or act for a
page of another site."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import Mount

from evomesh.errors import UserError
from evomesh.models.language_model import LanguageModel
from evomesh.serve.door import Door
from evomesh.serve.page import ChatPage, PageSettings, _say, mount_page
from tests.support.serving import Served, serving, tiny_service
from tests.unit.serve.conftest import LIMITS

CONTROLS = ["", 0, 0.95, 0, 0, 1, 3, 1, False]
JOIN, RUN = "/gradio_api/queue/join", "/gradio_api/run/predict"
OTHER = [
    {"origin": "http://localhost:1"},
    {"origin": "https://example.org"},
    {"origin": "null"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},  # another port of this machine
]


@pytest.fixture(scope="module")
def served(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    service = tiny_service(tmp_path_factory.mktemp("tokenizer"), model, LIMITS)
    with serving(service, extend=lambda app: mount_page(app, service, None)) as served:
        yield served


@pytest.fixture(scope="module")
def functions(served: Served) -> dict[str, int]:
    """Numbers of the page's functions; no two have the same outputs."""
    config = httpx.get(f"{served.url}/config", timeout=60).json()
    kind = {part["id"]: part["type"] for part in config["components"]}
    names = {
        "chat": ["chatbot", "markdown"],
        "say": ["textbox", "chatbot"],
        "complete": ["textbox", "markdown"],
    }
    return {
        name: next(
            job["id"]
            for job in config["dependencies"]
            if job["inputs"] and [kind[o] for o in job["outputs"]] == outputs
        )
        for name, outputs in names.items()
    }


@pytest.fixture(autouse=True)
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    return tmp_path / "uploads"


def call(client: httpx.Client, number: int, data: list[Any], **more: Any) -> tuple[int, str]:
    """Status of the request and everything that the stream of its session then says."""
    session = os.urandom(6).hex()
    body = {
        "data": data,
        "fn_index": number,
        "session_hash": session,
        "event_data": None,
        "trigger_id": 1,
    } | more
    answer = client.post(JOIN, json=body)
    if answer.status_code != 200:
        return answer.status_code, answer.text
    return 200, client.get("/gradio_api/queue/data", params={"session_hash": session}).text


def turn(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "metadata": None, "content": list(parts), "options": None}


def file_of(path: Path | str) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, "orig_name": "x.txt", "url": None}


def test_text_is_answered(client: httpx.Client, functions: dict[str, int]) -> None:
    status, said = call(client, functions["say"], ["hello", []])
    answer = next(json.loads(line[6:]) for line in said.splitlines() if "process_completed" in line)
    history = answer["output"]["data"][1]
    assert (status, history) == (200, [turn({"text": "hello", "type": "text"})])
    status, said = call(client, functions["chat"], [history, *CONTROLS])
    assert status == 200
    assert "3 new tokens" in said
    status, said = call(client, functions["complete"], ["abc", *CONTROLS])
    assert status == 200
    assert "3 new tokens" in said
    body = {"data": ["hello", []], "fn_index": functions["say"], "session_hash": "x", "trigger_id": 1}
    assert client.post(RUN, json=body).json()["data"][1] == history
    assert client.get("/").status_code == client.get("/theme.css").status_code == 200


@pytest.mark.parametrize("name", ["chat", "say", "complete"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda file: turn({"type": "file", "file": file}),
        lambda file: turn({"type": "text", "text": "a"}, {"type": "file", "file": file, "alt_text": None}),
        lambda file: turn({"type": "text", "text": "a", "file": file}),
        lambda file: turn({"type": "component", "component": "image", "value": file, "props": {}}),
        turn,
        lambda file: {"role": "user", "content": file},
        lambda file: file,
    ],
)
def test_no_file_of_the_server_comes_back(
    client: httpx.Client, functions: dict[str, int], uploads: Path, tmp_path: Path, name: str, wrap: Any
) -> None:
    private = tmp_path / "private.txt"
    private.write_text("the secret")
    message = wrap(file_of(private))
    inputs: dict[str, list[Any]] = {"chat": [[message]], "say": ["x", [message]], "complete": [message]}
    values, rest = inputs[name], [] if name == "say" else CONTROLS
    status, said = call(client, functions[name], [*values, *rest])
    assert status == 400, said
    body = {"data": [*values, *rest], "fn_index": functions[name], "session_hash": "x"}
    assert client.post(RUN, json=body).status_code == 400
    assert "gradio_api/file" not in said
    assert not list(uploads.rglob("*"))
    url = file_of("http://127.0.0.1:9/x")
    assert (
        call(client, functions[name], [wrap(url) if value is message else value for value in values])[0]
        == 400
    )


def test_gradio_itself_checks_paths_too(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uploads: Path
) -> None:
    """The door is not the only guard: without it the file is refused as well."""
    private = Path(__file__).parent / "conftest.py"
    service = tiny_service(tmp_path, model, LIMITS)

    def extend(app: FastAPI) -> None:
        mount_page(app, service, None)
        mount = app.routes[-1]
        assert isinstance(mount, Mount)
        assert isinstance(mount.app, Door)
        mount.app = mount.app.app

    with serving(service, extend=extend) as served, httpx.Client(base_url=served.url, timeout=60) as client:
        said = [
            call(client, number, [[turn({"type": "file", "file": file_of(private)})], *CONTROLS])[1]
            for number in range(9)
        ]
        assert any("Cannot move" in text for text in said)
        assert not [file for file in uploads.rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/component_server/"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/run/other"),
        ("POST", "/gradio_api/run/predict/"),
        ("POST", "/gradio_api/api/predict"),
        ("POST", "/gradio_api/call/_say"),
        ("POST", "/gradio_api/call/v2/_say"),
        ("POST", "/gradio_api/reset"),
        ("POST", "/gradio_api/stream/x"),
        ("POST", "/gradio_api/vibe-code"),
        ("POST", "/gradio_api/run-history/connect"),
        ("POST", "/gradio_api/queue/join/"),
        ("PUT", "/gradio_api/queue/join"),
        ("OPTIONS", "/gradio_api/queue/join"),
        ("OPTIONS", "/v1/chat/completions"),
        ("GET", "/gradio_api/upload_progress?upload_id=x"),
        ("GET", "/gradio_api/file=/etc/hostname"),
        ("GET", "/gradio_api/file/etc/hostname"),
        ("GET", "/gradio_api/proxy=https://x.hf.space/"),
        ("HEAD", "/gradio_api/proxy=https://x.hf.space/"),
        ("GET", "/gradio_api/custom_component/x/client/component/a.js"),
        ("GET", "/gradio_api/stream/a/b/1/playlist.m3u8"),
        ("GET", "/gradio_api/deep_link?session_hash=x"),
        ("GET", "/gradio_api/dev/reload"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/run-history/records"),
        ("GET", "/monitoring"),
        ("GET", "/assets/%2e%2e/%2e%2e/config"),
        ("GET", "/static/..%2f..%2fconfig"),
        ("GET", "/svelte/..%5c..%5cconfig"),
    ],
)
def test_what_the_page_does_not_use_is_not_there(client: httpx.Client, method: str, path: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 404, answer.text
    if method != "HEAD":
        assert answer.json()["error"]["message"] == "nothing here"


def test_nothing_is_uploaded(client: httpx.Client, uploads: Path) -> None:
    for path in ("/gradio_api/upload", "/upload", "/login"):
        answer = client.post(path, files={"files": ("x.txt", b"x" * 5000)})
        assert answer.status_code in (404, 413), path
    assert not list(uploads.rglob("*"))


@pytest.mark.parametrize("headers", OTHER)
def test_pages_of_other_sites_can_do_nothing(
    client: httpx.Client, functions: dict[str, int], headers: dict[str, str]
) -> None:
    body = {"data": ["hello", []], "fn_index": functions["say"], "session_hash": "other"}
    assert client.post(JOIN, json=body, headers=headers).status_code == 403
    assert client.post(RUN, json=body, headers=headers).status_code == 403
    assert client.post(JOIN, content=json.dumps(body), headers=headers).status_code == 403
    assert (
        client.post("/login", data={"username": "evomesh", "password": "x"}, headers=headers).status_code
        == 403
    )
    cancel = {"session_hash": "other", "fn_index": 1, "event_id": "x"}
    assert client.post("/gradio_api/cancel", json=cancel, headers=headers).status_code == 403
    assert (
        client.get("/gradio_api/queue/data", params={"session_hash": "x"}, headers=headers).status_code == 403
    )


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/healthz", "/metrics", "/v1/models", "/v1/none"]
)
@pytest.mark.parametrize("headers", OTHER[:3])
def test_no_answer_can_be_read_by_another_site(
    client: httpx.Client, path: str, headers: dict[str, str]
) -> None:
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    for answer in (client.get(path, headers=headers), client.options(path, headers=headers | ask)):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_page_itself_may_ask(client: httpx.Client, served: Served, functions: dict[str, int]) -> None:
    body = {"data": ["", []], "fn_index": functions["say"], "session_hash": "own"}
    for headers in ({"origin": served.url}, {"origin": "https://any.where", "sec-fetch-site": "same-origin"}):
        assert client.post(JOIN, json=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"data": {"a": 1}},
        {"data": None},
        {"data": [[["hello", "there"]]]},
        {"data": [[{"role": "tool", "content": "x"}]]},
        {"data": [[{"role": "user", "content": 5}]]},
        {"data": [[{"role": "user", "content": [{"type": "text", "text": {"path": "/"}}]}]]},
        {"fn_index": "1"},
        {"fn_index": True},
        {"fn_index": None},
        {"session_hash": 5},
        {"trigger_id": {}},
    ],
)
def test_calls_of_another_kind(client: httpx.Client, body: dict[str, Any]) -> None:
    good = {"data": ["x", []], "fn_index": 0, "session_hash": "x"}
    assert client.post(JOIN, json=good | body).status_code == 400
    assert client.post("/gradio_api/cancel", json=good | body).status_code == 400


def test_a_large_call_is_refused(client: httpx.Client) -> None:
    body = {"data": ["x" * LIMITS.body_bytes, []], "fn_index": 0, "session_hash": "x"}
    assert client.post(JOIN, json=body).status_code == 413


def test_what_was_not_checked_stays_out_of_the_call(client: httpx.Client, functions: dict[str, int]) -> None:
    status, said = call(
        client,
        functions["say"],
        ["x", []],
        event_data=file_of("/etc/hostname"),
        batched=True,
        oauth_token="x",
    )
    assert status == 200
    assert '"text":"x"' in said


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, None),
        (0, 5),
        (1, "0"),
        (1, None),
        (1, True),
        (5, float("nan")),
        (7, None),
        (7, float("inf")),
        (8, 1),
    ],
)
def test_values_of_the_controls_have_their_kind(place: int, value: Any) -> None:
    values: list[Any] = [*CONTROLS]
    values[place] = value
    with pytest.raises(UserError, match="has no valid value"):
        PageSettings(*values)


@pytest.mark.parametrize(
    "history",
    [
        None,
        "text",
        [None],
        [{"role": "user"}],
        [{"role": "user", "content": ("/etc/hostname",)}],
        [turn({"type": "file", "file": file_of("/etc/hostname")})],
    ],
)
def test_functions_take_and_give_text_alone(served: Served, history: Any) -> None:
    with pytest.raises(UserError, match="conversation"):
        _say("hello", history)

    async def answers() -> list[Any]:
        return [answer async for answer in ChatPage(served.service).chat(history, gr.Request(), *CONTROLS)]

    assert [said for said, _ in asyncio.run(answers())] == [[]]
