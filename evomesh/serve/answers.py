"""Answers in the format of OpenAI's API: whole responses, and the events of a stream."""

from __future__ import annotations

import math
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import orjson

from evomesh.serve.detokenizer import ScoredToken, TextDelta, TopToken

LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI's API writes this


@dataclass
class AnswerChoice:
    """One of the answers to a request, as far as it has been generated."""

    text: str = ""
    scored: list[ScoredToken] = field(default_factory=list)
    tokens: int = 0
    finish: str | None = None

    def add(self, delta: TextDelta) -> None:
        """Append the next delta."""
        self.text += delta.text
        self.scored += delta.scored
        self.tokens = delta.tokens
        self.finish = delta.finish or None


class ApiAnswer:
    """The response to one request of either kind.

    Args:
        chat: a chat completion, else a completion.
        with_logprobs: the client requested log-probabilities.
    """

    def __init__(
        self,
        *,
        chat: bool,
        model: str,
        fingerprint: str,
        prompt_tokens: int,
        choices: int,
        with_logprobs: bool,
    ) -> None:
        self.chat = chat
        self.with_logprobs = with_logprobs
        self.prompt_tokens = prompt_tokens
        self.choices = [AnswerChoice() for _ in range(choices)]
        self._header = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    @property
    def usage(self) -> dict[str, int]:
        """Count the tokens of prompts and answers."""
        completion_tokens = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    def response(self) -> dict[str, Any]:
        """Return the whole response, for a client that does not stream."""
        choices = []
        for index, choice in enumerate(self.choices):
            content: dict[str, Any] = {"text": choice.text}
            if self.chat:
                message = {
                    "role": "assistant",
                    "content": choice.text,
                    "refusal": None,
                }
                content = {"message": message}
            record = self._choice_record(index, content, choice.scored, choice.finish)
            choices.append(record)
        return {
            **self._header,
            "object": "chat.completion" if self.chat else "text_completion",
            "choices": choices,
            "usage": self.usage,
        }

    def opening_event(self, index: int) -> dict[str, Any]:
        """Return the first event of a choice in a chat, which names the role."""
        content = {"delta": {"role": "assistant", "content": ""}}
        return self._event([self._choice_record(index, content, [], None)])

    def delta_event(
        self,
        index: int,
        delta: TextDelta,
    ) -> dict[str, Any]:
        """Return the event that adds a text delta to a choice."""
        content: dict[str, Any] = {"text": delta.text}
        if self.chat:
            message = {"content": delta.text} if delta.text else {}
            content = {"delta": message}
        finish = self.choices[index].finish
        choice = self._choice_record(index, content, delta.scored, finish)
        return self._event([choice])

    def usage_event(self) -> dict[str, Any]:
        """Return the last event, with the usage."""
        return self._event([]) | {"usage": self.usage}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._header, "object": kind, "choices": choices}

    def _choice_record(
        self,
        index: int,
        content: dict[str, Any],
        scored: list[ScoredToken],
        finish: str | None,
    ) -> dict[str, Any]:
        logprobs = None
        if self.with_logprobs and self.chat:
            logprobs = _chat_logprobs(scored)
        elif self.with_logprobs and scored:
            logprobs = _completion_logprobs(scored)
        return {
            "index": index,
            **content,
            "logprobs": logprobs,
            "finish_reason": finish,
        }


def _chat_logprobs(scored: list[ScoredToken]) -> dict[str, Any]:
    content: list[orjson.Fragment] = []
    for token in scored:
        record = _token_record(token)
        record["top_logprobs"] = [_token_record(top) for top in token.top]
        content.append(_encoded(record))
    return {"content": content, "refusal": None}


def _token_record(token: ScoredToken | TopToken) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": _finite(token.logprob),
        "bytes": list(token.content),
    }


def _completion_logprobs(scored: list[ScoredToken]) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in scored],
        "token_logprobs": [_finite(token.logprob) for token in scored],
        "top_logprobs": [_encoded(_top_by_text(token)) for token in scored],
        "text_offset": [token.offset for token in scored],
    }


def _encoded(value: dict[str, Any] | None) -> orjson.Fragment:
    """Return a part of a response as JSON already.

    The library keeps all other threads waiting while it encodes. Token by token they
    get their turns; a million log-probabilities at once would take a second.
    """
    return orjson.Fragment(orjson.dumps(value))


def _top_by_text(token: ScoredToken) -> dict[str, float | None] | None:
    """Return the most probable tokens by their text, or None for the first token of a prompt.

    Two tokens may share a text. The most probable of them, which comes first, is
    reported: in reverse order it is the last to be written.
    """
    if token.logprob is None:
        return None
    return {top.text: _finite(top.logprob) for top in reversed(token.top)}


def _finite(logprob: float | None) -> float | None:
    if logprob is None or math.isfinite(logprob):
        return logprob
    return LOWEST_LOGPROB
