"""Answers in the form that OpenAI's clients read: whole ones, and the events of a stream."""

from __future__ import annotations

import math
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from evomesh.serve.writer import ScoredToken, TextDelta

LOWEST = -9999.0  # JSON has no minus infinity; OpenAI writes this


@dataclass
class AnswerChoice:
    """One answer while it grows."""

    text: str = ""
    scored: list[ScoredToken] = field(default_factory=list)
    tokens: int = 0
    finish: str | None = None

    def add(self, piece: TextDelta) -> None:
        self.text += piece.text
        self.scored += piece.scored
        self.tokens = piece.tokens
        self.finish = piece.finish or None


class ApiAnswer:
    """The reply to one request, for both kinds of requests.

    Args:
        chat: a chat completion, else a completion.
        scored: log-probabilities are wanted.
    """

    def __init__(
        self, *, chat: bool, model: str, fingerprint: str, prompt_tokens: int, choices: int, scored: bool
    ):
        self.chat, self.scored, self.prompt_tokens = chat, scored, prompt_tokens
        self.choices = [AnswerChoice() for _ in range(choices)]
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    @property
    def usage(self) -> dict[str, int]:
        made = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    def whole(self) -> dict[str, Any]:
        """The answer at once."""
        choices = []
        for index, choice in enumerate(self.choices):
            text = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            choices.append(
                self._choice(index, text if self.chat else {"text": choice.text}, choice.scored, choice)
            )
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage}

    def opening(self, index: int) -> dict[str, Any]:
        """The first event of a chat's choice: who speaks."""
        return self._event(
            [self._choice(index, {"delta": {"role": "assistant", "content": ""}}, [], AnswerChoice())]
        )

    def event(self, index: int, piece: TextDelta) -> dict[str, Any]:
        """What one piece adds to a choice."""
        delta = {"content": piece.text} if piece.text else {}
        text = {"delta": delta} if self.chat else {"text": piece.text}
        return self._event([self._choice(index, text, piece.scored, self.choices[index])])

    def closing(self) -> dict[str, Any]:
        """The event with the usage."""
        return self._event([]) | {"usage": self.usage}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self.head,
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "choices": choices,
        }

    def _choice(
        self, index: int, text: dict[str, Any], scored: list[ScoredToken], choice: AnswerChoice
    ) -> dict[str, Any]:
        logprobs = None
        if self.scored and (self.chat or scored):
            logprobs = _chat_logprobs(scored) if self.chat else _logprobs(scored)
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": choice.finish}


def _chat_logprobs(scored: list[ScoredToken]) -> dict[str, Any]:
    content = [
        _named(one.text, one.logprob) | {"top_logprobs": [_named(*other) for other in one.top]}
        for one in scored
    ]
    return {"content": content, "refusal": None}


def _named(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _logprobs(scored: list[ScoredToken]) -> dict[str, Any]:
    return {
        "tokens": [one.text for one in scored],
        "token_logprobs": [_finite(one.logprob) for one in scored],
        # Tokens that are parts of a character share a text: the likeliest of them is told, which comes first.
        "top_logprobs": [{text: _finite(logprob) for text, logprob in reversed(one.top)} for one in scored],
        "text_offset": [one.offset for one in scored],
    }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST
