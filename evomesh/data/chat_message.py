"""Messages of a conversation, what every chat template does with them, and how targets are marked.

Masked tokens are stored as negative ids: input, but not targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from evomesh.data.template import Span
from evomesh.data.tokenizer import EncodedText
from evomesh.errors import UserError


@dataclass(frozen=True)
class ChatMessage:
    """A message of a conversation.

    Attributes:
        role: one of ``ROLES``; "tool" and others for templates of tokenizer folders that have them.
        text: its content.
        train: whether its text is a target.
        extra: further keys that the template of a tokenizer folder may read: name, tool_calls, reasoning_content.
    """

    role: str
    text: str
    train: bool
    extra: Mapping[str, Any] = field(default_factory=dict)


def refuse_without_place(
    messages: Sequence[ChatMessage],
    tools: Sequence[Any] | None,
    *,
    roles: Iterable[str],
    template: str,
    fix: str,
) -> None:
    """Refuse a conversation that has more than text of ``roles``, of which a template alone consists.

    Raises:
        UserError: it has another role, tools, or a message with further keys.
    """
    other_roles = {message.role for message in messages}.difference(roles)
    keys = {key for message in messages for key in message.extra}
    lacking = [f"the role {role!r}" for role in sorted(other_roles)]
    lacking += [f"the key {key!r} of a message" for key in sorted(keys)]
    lacking += ["tools"] if tools else []
    if lacking:
        raise UserError(
            f"{template} has no place for {', '.join(lacking)}",
            fix=fix,
            code="EVO-TOKEN-009",
        )


class ChatTemplate(Protocol):
    """A rule that renders conversations as token ids."""

    def encode(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Return the ids of a conversation; those of tokens that are not targets are negative.

        Args:
            tools: JSON schemas of the functions that the assistant may call.
        """
        ...

    def left_out(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None = None
    ) -> list[str]:
        """Return the names of what ``encode`` leaves out of messages that say more, such as reasoning.

        Raises:
            UserError: it leaves out what a message cannot do without.
        """
        ...

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the ids of a conversation up to where the assistant's answer starts; all are positive."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Return the ids that end a generated answer."""
        ...

    @property
    def ending(self) -> list[int]:
        """Return the ids that every conversation ends with, even a truncated one."""
        ...


def mask(ids: Iterable[int]) -> list[int]:
    """Return ids as inputs that are not targets."""
    return [-token for token in ids]


def mark_targets(encoded: EncodedText, targets: Iterable[Span]) -> list[int]:
    """Return the ids of a text, negative where no span of ``targets`` has a part of the token."""
    is_target = [False] * len(encoded.ids)
    for span in targets:
        if span[0] == span[1]:
            continue
        for position in _covered(encoded, span):
            is_target[position] = True
    return [
        token if target else -token
        for token, target in zip(encoded.ids, is_target, strict=True)
    ]


def _covered(encoded: EncodedText, span: Span) -> list[int]:
    """Return the positions of the tokens of a span of characters.

    The bytes of one character may be tokens of which only the last stands for it.
    """
    first, last = span
    # The bytes before the last one have an empty span at the start of their character.
    return [
        position
        for position, (start, end) in enumerate(encoded.spans)
        if start < last and (end > first or start == end >= first)
    ]
