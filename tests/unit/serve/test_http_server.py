"""Connections that are slow, broken or many do not hold others up, and leave nothing in the log."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from evomesh.models.language_model import LanguageModel
from evomesh.serve import http_server
from evomesh.serve.service import ServiceLimits
from tests.support.serving import Served, serving, tiny_service

pytestmark = pytest.mark.slow

COMPLETIONS = "/v1/completions"
HALF_HEADER = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: "


def connect(served: Served) -> socket.socket:
    connection = socket.create_connection(
        ("127.0.0.1", int(served.url.rpartition(":")[2]))
    )
    connection.settimeout(20)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Wait until the server closes a connection; False if it does not within 20 s."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("sent", [b"", HALF_HEADER])
@pytest.mark.parametrize("kept", [False, True])
def test_an_unfinished_header_is_closed(
    served: Served, monkeypatch: pytest.MonkeyPatch, sent: bytes, kept: bool
) -> None:
    monkeypatch.setattr(http_server, "HEADER_SECONDS", 0.2)
    with connect(served) as connection:
        if kept:
            connection.sendall(HALF_HEADER + b"y\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(sent)
        assert is_closed(connection)


def test_many_unfinished_headers_do_not_keep_others_out(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "MAX_WAITING", 20)
    waiting = [connect(served) for _ in range(60)]
    try:
        for connection in waiting:
            try:
                connection.sendall(HALF_HEADER)
            except (BrokenPipeError, ConnectionResetError):
                continue
        assert httpx.get(served.url + "/healthz", verify=False).status_code == 200
        assert all(is_closed(connection) for connection in waiting[:40])
    finally:
        for connection in waiting:
            connection.close()


def test_the_oldest_waiting_connection_is_closed_and_not_one_that_is_answered(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "MAX_WAITING", 2)
    body = {
        "model": "tiny",
        "prompt": "abc",
        "max_tokens": 8000,
        "temperature": 0,
        "stream": True,
    }
    with (
        serving(
            tiny_service(tmp_path, model, ServiceLimits(context_length=8192, slots=1))
        ) as served,
        httpx.stream(
            "POST", served.url + COMPLETIONS, json=body, timeout=30, verify=False
        ) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        waiting = [connect(served) for _ in range(4)]
        assert is_closed(waiting[0]) and is_closed(waiting[1])
        assert next(lines) == ""
        for connection in waiting:
            connection.close()


def test_answers_on_a_kept_connection_leave_at_once(served: Served) -> None:
    with connect(served) as connection:
        connection.sendall(HALF_HEADER + b"y\r\n\r\n")
        assert connection.recv(4096)
    with (
        http_server.bind("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()) as client,
    ):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert client


def test_one_turn_of_the_event_loop_reads_a_small_part_of_a_body(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    receive = http_server.BoundedProtocol.data_received

    def note(self: http_server.BoundedProtocol, data: bytes) -> None:
        sizes.append(len(data))
        receive(self, data)

    monkeypatch.setattr(http_server.BoundedProtocol, "data_received", note)
    content = b"1\r\na\r\n" * 100_000  # chunks of one byte each
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with connect(served) as connection:
        connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            connection.sendall(content)
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")
    assert len(sizes) > 10
    assert max(sizes) <= 2**14


def test_the_search_for_garbage_leaves_out_what_was_there_before(
    model: LanguageModel, tmp_path: Path
) -> None:
    there_before: list[object] = [object()]

    def is_searched() -> bool:
        return any(found is there_before for found in gc.get_objects())

    assert is_searched()
    with serving(tiny_service(tmp_path, model, ServiceLimits(64))):
        assert not is_searched()
    assert is_searched()


def test_a_half_sent_body_leaves_nothing_in_the_log(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    before = metric(served)
    with connect(served) as connection:
        connection.sendall(head + b"content-length: 1000\r\n\r\n" + b'{"model": "ti')
    end = time.monotonic() + 20
    while metric(served) == before and time.monotonic() < end:
        time.sleep(0.01)
    assert metric(served) == before + 1
    assert not [
        record
        for record in caplog.records
        if record.levelno >= logging.WARNING or record.exc_info
    ]


def metric(served: Served) -> float:
    """Return how many requests the server gave up since their clients had closed the connection."""
    name = 'evomesh_requests_total{endpoint="/v1/completions",status="499"}'
    lines = httpx.get(served.url + "/metrics", verify=False).text.splitlines()
    return sum(
        float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)
    )


def test_a_stop_ends_streams_with_an_event_and_no_traceback(
    model: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(http_server, "STOP_SECONDS", 0.2)
    caplog.set_level(logging.DEBUG)
    service = tiny_service(
        tmp_path, model, ServiceLimits(context_length=200_000, slots=3)
    )
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 100_000, "temperature": 0}
    found: dict[str, Any] = {}
    begun = threading.Event()

    def stream(url: str) -> None:
        with httpx.stream(
            "POST",
            url + COMPLETIONS,
            json=body | {"stream": True},
            timeout=60,
            verify=False,
        ) as answer:
            lines: Iterator[str] = answer.iter_lines()
            next(lines)
            begun.set()
            found["events"] = [line for line in lines if line]

    def whole(url: str) -> None:
        found["status"] = httpx.post(
            url + COMPLETIONS, json=body, timeout=60, verify=False
        ).status_code

    with serving(service) as served:
        clients = [
            threading.Thread(target=work, args=(served.url,))
            for work in (stream, whole)
        ]
        for client in clients:
            client.start()
        assert begun.wait(30)
        end = time.monotonic() + 20
        while service.open_sequences < 2 and time.monotonic() < end:
            time.sleep(0.01)
    for client in clients:
        client.join(30)
    last = json.loads(found["events"][-1].removeprefix("data: "))
    assert last["error"]["message"] == "the server is stopping"
    assert found["status"] == 503
    assert not [record for record in caplog.records if record.exc_info], caplog.text


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ('"' + "a" * 3_600_000 + '"', "context_length_exceeded"),
        # More values than a body may have.
        ("[" + "7," * 1_800_000 + "7]", "invalid_json"),
        ("[" + '"a",' * 900_000 + '"a"]', "invalid_json"),
        ("[" + "[]," * 1_200_000 + "[]]", "invalid_json"),
        ("[" + '{"a":1},' * 400_000 + "{}]", "invalid_json"),
        ('"' + "[{" * 1_800_000 + '"', "context_length_exceeded"),
        ('"' + '\\"[' * 900_000 + '"', "context_length_exceeded"),
    ],
    ids=["text", "ids", "texts", "lists", "objects", "brackets", "quotes"],
)
def test_a_heavy_body_is_refused_for_what_it_is(
    model: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompt: str,
    code: str,
) -> None:
    def tokenize(self: object, texts: list[str]) -> list[list[int]]:
        raise AssertionError("a text that cannot fit is not tokenized")

    content = f'{{"model": "tiny", "prompt": {prompt}}}'
    headers = {"content-type": "application/json"}
    service = tiny_service(tmp_path, model, ServiceLimits(context_length=512))
    monkeypatch.setattr(type(service.model.tokenizer), "encode_batch", tokenize)
    with serving(service) as served:
        answer = httpx.post(
            served.url + COMPLETIONS,
            content=content,
            headers=headers,
            timeout=60,
            verify=False,
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_of_a_long_text_only_the_beginning_is_tokenized(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = served.service
    lengths: list[int] = []
    encode = type(service.model.tokenizer).encode_batch

    def count(self: Any, texts: list[str]) -> list[list[int]]:
        lengths.extend(map(len, texts))
        return encode(self, texts)

    monkeypatch.setattr(type(service.model.tokenizer), "encode_batch", count)
    context_length = service.limits.context_length
    text = "a " * (10 * context_length)
    answer = httpx.post(
        served.url + COMPLETIONS, json={"model": "tiny", "prompt": text}, verify=False
    )
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert lengths == [8 * context_length]
