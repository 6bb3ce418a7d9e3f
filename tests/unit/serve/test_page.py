"""What clients of the chat page cannot do: read files, upload files, reach routes that the page does not use, or act
for a page of another site."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import Mount

from evomesh.errors import UserError
from evomesh.models.language_model import LanguageModel
from evomesh.serve import page_security
from evomesh.serve.page_security import GradioGuard, OpenStreams
from evomesh.serve.requests import ApiError
from tests.support.serving import Served, serving, tiny_service
from tests.unit.serve.conftest import LIMITS

# gradio takes seconds to import: the tests that need it do so, and collecting does not.
CONTROLS = ["", 0, 0.95, 0, 0, 1, 3, 1, False]
JOIN, RUN = "/gradio_api/queue/join", "/gradio_api/run/predict"
OTHER_SITE_HEADERS = [
    {"origin": "http://localhost:1"},
    {"origin": "https://example.org"},
    {"origin": "null"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},  # another port of this machine
]


@pytest.fixture(scope="module")
def served(
    model: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    from evomesh.serve.page import mount_page

    service = tiny_service(tmp_path_factory.mktemp("tokenizer"), model, LIMITS)
    with serving(service, extend=lambda app: mount_page(app, service, None)) as served:
        yield served


@pytest.fixture(scope="module")
def functions(served: Served) -> dict[str, int]:
    """Return the number of each function of the page; no two have the same outputs."""
    config = httpx.get(f"{served.url}/config", timeout=60, verify=False).json()
    component_types = {part["id"]: part["type"] for part in config["components"]}
    names = {
        "chat": ["chatbot", "markdown"],
        "append": ["textbox", "chatbot"],
        "complete": ["textbox", "markdown"],
    }
    return {
        name: next(
            job["id"]
            for job in config["dependencies"]
            if job["inputs"] and [component_types[o] for o in job["outputs"]] == outputs
        )
        for name, outputs in names.items()
    }


@pytest.fixture(autouse=True)
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    return tmp_path / "uploads"


def call(
    client: httpx.Client, function: int, data: list[Any], **more: Any
) -> tuple[int, str]:
    """Return the status of a call, and everything that its session's stream then holds."""
    session = os.urandom(6).hex()
    body = {
        "data": data,
        "fn_index": function,
        "session_hash": session,
        "event_data": None,
        "trigger_id": 1,
    } | more
    answer = client.post(JOIN, json=body)
    if answer.status_code != 200:
        return answer.status_code, answer.text
    return 200, client.get(
        "/gradio_api/queue/data", params={"session_hash": session}
    ).text


def message_of(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "metadata": None, "content": list(parts), "options": None}


def file_of(path: Path | str) -> dict[str, Any]:
    return {
        "path": str(path),
        "meta": {"_type": "gradio.FileData"},
        "orig_name": "x.txt",
        "url": None,
    }


def test_text_is_answered(client: httpx.Client, functions: dict[str, int]) -> None:
    status, streamed = call(client, functions["append"], ["hello", []])
    answer = next(
        json.loads(line[6:])
        for line in streamed.splitlines()
        if "process_completed" in line
    )
    history = answer["output"]["data"][1]
    assert (status, history) == (200, [message_of({"text": "hello", "type": "text"})])
    status, streamed = call(client, functions["chat"], [history, *CONTROLS])
    assert status == 200
    assert "3 new tokens" in streamed
    status, streamed = call(client, functions["complete"], ["abc", *CONTROLS])
    assert status == 200
    assert "3 new tokens" in streamed
    body = {
        "data": ["hello", []],
        "fn_index": functions["append"],
        "session_hash": "x",
        "trigger_id": 1,
    }
    assert client.post(RUN, json=body).json()["data"][1] == history
    assert client.get("/").status_code == client.get("/theme.css").status_code == 200


@pytest.mark.parametrize("name", ["chat", "append", "complete"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda file: message_of({"type": "file", "file": file}),
        lambda file: message_of(
            {"type": "text", "text": "a"},
            {"type": "file", "file": file, "alt_text": None},
        ),
        lambda file: message_of({"type": "text", "text": "a", "file": file}),
        lambda file: message_of(
            {"type": "component", "component": "image", "value": file, "props": {}}
        ),
        message_of,
        lambda file: {"role": "user", "content": file},
        lambda file: file,
    ],
)
def test_no_file_of_the_server_comes_back(
    client: httpx.Client,
    functions: dict[str, int],
    uploads: Path,
    tmp_path: Path,
    name: str,
    wrap: Any,
) -> None:
    private = tmp_path / "private.txt"
    private.write_text("the secret")
    message = wrap(file_of(private))
    inputs: dict[str, list[Any]] = {
        "chat": [[message]],
        "append": ["x", [message]],
        "complete": [message],
    }
    values, rest = inputs[name], [] if name == "append" else CONTROLS
    status, streamed = call(client, functions[name], [*values, *rest])
    assert status == 400, streamed
    body = {"data": [*values, *rest], "fn_index": functions[name], "session_hash": "x"}
    assert client.post(RUN, json=body).status_code == 400
    assert "gradio_api/file" not in streamed
    assert not list(uploads.rglob("*"))
    url = file_of("http://127.0.0.1:9/x")
    assert (
        call(
            client,
            functions[name],
            [wrap(url) if value is message else value for value in values],
        )[0]
        == 400
    )


def test_gradio_checks_paths_itself(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uploads: Path
) -> None:
    """Without the guard, gradio rejects the file as well."""
    from evomesh.serve.page import mount_page

    private = Path(__file__).parent / "conftest.py"
    service = tiny_service(tmp_path, model, LIMITS)

    def extend(app: FastAPI) -> None:
        mount_page(app, service, None)
        mount = app.routes[-1]
        assert isinstance(mount, Mount)
        assert isinstance(mount.app, GradioGuard)
        mount.app = mount.app.app

    with (
        serving(service, extend=extend) as served,
        httpx.Client(base_url=served.url, timeout=60, verify=False) as client,
    ):
        streams = [
            call(
                client,
                number,
                [[message_of({"type": "file", "file": file_of(private)})], *CONTROLS],
            )[1]
            for number in range(9)
        ]
        assert any("Cannot move" in text for text in streams)
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
        ("POST", "/gradio_api/call/append_message"),
        ("POST", "/gradio_api/call/v2/append_message"),
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
def test_routes_that_the_page_does_not_use_do_not_exist(
    client: httpx.Client, method: str, path: str
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 404, answer.text
    if method != "HEAD":
        assert answer.json()["error"]["message"] == "the page has no such route"


def test_nothing_is_uploaded(client: httpx.Client, uploads: Path) -> None:
    for path in ("/gradio_api/upload", "/upload", "/login"):
        answer = client.post(path, files={"files": ("x.txt", b"x" * 5000)})
        assert answer.status_code in (404, 413), path
    assert not list(uploads.rglob("*"))


@pytest.mark.parametrize("headers", OTHER_SITE_HEADERS)
def test_calls_from_pages_of_other_sites_are_rejected(
    client: httpx.Client, functions: dict[str, int], headers: dict[str, str]
) -> None:
    body = {
        "data": ["hello", []],
        "fn_index": functions["append"],
        "session_hash": "other",
    }
    assert client.post(JOIN, json=body, headers=headers).status_code == 403
    assert client.post(RUN, json=body, headers=headers).status_code == 403
    assert (
        client.post(JOIN, content=json.dumps(body), headers=headers).status_code == 403
    )
    assert (
        client.post(
            "/login", data={"username": "evomesh", "password": "x"}, headers=headers
        ).status_code
        == 403
    )
    cancel = {"session_hash": "other", "fn_index": 1, "event_id": "x"}
    assert (
        client.post("/gradio_api/cancel", json=cancel, headers=headers).status_code
        == 403
    )
    assert (
        client.get(
            "/gradio_api/queue/data", params={"session_hash": "x"}, headers=headers
        ).status_code
        == 403
    )


@pytest.mark.parametrize(
    "path",
    ["/", "/config", "/theme.css", "/healthz", "/metrics", "/v1/models", "/v1/none"],
)
@pytest.mark.parametrize("headers", OTHER_SITE_HEADERS[:3])
def test_no_answer_can_be_read_by_another_site(
    client: httpx.Client, path: str, headers: dict[str, str]
) -> None:
    ask = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    for answer in (
        client.get(path, headers=headers),
        client.options(path, headers=headers | ask),
    ):
        assert not [
            name for name in answer.headers if name.startswith("access-control")
        ]


def test_the_page_itself_may_call(
    client: httpx.Client, served: Served, functions: dict[str, int]
) -> None:
    body = {"data": ["", []], "fn_index": functions["append"], "session_hash": "own"}
    for headers in (
        {"origin": served.url},
        {"origin": "https://any.where", "sec-fetch-site": "same-origin"},
    ):
        assert client.post(JOIN, json=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"data": {"a": 1}},
        {"data": None},
        {"data": [[["hello", "there"]]]},
        {"data": [[{"role": "tool", "content": "x"}]]},
        {"data": [[{"role": "user", "content": 5}]]},
        {
            "data": [
                [{"role": "user", "content": [{"type": "text", "text": {"path": "/"}}]}]
            ]
        },
        {"fn_index": "1"},
        {"fn_index": True},
        {"fn_index": None},
        {"session_hash": 5},
        {"trigger_id": {}},
    ],
)
def test_a_malformed_call_is_rejected(
    client: httpx.Client, body: dict[str, Any]
) -> None:
    good = {"data": ["x", []], "fn_index": 0, "session_hash": "x"}
    assert client.post(JOIN, json=good | body).status_code == 400
    assert client.post("/gradio_api/cancel", json=good | body).status_code == 400


def test_a_large_call_is_rejected(client: httpx.Client) -> None:
    text = "x" * LIMITS.page_call_bytes
    body = {"data": [text, []], "fn_index": 0, "session_hash": "x"}
    assert len(text) < LIMITS.body_bytes  # the API's limit is another one
    assert client.post(JOIN, json=body).status_code == 413


def test_unchecked_keys_of_a_call_do_not_reach_gradio(
    client: httpx.Client, functions: dict[str, int]
) -> None:
    status, streamed = call(
        client,
        functions["append"],
        ["x", []],
        event_data=file_of("/etc/hostname"),
        batched=True,
        oauth_token="x",
    )
    assert status == 200
    assert '"text":"x"' in streamed


@pytest.mark.parametrize(
    ("index", "value"),
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
def test_a_control_with_a_value_of_the_wrong_type_is_rejected(
    index: int, value: Any
) -> None:
    from evomesh.serve.page import PageSettings

    values: list[Any] = [*CONTROLS]
    values[index] = value
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
        [message_of({"type": "file", "file": file_of("/etc/hostname")})],
    ],
)
def test_functions_accept_conversations_of_text_only(
    served: Served, history: Any
) -> None:
    import gradio as gr

    from evomesh.serve.page import ChatPage, append_message

    with pytest.raises(UserError, match="conversation"):
        append_message("hello", history)

    async def answers() -> list[Any]:
        return [
            answer
            async for answer in ChatPage(served.service).answer_conversation(
                history, gr.Request(), *CONTROLS
            )
        ]

    assert [conversation for conversation, _ in asyncio.run(answers())] == [[]]


def test_an_emptied_seed_box_means_a_random_seed(
    client: httpx.Client, functions: dict[str, int]
) -> None:
    controls = [*CONTROLS]
    controls[7] = None
    status, streamed = call(client, functions["complete"], ["abc", *controls])
    assert status == 200
    assert "3 new tokens" in streamed


def test_browsers_are_told_to_load_no_images_of_other_servers(
    client: httpx.Client,
) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert "img-src 'self' data: blob:;" in policy


@pytest.mark.parametrize(
    "part",
    [
        "default-src 'self';",
        "object-src 'none';",
        "base-uri 'self';",
        "frame-ancestors",
    ],
)
def test_browsers_are_told_to_load_nothing_else_of_other_servers(
    client: httpx.Client, part: str
) -> None:
    for path in ("/", "/theme.css", "/gradio_api/info"):
        policy = client.get(path).headers["content-security-policy"]
        assert part in policy
        assert not re.search(r"https?:|\*", policy)


def test_the_stream_of_an_unknown_session_ends_without_a_traceback(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    answer = client.get("/gradio_api/queue/data", params={"session_hash": "unknown"})
    event = json.loads(answer.text.removeprefix("data: "))
    assert event["session_not_found"] is True
    assert not [record for record in caplog.records if record.exc_info]


def test_streams_of_pages_are_limited_per_client_and_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page_security, "MAX_STREAMS", 4)
    monkeypatch.setattr(page_security, "MAX_CLIENT_STREAMS", 2)
    streams = OpenStreams()

    def scope_of(client: str, path: str = "/gradio_api/heartbeat/x") -> dict[str, Any]:
        return {"type": "http", "path": path, "client": (client, 1)}

    def is_refused(client: str) -> bool:
        try:
            with streams.entered(scope_of(client)):
                return False
        except ApiError as error:
            return error.status == 429

    with contextlib.ExitStack() as opened:
        opened.enter_context(streams.entered(scope_of("10.0.0.1")))
        opened.enter_context(streams.entered(scope_of("10.0.0.1")))
        assert is_refused("10.0.0.1") and not is_refused("10.0.0.2")
        opened.enter_context(streams.entered(scope_of("10.0.0.2")))
        opened.enter_context(
            streams.entered(scope_of("10.0.0.3", "/gradio_api/queue/data"))
        )
        assert is_refused("10.0.0.4")
        for path in ("/", "/config", "/gradio_api/queue/join"):  # no streams
            opened.enter_context(streams.entered(scope_of("10.0.0.1", path)))
    assert not is_refused("10.0.0.1") and not is_refused("10.0.0.4")


def test_an_open_heartbeat_counts(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_security, "MAX_CLIENT_STREAMS", 1)
    with client.stream("GET", "/gradio_api/heartbeat/a") as beat:
        assert beat.status_code == 200
        assert client.get("/gradio_api/heartbeat/b").status_code == 429


def test_long_names_of_sessions_are_rejected(client: httpx.Client) -> None:
    body = {"data": ["x", []], "fn_index": 0, "session_hash": "x" * 65}
    assert client.post(JOIN, json=body).status_code == 400


def test_a_session_without_an_answer_leaves_nothing_of_its_stops(
    served: Served,
) -> None:
    import gradio as gr

    from evomesh.serve.page import ChatPage

    page = ChatPage(served.service)
    for number in range(50):
        page.stop_answer(gr.Request(session_hash=f"session {number}"))
    assert not page._stopped_sessions

    async def stop_at_once() -> list[str]:
        request = gr.Request(session_hash="x")
        statuses = []
        async for _, status in page.complete_text("abc", request, *CONTROLS):
            page.stop_answer(request)
            statuses.append(status)
        return statuses

    asyncio.run(stop_at_once())
    assert not page._stopped_sessions and not page._answers_of


def test_a_status_line_shows_no_secret(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gradio as gr

    from evomesh.serve.page import ChatPage

    def fail(text: str) -> list[int]:
        raise UserError("cannot read https://user:hunter2hunter2@example.org/tokenizer")

    monkeypatch.setattr(served.service, "text_ids", fail)

    async def complete() -> str:
        request = gr.Request(session_hash="x")
        async for _, status in ChatPage(served.service).complete_text(
            "abc", request, *CONTROLS
        ):
            return status
        return ""

    status = asyncio.run(complete())
    assert "cannot read https://" in status and "hunter2" not in status
