"""Answers against decoding without cache and server, and the engine's slots while clients come and go."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.language_model import LanguageModel, with_rotary_type
from evomesh.serve import app
from evomesh.serve.service import ServiceLimits
from tests.support.serving import TRAINED, Served, serving, tiny_service

pytestmark = pytest.mark.slow

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY = {"model": "tiny", "prompt": "abc", "max_tokens": 20, "temperature": 0}


@pytest.fixture
def long(model: LanguageModel, tmp_path: Path) -> Iterator[Served]:
    """Room for answers that take seconds, but one at a time and one waiting."""
    with serving(
        tiny_service(
            tmp_path, model, ServiceLimits(context_length=8192, slots=1, queue=1)
        )
    ) as served:
        yield served


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def events(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> list[dict[str, Any]]:
    with client.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def expected(
    model: LanguageModel, prompt: list[int], count: int
) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, each from the whole text anew."""
    ids, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            row = model.logits(
                model(torch.tensor(ids), single_sequence(len(ids)))[-1:]
            )[0].log_softmax(-1)
            ids.append(int(row.argmax()))
            logprobs.append(float(row.max()))
    return ids[len(prompt) :], logprobs


def test_greedy_text_logprobs_and_usage(
    client: httpx.Client, served: Served, model: LanguageModel
) -> None:
    tokenizer = served.service.model.tokenizer
    ids, logprobs = expected(model, tokenizer.encode("abc"), 20)
    found = post(client, COMPLETIONS, GREEDY | {"logprobs": 2})
    (choice,) = found["choices"]
    assert choice["text"] == tokenizer.decode(ids)
    assert choice["finish_reason"] == "length"
    assert found["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 20,
        "total_tokens": 23,
    }
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-9)
    assert all(
        max(top.values()) == own
        for top, own in zip(
            choice["logprobs"]["top_logprobs"],
            choice["logprobs"]["token_logprobs"],
            strict=True,
        )
    )
    assert (
        post(client, COMPLETIONS, GREEDY | {"prompt": tokenizer.encode("abc")})[
            "choices"
        ][0]["text"]
        == choice["text"]
    )


def test_chat_goes_through_the_template(
    client: httpx.Client, served: Served, model: LanguageModel
) -> None:
    tokenizer = served.service.model.tokenizer
    prompt = "[system]be short\n[user]hi there\n[assistant]"
    ids, logprobs = expected(model, tokenizer.encode(prompt), 8)
    parts = [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]
    messages = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": parts},
    ]
    body = {
        "model": "tiny",
        "messages": messages,
        "max_completion_tokens": 8,
        "temperature": 0,
    }
    found = post(client, CHAT, body | {"logprobs": True, "top_logprobs": 1})
    (choice,) = found["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": tokenizer.decode(ids),
        "refusal": None,
    }
    content = choice["logprobs"]["content"]
    assert [one["logprob"] for one in content] == pytest.approx(logprobs, abs=1e-9)
    assert all(one["top_logprobs"][0]["logprob"] == one["logprob"] for one in content)
    assert found["usage"]["prompt_tokens"] == len(prompt)
    streamed = events(client, CHAT, body)
    assert streamed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(one["choices"][0]["delta"].get("content", "") for one in streamed)
    assert text == choice["message"]["content"]
    assert [one["choices"][0]["finish_reason"] for one in streamed][-1] == "length"
    assert "usage" not in streamed[-1]


def test_a_stream_adds_up_to_the_whole(client: httpx.Client) -> None:
    body = GREEDY | {
        "temperature": 1.0,
        "seed": 7,
        "n": 2,
        "prompt": ["abc", "xyz"],
        "logprobs": 1,
    }
    whole_ = post(client, COMPLETIONS, body)
    streamed = events(
        client, COMPLETIONS, body | {"stream_options": {"include_usage": True}}
    )
    assert streamed.pop()["usage"] == whole_["usage"]
    for choice in whole_["choices"]:
        mine = [
            one["choices"][0]
            for one in streamed
            if one["choices"][0]["index"] == choice["index"]
        ]
        assert "".join(one["text"] for one in mine) == choice["text"]
        scored = [
            score
            for one in mine
            if one["logprobs"]
            for score in one["logprobs"]["token_logprobs"]
        ]
        assert scored == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-9)
    assert len(whole_["choices"]) == 4


def test_a_seed_means_the_same_texts(client: httpx.Client) -> None:
    def texts(seed: int | None) -> list[str]:
        found = post(
            client, COMPLETIONS, GREEDY | {"temperature": 1.5, "n": 3, "seed": seed}
        )
        return [choice["text"] for choice in found["choices"]]

    one = texts(1)
    assert one == texts(1)
    assert len({*one, *texts(2), *texts(-2)}) == 9
    assert texts(None) != texts(None)


def test_a_stop_text_ends_the_answer_and_frees_the_slot(
    client: httpx.Client, served: Served
) -> None:
    text = post(client, COMPLETIONS, GREEDY | {"max_tokens": 60})["choices"][0]["text"]
    stop = text[10:13]
    cut = text[: text.index(stop)]
    body = GREEDY | {"max_tokens": 500, "stop": ["never this", stop]}
    found = post(client, COMPLETIONS, body)
    assert (found["choices"][0]["text"], found["choices"][0]["finish_reason"]) == (
        cut,
        "stop",
    )
    assert found["usage"]["completion_tokens"] < 60
    assert (
        "".join(one["choices"][0]["text"] for one in events(client, COMPLETIONS, body))
        == cut
    )
    assert served.idle()


def test_the_rotary_type_is_the_requests(
    client: httpx.Client, served: Served, model: LanguageModel
) -> None:
    prompt = ("The quick brown fox. " * 8)[: TRAINED * 2]
    body = GREEDY | {"prompt": prompt, "max_tokens": 1, "logprobs": 0}
    tokenizer = served.service.model.tokenizer
    found = {}
    for kind in ("origin", "dynamic"):
        rotated = with_rotary_type(model, kind)
        found[kind] = expected(rotated, tokenizer.encode(prompt), 1)[1][0]
        answer = post(client, COMPLETIONS, body | {"rotary_type": kind})
        assert answer["choices"][0]["logprobs"]["token_logprobs"][0] == pytest.approx(
            found[kind], abs=1e-9
        )
    assert abs(found["origin"] - found["dynamic"]) > 1e-3


def test_a_short_request_does_not_wait_for_a_long_one(
    model: LanguageModel, tmp_path: Path
) -> None:
    with serving(
        tiny_service(tmp_path, model, ServiceLimits(context_length=8192, slots=2))
    ) as served:
        body = GREEDY | {"max_tokens": 8000, "stream": True}
        with (
            httpx.Client(base_url=served.url, verify=False) as client,
            client.stream("POST", COMPLETIONS, json=body) as long_one,
        ):
            lines = begin(long_one)
            post(client, COMPLETIONS, GREEDY)
            assert served.service.open_sequences == 1  # the long one still runs
            assert next(lines) == ""
        assert served.idle()


def test_a_client_that_hangs_up_frees_its_slot(long: Served) -> None:
    """The slot is free before the answer is complete, which the count of generated tokens proves at any speed."""
    body = GREEDY | {"max_tokens": 8000}

    def freed(before: int) -> bool:
        return long.idle() and made(long) < before + 8000

    with httpx.Client(base_url=long.url, timeout=30, verify=False) as client:
        before = made(long)
        with client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as answer:
            kept = begin(answer)
            assert long.service.open_sequences == 1
            assert next(kept) == ""
        assert freed(before)
        before = made(long)
        with pytest.raises(httpx.ReadTimeout):
            client.post(COMPLETIONS, json=body, timeout=httpx.Timeout(30, read=0.5))
        assert freed(before)
    with httpx.Client(base_url=long.url, timeout=30, verify=False) as client:
        before = made(long)
        with client.stream("POST", CHAT, json=talk(stream=True)) as answer:
            kept = begin(answer)
            # One that waits for a slot and gives up leaves the queue.
            with pytest.raises(httpx.ReadTimeout):
                client.post(COMPLETIONS, json=body, timeout=httpx.Timeout(30, read=0.3))
            assert reached(long, 1)
            assert next(kept) == ""
        assert freed(before)


def made(served: Served) -> int:
    """Tokens that this server has written so far."""
    text = httpx.get(served.url + "/metrics", timeout=30, verify=False).text
    (found,) = re.findall(r"^evomesh_completion_tokens_total (\S+)", text, re.M)
    return int(float(found))


def reached(served: Served, load: int) -> bool:
    """Return whether the service and its engine thread get to hold this many sequences."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if served.service.open_sequences == served.service.engines.active == load:
            return True
        time.sleep(0.005)
    return False


def begin(answer: httpx.Response) -> Iterator[str]:
    """Reads the first line of a stream. The rest is to be kept: without it, the connection closes."""
    lines = answer.iter_lines()
    assert next(lines).startswith("data: ")
    return lines


def talk(**more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0,
    } | more


def test_a_full_queue_is_a_429(long: Served) -> None:
    with httpx.Client(base_url=long.url, timeout=30, verify=False) as client:
        with client.stream(
            "POST", COMPLETIONS, json=GREEDY | {"max_tokens": 8000, "stream": True}
        ) as running:
            kept = begin(running)
            waiting = threading.Thread(
                target=lambda: httpx.post(
                    long.url + COMPLETIONS, json=GREEDY, timeout=30, verify=False
                )
            )
            waiting.start()
            assert reached(long, 2)
            for stream in (False, True):
                refused = client.post(COMPLETIONS, json=GREEDY | {"stream": stream})
                assert refused.status_code == 429
                assert refused.json()["error"]["code"] == "queue_full"
                assert refused.headers["retry-after"] == "1"
            metrics = client.get("/metrics").text
            assert "evomesh_sequences_running 1.0" in metrics
            assert "evomesh_sequences_waiting 1.0" in metrics
            assert next(kept) == ""
        waiting.join(20)  # its turn has come
        assert not waiting.is_alive()
        assert long.idle(3)


def test_a_broken_engine_is_replaced(
    client: httpx.Client, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evomesh.generate import engine

    def broken(self: engine.GenerationEngine) -> list[engine.GeneratedToken]:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.GenerationEngine, "step", broken)
        answer = client.post(COMPLETIONS, json=GREEDY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (
            503,
            "engine_failed",
        )
    assert served.idle()
    assert len(post(client, COMPLETIONS, GREEDY)["choices"]) == 1
    assert client.get("/healthz").json() == {"status": "ok"}


def test_metrics_count(client: httpx.Client) -> None:
    def values() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        return {
            line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
            for line in lines
            if not line.startswith("#")
        }

    before = values()
    post(client, COMPLETIONS, GREEDY | {"n": 2, "temperature": 1})
    client.post(COMPLETIONS, json={"model": "other", "prompt": "a"})
    after = values()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("evomesh_completion_tokens_total") == 40
    assert grown("evomesh_prompt_tokens_total") == 3
    assert grown('evomesh_requests_total{endpoint="/v1/completions",status="200"}') == 1
    assert grown('evomesh_requests_total{endpoint="/v1/completions",status="404"}') == 1
    assert (
        grown("evomesh_request_seconds_count")
        == grown("evomesh_first_token_seconds_count")
        == 1
    )
    assert after["evomesh_slots"] == 4


def test_the_official_client(served: Served, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(
        base_url=served.url + "/v1", api_key="none", max_retries=0
    ) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "evomesh"
        done = client.completions.create(
            model="tiny", prompt="abc", max_tokens=20, temperature=0, logprobs=1
        )
        assert done.usage.completion_tokens == 20
        assert len(done.choices[0].logprobs.tokens) == 20
        pieces = client.completions.create(
            model="tiny", prompt="abc", max_tokens=20, temperature=0, stream=True
        )
        assert (
            "".join(piece.choices[0].text for piece in pieces) == done.choices[0].text
        )
        messages = [{"role": "user", "content": "hi"}]
        options = dict(
            model="tiny",
            messages=messages,
            max_tokens=9,
            seed=3,
            n=2,
            extra_body={"top_k": 40},
        )
        said = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
        assert [len(choice.logprobs.content) for choice in said.choices] == [9, 9]
        chunks = list(
            client.chat.completions.create(
                **options, stream=True, stream_options={"include_usage": True}
            )
        )
        assert chunks[-1].usage == said.usage
        for choice in said.choices:
            parts = [
                c.choices[0].delta.content or ""
                for c in chunks[:-1]
                if c.choices[0].index == choice.index
            ]
            assert "".join(parts) == choice.message.content
        with pytest.raises(openai.NotFoundError, match="no model"):
            client.completions.create(model="other", prompt="a")
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**(options | {"max_tokens": 5000}))
        assert caught.value.code == "context_length_exceeded"


def prompt_scores(model: LanguageModel, ids: list[int]) -> list[float]:
    """Log-probabilities of all tokens of a prompt but the first."""
    with torch.no_grad():
        logprobs = model.logits(
            model(torch.tensor(ids), single_sequence(len(ids)))
        ).log_softmax(-1)
    return [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_an_echo_scores_the_prompt(
    client: httpx.Client,
    served: Served,
    model: LanguageModel,
    max_tokens: int,
    stream: bool,
) -> None:
    tokenizer = served.service.model.tokenizer
    prompts = ["the prompt, é and 🙂", "another", "x"]
    body = GREEDY | {
        "prompt": prompts,
        "max_tokens": max_tokens,
        "logprobs": 3,
        "echo": True,
    }
    found = {}
    if stream:
        for event in events(client, COMPLETIONS, body):
            (choice,) = event["choices"]
            whole = found.setdefault(choice["index"], {"text": "", "logprobs": {}})
            whole["text"] += choice["text"]
            for key, values in (choice["logprobs"] or {}).items():
                whole["logprobs"].setdefault(key, []).extend(values)
    else:
        answer = post(client, COMPLETIONS, body)
        found = {choice["index"]: choice for choice in answer["choices"]}
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
        assert answer["usage"]["completion_tokens"] == 3 * max_tokens
    for index, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt)
        new_ids, new_logprobs = expected(model, ids, max_tokens)
        scores = found[index]["logprobs"]
        assert found[index]["text"] == prompt + tokenizer.decode(new_ids)
        assert (
            len(scores["tokens"]) == len(scores["text_offset"]) == len(ids) + max_tokens
        )
        assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
        wanted = prompt_scores(model, ids) + new_logprobs
        assert scores["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-9)
        assert all(len(top) == 3 for top in scores["top_logprobs"][1:])
        assert [
            max(top.values()) for top in scores["top_logprobs"][len(ids) :]
        ] == pytest.approx(new_logprobs)


def test_the_scores_of_a_whole_prompt_are_not_encoded_on_the_event_loop(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, int] = {}  # largest event by the kind of thread that encoded it
    encode = app.encode_event

    def note(value: Any) -> bytes:
        kind = threading.current_thread().name.partition("_")[0]
        event = encode(value)
        sizes[kind] = max(len(event), sizes.get(kind, 0))
        return event

    monkeypatch.setattr(app, "encode_event", note)
    body = GREEDY | {"prompt": "ab" * 150, "echo": True, "logprobs": 5}
    (first, *rest) = events(client, COMPLETIONS, body)
    assert len(first["choices"][0]["logprobs"]["tokens"]) == 300
    assert rest
    worker = sizes.pop("asyncio")  # the pool of asyncio.to_thread
    assert worker > 20 * max(sizes.values())


def test_an_echo_without_scores_and_with_stops_is_the_prompt_and_the_answer(
    client: httpx.Client, served: Served, model: LanguageModel
) -> None:
    tokenizer = served.service.model.tokenizer
    text = tokenizer.decode(expected(model, tokenizer.encode("abc"), 20)[0])
    stop = text[5:7]
    body = GREEDY | {"echo": True, "stop": ["b", stop] if "b" not in text else [stop]}
    (choice,) = post(client, COMPLETIONS, body)["choices"]
    assert choice["text"] == "abc" + text[: text.index(stop)]
    assert choice["logprobs"] is None


def test_the_bytes_of_an_answer_are_its_utf8(client: httpx.Client) -> None:
    body = talk(max_tokens=40, logprobs=True, top_logprobs=4)
    (choice,) = post(client, CHAT, body)["choices"]
    content = choice["logprobs"]["content"]
    joined = bytes(byte for token in content for byte in token["bytes"])
    assert joined.decode(errors="replace") == choice["message"]["content"]
    # The tokenizer's tokens are single bytes.
    assert all(len(token["bytes"]) == 1 for token in content)
    assert all(
        len({top["token"] for top in token["top_logprobs"]}) == 4 for token in content
    )


def test_the_second_turn_of_the_official_client(served: Served) -> None:
    openai = pytest.importorskip("openai")
    messages: list[Any] = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": "hi"},
    ]
    with openai.OpenAI(
        base_url=served.url + "/v1", api_key="none", max_retries=0
    ) as client:
        first = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=4
        )
        answer = first.choices[0].message
        next_turn = {
            "role": "user",
            "name": "me",
            "content": [{"type": "text", "text": "and?"}],
        }
        counts = set()
        for own in (
            answer,
            answer.model_dump(),
            answer.to_dict(),
            {"role": "assistant", "content": answer.content},
        ):
            second = client.chat.completions.create(
                model="tiny", messages=[*messages, own, next_turn], max_tokens=4
            )
            counts.add(second.usage.prompt_tokens)
        assert len(counts) == 1


@pytest.mark.parametrize(
    ("extra", "status"),
    [
        (
            dict.fromkeys(
                [
                    "refusal",
                    "function_call",
                    "tool_calls",
                    "audio",
                    "annotations",
                    "unheard_of",
                ]
            ),
            200,
        ),
        ({"tool_calls": [], "annotations": [], "refusal": ""}, 200),
        ({"reasoning_content": "hm", "reasoning": "hm"}, 200),
        ({"name": "someone"}, 200),
        ({"tool_calls": [{"id": "1"}]}, 400),
        ({"function_call": {"name": "f"}}, 400),
        ({"refusal": "no"}, 400),
        ({"audio": {"id": "1"}}, 400),
        ({"unheard_of": 0}, 400),
    ],
)
def test_what_a_message_may_have_beside_its_content(
    client: httpx.Client, extra: dict[str, Any], status: int
) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "a"} | extra,
    ]
    answer = client.post(CHAT, json=talk(messages=messages, max_tokens=1))
    assert answer.status_code == status, answer.text
    if status == 400:
        (key,) = extra
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == (
            "unknown_parameter",
            f"messages.1.{key}",
        )
