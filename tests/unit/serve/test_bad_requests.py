"""Every bad request gets a 4xx in the API's form, with a code; none breaks the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from evomesh.models.language_model import LanguageModel
from evomesh.serve.requests import ApiError
from evomesh.serve.schema import ChatRequest, parse_request
from evomesh.serve.service import ServiceLimits
from tests.support.serving import Served, serving, tiny_service

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD = {"model": "tiny", "prompt": "abc", "max_tokens": 2}
JSON = {"content-type": "application/json"}
TALK = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 2,
}


def refused(answer: httpx.Response, status: int, code: str, part: str = "") -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert part in error["message"], error
    assert error["type"] in (
        "invalid_request_error",
        "authentication_error",
        "rate_limit_error",
    )


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("tools", [{"type": "function"}], "[]"),
        ("functions", [{"name": "f"}], "[]"),
        ("tool_choice", "required", '"none" or "auto"'),
        ("tool_choice", {"type": "function"}, '"none" or "auto"'),
        ("function_call", {"name": "f"}, '"none" or "auto"'),
        ("logit_bias", {"5": 1}, "{}"),
        ("presence_penalty", 0.5, "0"),
        ("frequency_penalty", "x", "0"),
        ("response_format", {"type": "json_object"}, '{"type": "text"}'),
        ("modalities", ["text", "audio"], '["text"]'),
        ("modalities", ["text", "text"], '["text"]'),
    ],
    ids=str,
)
def test_what_is_not_supported_is_called_so(
    key: str, value: Any, accepted: str
) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(ChatRequest, json.dumps({**TALK, key: value}).encode())
    assert str(caught.value) == (
        f"{key}: not supported by this server; leave it out, or set it to {accepted}"
    )
    options = accepted.split(" or ")
    for option in map(json.loads, options):
        parse_request(ChatRequest, json.dumps({**TALK, key: option}).encode())


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("messages", [3], "messages.0: expected an object"),
        ("stream_options", 3, "stream_options: expected an object"),
        ("messages", [], "messages: List should have at least 1 item, not 0"),
        ("temperature", "hot", "temperature: it should be a valid number"),
    ],
    ids=str,
)
def test_a_message_names_no_classes_of_the_server(
    key: str, value: Any, words: str
) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(ChatRequest, json.dumps({**TALK, key: value}).encode())
    assert str(caught.value) == words


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{'model': 'tiny'}",
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": Infinity}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "\xff"}',
        b"[" * 5000 + b"]" * 5000,
        b"[1]",
        b'"text"',
        b"null",
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_is_not_a_json_object(
    client: httpx.Client, path: str, body: bytes
) -> None:
    refused(
        client.post(path, content=body, headers={"content-type": "application/json"}),
        400,
        "invalid_json",
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt", 5),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 5]),
        ("prompt", [1.5]),
        ("prompt", [True]),
        ("prompt", {"a": 1}),
        ("model", 5),
        ("max_tokens", "5"),
        ("max_tokens", 1.5),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", True),
        ("max_tokens", 10**30),
        ("temperature", "hot"),
        ("temperature", -0.1),
        ("temperature", 1e300),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 2**63),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("n", 0),
        ("n", 10**9),
        ("best_of", 2),
        ("seed", "x"),
        ("seed", 10**40),
        ("seed", 2**63),
        ("stop", 5),
        ("stop", ["a"] * 5),
        ("stop", [""]),
        ("stop", "x" * 300),
        ("stream", "yes"),
        ("stream_options", {"include_usage": 1}),
        ("logprobs", 21),
        ("logprobs", True),
        ("echo", 1),
        ("echo", "yes"),
        ("stop", ["a", 5]),
        ("stop", [["a"]]),
        ("logit_bias", {"5": 1}),
        ("suffix", "x"),
        ("presence_penalty", 0.5),
        ("rotary_type", "linear"),
        ("metadata", "x"),
    ],
)
def test_wrong_values_are_named(client: httpx.Client, key: str, value: Any) -> None:
    content = json.dumps(GOOD | {key: value})
    refused(
        client.post(COMPLETIONS, content=content, headers=JSON),
        400,
        "invalid_value",
        key,
    )


def test_a_number_too_large_for_a_float(client: httpx.Client) -> None:
    body = b'{"model": "tiny", "prompt": "a", "temperature": 1e999}'
    answer = client.post(COMPLETIONS, content=body, headers=JSON)
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    ("change", "code", "part"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hi"}, "invalid_value", "messages"),
        ({"messages": [5]}, "invalid_value", "messages.0"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "invalid_value",
            "messages.0.role",
        ),
        ({"messages": [{"role": "user"}]}, "missing_parameter", "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "invalid_value",
            "messages.0.content",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {}}],
                    }
                ]
            },
            "invalid_value",
            "messages.0.content",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "a", "detail": 1}],
                    }
                ]
            },
            "invalid_value",
            "part 0 has 'detail'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "invalid_value",
            "part 0 has no text",
        ),
        ({"messages": [5] * 9000}, "invalid_value", "messages.0"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"modalities": ["audio"]}, "invalid_value", "modalities"),
        (
            {"stop": list("abcde")},
            "invalid_value",
            "5 stop strings; at most 4 are allowed",
        ),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"logprobs": 3}, "invalid_value", "logprobs"),
        ({"tools": [{"type": "function"}]}, "invalid_value", "tools"),
        (
            {"response_format": {"type": "json_object"}},
            "invalid_value",
            "response_format",
        ),
        ({"max_completion_tokens": -1}, "invalid_value", "max_completion_tokens"),
    ],
)
def test_wrong_chats_are_named(
    client: httpx.Client, change: dict[str, Any], code: str, part: str
) -> None:
    refused(client.post(CHAT, json=TALK | change), 400, code, part)


def test_missing_unknown_and_null(client: httpx.Client) -> None:
    refused(
        client.post(COMPLETIONS, json={"model": "tiny"}),
        400,
        "missing_parameter",
        "prompt",
    )
    refused(
        client.post(COMPLETIONS, json={"prompt": "a"}),
        400,
        "missing_parameter",
        "model",
    )
    refused(
        client.post(COMPLETIONS, json=GOOD | {"max_token": 5}),
        400,
        "unknown_parameter",
        "max_token",
    )
    assert (
        client.post(
            COMPLETIONS, json=GOOD | {"temperature": None, "stop": None}
        ).status_code
        == 200
    )


@pytest.mark.parametrize("name", ["", "gpt-4", "../tiny", "x" * 5000])
def test_unknown_model(client: httpx.Client, name: str) -> None:
    refused(
        client.post(COMPLETIONS, json=GOOD | {"model": name}),
        404,
        "model_not_found",
        "tiny",
    )
    refused(client.post(CHAT, json=TALK | {"model": name}), 404, "model_not_found")
    assert client.get("/v1/models/gpt-4").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"prompt": "a" * 512}, "context_length_exceeded"),
        ({"prompt": "a" * 10_000}, "context_length_exceeded"),
        ({"prompt": "a", "max_tokens": 512}, "context_length_exceeded"),
        ({"prompt": ["a", "b" * 600]}, "context_length_exceeded"),
        ({"prompt": [1] * 600}, "context_length_exceeded"),
        ({"prompt": ""}, "invalid_value"),
        ({"prompt": [256]}, "invalid_value"),
        ({"prompt": [-1]}, "invalid_value"),
        ({"prompt": [2**62]}, "invalid_value"),
        ({"prompt": ["a"] * 9}, "invalid_value"),
        ({"n": 9}, "invalid_value"),
    ],
)
def test_prompts_that_do_not_fit(
    client: httpx.Client, change: dict[str, Any], code: str
) -> None:
    refused(client.post(COMPLETIONS, json=GOOD | change), 400, code)


def test_bodies_too_large_or_of_another_type(
    client: httpx.Client, served: Served
) -> None:
    limit = served.service.limits.body_bytes
    refused(
        client.post(COMPLETIONS, json=GOOD | {"prompt": "a" * limit}),
        413,
        "body_too_large",
    )
    # Sent in chunks, without a length.
    parts = (b" " * 1000 for _ in range(limit // 1000 + 2))
    refused(
        client.post(COMPLETIONS, content=parts, headers=JSON), 413, "body_too_large"
    )
    plain = client.post(
        COMPLETIONS, content=json.dumps(GOOD), headers={"content-type": "text/plain"}
    )
    refused(plain, 415, "unsupported_media_type")


def test_unknown_paths_methods_and_hosts(client: httpx.Client) -> None:
    refused(client.get("/v1/nothing"), 404, "not_found")
    refused(client.get(COMPLETIONS), 405, "method_not_allowed")
    refused(
        client.get("/v1/models", headers={"host": "evil.example"}), 400, "wrong_host"
    )
    refused(client.get("/healthz", headers={"host": ""}), 400, "wrong_host")
    for host in ("localhost", "127.0.0.1:80", "[::1]", "[::1]:80", "LOCALHOST:1"):
        assert client.get("/healthz", headers={"host": host}).status_code == 200


def test_the_server_goes_on_after_all_of_it(
    client: httpx.Client, served: Served
) -> None:
    assert served.idle()
    assert client.post(COMPLETIONS, json=GOOD).status_code == 200
    assert " 500" not in client.get("/metrics").text.replace('status="500"', " 500")


def test_keys(model: LanguageModel, tmp_path: Path) -> None:
    with serving(
        tiny_service(tmp_path, model, ServiceLimits(64)), key="s3cret"
    ) as served:
        for path in ("/v1/models", "/v1/models/tiny", "/metrics"):
            refused(
                httpx.get(served.url + path, verify=False),
                401,
                "invalid_api_key",
                "no key",
            )
        for value in (
            "Bearer wrong",
            "Bearer s3cre",
            "Bearer s3crett",
            "Basic s3cret",
            "s3cret",
            "Bearer é",
        ):
            headers = {"authorization": value.encode()}
            refused(
                httpx.post(
                    served.url + COMPLETIONS, json=GOOD, headers=headers, verify=False
                ),
                401,
                "invalid_api_key",
            )
            refused(
                httpx.post(
                    served.url + CHAT, content=b"{", headers=headers, verify=False
                ),
                401,
                "invalid_api_key",
            )
        good = {"authorization": "Bearer s3cret"}
        assert (
            httpx.post(
                served.url + COMPLETIONS, json=GOOD, headers=good, verify=False
            ).status_code
            == 200
        )
        assert httpx.get(served.url + "/healthz", verify=False).status_code == 200


def test_a_model_without_chat_template_says_so(
    model: LanguageModel, tmp_path: Path
) -> None:
    with serving(
        tiny_service(tmp_path, model, ServiceLimits(64), template="")
    ) as served:
        refused(
            httpx.post(served.url + CHAT, json=TALK, verify=False),
            400,
            "invalid_value",
            "no chat template",
        )


def test_a_template_that_refuses(model: LanguageModel, tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') if messages | length > 1 else messages[0].nothing.x }}"
    with serving(
        tiny_service(tmp_path, model, ServiceLimits(64), template=template)
    ) as served:
        refused(
            httpx.post(served.url + CHAT, json=TALK, verify=False),
            400,
            "invalid_value",
            "rejects the conversation",
        )
        twice = TALK | {"messages": [{"role": "user", "content": "hi"}] * 2}
        refused(
            httpx.post(served.url + CHAT, json=twice, verify=False),
            400,
            "invalid_value",
            "roles must alternate",
        )
