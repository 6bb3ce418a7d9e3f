"""Bodies that would take long to parse are refused before they are parsed; what texts contain does not count."""

from __future__ import annotations

import dataclasses
import json
import random
import threading
from typing import Any

import httpx
import pytest

from evomesh.serve import page_security, requests
from evomesh.serve.page_security import parse_call
from evomesh.serve.requests import (
    MAX_CONTAINERS,
    MAX_KEYS,
    MAX_OBJECT_KEYS,
    MAX_VALUES,
    ApiError,
    MarkCounts,
    check_structure,
)
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


def read_marks(body: bytes) -> tuple[int, int, int]:
    """Count lists and objects, keys and commas by reading a JSON text byte by byte."""
    found = dict.fromkeys('[{:,"', 0)
    is_inside = is_escaped = False
    for symbol in body.decode("latin-1"):
        if is_escaped or (is_inside and symbol != '"'):
            is_escaped = not is_escaped and symbol == "\\"
            continue
        if symbol == '"':
            is_inside = not is_inside
        elif symbol in found:
            found[symbol] += 1
    return found["["] + found["{"], found[":"], found[","]


def random_value(source: random.Random, depth: int = 0) -> Any:
    kind = source.random()
    if kind < 0.5 or depth > 3:
        return "".join(
            source.choice('"\\[]{},:a\n') for _ in range(source.randrange(8))
        )
    count = source.randrange(4)
    if kind < 0.75:
        return [random_value(source, depth + 1) for _ in range(count)]
    names = [random_value(source, depth=9) for _ in range(count)]
    return {name: random_value(source, depth + 1) for name in names}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 4096])
def test_marks_are_counted_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    counted: list[tuple[int, ...]] = []

    def note(counts: MarkCounts) -> None:
        counted.append(dataclasses.astuple(counts))

    monkeypatch.setattr(requests, "SCAN_BYTES", size)
    monkeypatch.setattr(requests, "_check_counts", note)
    source = random.Random(size)
    for _ in range(200):
        body = json.dumps(random_value(source)).encode()
        check_structure(body)
        assert counted[-1] == read_marks(body), body


def test_no_call_of_the_scan_takes_more_than_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each call of numpy or of a regular expression may keep other threads waiting until it ends."""
    sizes: list[int] = []
    inside = requests.StringScanner.inside

    def note(self: requests.StringScanner, block: Any) -> Any:
        sizes.append(block.size)
        return inside(self, block)

    monkeypatch.setattr(requests.StringScanner, "inside", note)
    body = completion("a b, " * 700_000)
    check_structure(body)
    assert sum(sizes) == len(body)
    assert max(sizes) == requests.SCAN_BYTES == 2**17


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({f"key{number}": 1 for number in range(MAX_OBJECT_KEYS)}, "an object has 66"),
        ({"metadata": {str(number): 1 for number in range(65)}}, "an object has 65"),
        ({"metadata": {"a": [{str(n): 1 for n in range(70)}]}}, "an object has 70"),
        ({"stream_options": {str(n): 1 for n in range(999)}}, "an object has 999"),
        ({"metadata": {str(n): 1 for n in range(MAX_KEYS)}}, f"{MAX_KEYS} keys"),
    ],
)
def test_objects_of_very_many_keys_are_refused(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], part: str
) -> None:
    def validate(value: Any) -> None:
        raise AssertionError("pydantic would list all of the keys")

    monkeypatch.setattr(CompletionRequest, "model_validate", validate)
    body = json.dumps({"model": "tiny", "prompt": "a"} | change).encode()
    with pytest.raises(ApiError, match=part):
        parse_request(CompletionRequest, body)


def test_an_error_repeats_only_the_beginning_of_what_was_sent() -> None:
    body = json.dumps({"model": "tiny", "prompt": "a", "k" * 100_000: 1}).encode()
    with pytest.raises(ApiError) as caught:
        parse_request(CompletionRequest, body)
    error = caught.value.body()["error"]
    assert error["code"] == "unknown_parameter"
    assert error["message"].startswith("kkk")
    assert len(error["message"]) == 1000
    assert len(error["param"]) == 100


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
    assert (
        httpx.post(
            page_server.url + path, json={}, timeout=60, verify=False
        ).status_code
        == 400
    )
    assert [name.partition("_")[0] for name in names] == ["parser"]
