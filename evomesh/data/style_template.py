"""The built-in chat templates: conversations as ids and targets, without a template file.

``chatml`` and ``llama3`` give the ids that the published templates of these styles give: the
conversation is encoded as one text, so that a merge across the end of a mark is made in training as
by a server. ``internlm`` encodes every fragment apart, as InternEvo's alpaca_tokenizer.py does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evomesh.data.chat_message import (
    ChatMessage,
    mark_targets,
    mask,
    refuse_without_place,
)
from evomesh.data.chat_styles import (
    INTERNEVO_TOKEN_IDS,
    ROLE_MARKS,
    STYLES,
    TOKEN_ALIASES,
    ChatStyle,
)
from evomesh.data.template import Span
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError


@dataclass(frozen=True)
class ChatPart:
    """A part of a rendered conversation.

    Attributes:
        text: its characters; of a special token, the name that the tokenizer gives it.
        is_target: whether its tokens are targets.
        token_id: the special token that the text names; None for plain text.
    """

    text: str
    is_target: bool
    token_id: int | None = None


class StyleTemplate:
    """One of ``STYLES`` with the ids of a tokenizer.

    Raises:
        UserError: the tokenizer lacks a special token of the style.
    """

    def __init__(self, style: ChatStyle, name: str, tokenizer: Tokenizer) -> None:
        self.style = style
        self.tokenizer = tokenizer
        self.special_ids: dict[str, int] = {}
        for token in style.special:
            token_id = _find_special_id(token, tokenizer)
            if token_id is None:
                token_names = " or ".join((token, *TOKEN_ALIASES.get(token, ())))
                others = "|".join(sorted(set(STYLES) - {name}))
                raise UserError(
                    f"the tokenizer has no token {token_names}, which the chat template {name!r} needs",
                    where=str(tokenizer.path),
                    fix=f"use another template: --chat-template {others}|tokenizer",
                    code="EVO-TOKEN-005",
                )
            self.special_ids[token] = token_id

    def encode(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None = None
    ) -> list[int]:
        self._check_plain(messages, tools)
        return self._encode_parts(self._render(messages)) + self.ending

    def left_out(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None = None
    ) -> list[str]:
        return []  # refused by ``encode``

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        self._check_plain(messages, None)
        parts = list(self._render(messages))
        for fragment in self.style.turns["assistant"].opening:
            parts.append(self._fragment(fragment, is_target=False))
        # Without targets no token is mapped to characters, which is slow for a long text.
        without_targets = [replace(part, is_target=False) for part in parts]
        return [-token for token in self._encode_parts(without_targets)]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        closing = self.style.turns["assistant"].closing
        return tuple(
            self.special_ids[token] for token in closing if token in self.special_ids
        )

    @property
    def ending(self) -> list[int]:
        if self.style.eos and self.tokenizer.eos_id is not None:
            return [self.tokenizer.eos_id]
        return []

    def _check_plain(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None
    ) -> None:
        refuse_without_place(
            messages,
            tools,
            roles=self.style.turns,
            template="the built-in chat template",
            fix="use a tokenizer whose own template has one (--chat-template tokenizer), or remove it from the data",
        )

    def _render(self, messages: Sequence[ChatMessage]) -> Iterator[ChatPart]:
        """Yield the parts of a conversation: bos, then those of each message."""
        tokenizer = self.tokenizer
        bos_id = tokenizer.bos_id
        # SmolLM2's tokenizer names the opening mark itself as bos: it is not doubled.
        is_a_mark = bos_id in self.special_ids.values()
        if bos_id is not None and not is_a_mark:
            bos = tokenizer.token_name(bos_id)
            yield ChatPart(bos, is_target=True, token_id=bos_id)
        for message in messages:
            parts = self._render_message(message)
            yield from parts

    def _render_message(self, message: ChatMessage) -> Iterator[ChatPart]:
        """Yield the parts of a message; only its text and what closes it can be targets."""
        # In chatml: <|im_start|>, "assistant\n", the text, <|im_end|> and "\n". A model
        # writes the third and the fourth.
        style = self.style
        turn = style.turns[message.role]
        text = message.text
        if style.strips:
            text = text.strip()
        is_trained = message.train
        for fragment in turn.opening:
            yield self._fragment(fragment, is_target=False)
        yield ChatPart(text, is_trained)
        for fragment in turn.closing:
            yield self._fragment(fragment, is_target=is_trained)
        for fragment in style.separator:
            yield self._fragment(fragment, is_target=False)

    def _fragment(self, fragment: str, *, is_target: bool) -> ChatPart:
        token_id = self.special_ids.get(fragment)
        if token_id is None:
            return ChatPart(fragment, is_target)
        return ChatPart(self.tokenizer.token_name(token_id), is_target, token_id)

    def _encode_parts(self, parts: Iterable[ChatPart]) -> list[int]:
        """Return the ids of a conversation that is encoded as one text.

        A special token that the tokenizer does not recognize in text, such as a control
        symbol of a bare sentencepiece model, is inserted by its id and ends the text
        before it.
        """
        ids: list[int] = []
        text_parts: list[ChatPart] = []
        for part in parts:
            token_id = part.token_id
            if token_id is None or self.tokenizer.is_added(token_id):
                text_parts.append(part)
                continue
            ids += self._encode_as_one(text_parts)
            ids.append(token_id if part.is_target else -token_id)
            text_parts = []
        return ids + self._encode_as_one(text_parts)

    def _encode_as_one(self, parts: Sequence[ChatPart]) -> list[int]:
        """Return the ids of the parts' joined text, of which the targets are positive."""
        targets: list[Span] = []
        start = 0
        for part in parts:
            end = start + len(part.text)
            if part.is_target:
                targets.append((start, end))
            start = end
        text = "".join(part.text for part in parts)
        if not targets:
            return mask(self.tokenizer.encode(text))
        return mark_targets(self.tokenizer.encode_with_spans(text), targets)


class InternlmTemplate(StyleTemplate):
    """The style ``internlm``, whose fragments are encoded apart, as by alpaca_tokenizer.py."""

    def encode(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None = None
    ) -> list[int]:
        self._check_plain(messages, tools)
        return self._encode_turns(messages) + self.ending

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        self._check_plain(messages, None)
        opening = "".join(self.style.turns["assistant"].opening)
        ids = self._encode_turns(messages) + self._encode_marked(opening)
        return [abs(token) for token in ids]

    def _encode_turns(self, messages: Sequence[ChatMessage]) -> list[int]:
        ids = []
        bos_id = self.tokenizer.bos_id
        if bos_id is not None:
            ids.append(bos_id)
        for message in messages:
            turn = self.style.turns[message.role]
            opening = "".join(turn.opening)
            rest = self._encode_fragments(turn.closing)
            if message.role == "user":
                # alpaca_tokenizer.py encodes the user's role mark and text as one
                # string, and those of other roles apart.
                ids += self._encode_marked(opening, message.text, message.train)
            else:
                ids += self._encode_marked(opening)
                rest = self.tokenizer.encode(message.text) + rest
            if not message.train:
                rest = mask(rest)
            ids += rest
        return ids

    def _encode_fragments(self, fragments: Iterable[str]) -> list[int]:
        ids: list[int] = []
        for fragment in fragments:
            if fragment in self.special_ids:
                ids.append(self.special_ids[fragment])
            else:
                ids += self.tokenizer.encode(fragment)
        return ids

    def _encode_marked(
        self, opening: str, text: str = "", is_target: bool = False
    ) -> list[int]:
        """Return the ids of a masked opening and a text as one string.

        Sentencepiece does not recognize control symbols in text: a role mark that is
        one of them is inserted by its id.
        """
        ids: list[int] = []
        for mark in ROLE_MARKS:
            mark_id = self.tokenizer.token_id(mark)
            if mark_id is None or not opening.startswith(mark):
                continue
            if not self.tokenizer.is_added(mark_id):
                ids.append(-mark_id)
                opening = opening.removeprefix(mark)
        whole = opening + text
        encoded = self.tokenizer.encode_with_spans(whole)
        targets: list[Span] = []
        if is_target:
            targets.append((len(opening), len(whole)))
        return ids + mark_targets(encoded, targets)


def _find_special_id(token: str, tokenizer: Tokenizer) -> int | None:
    for name in (token, *TOKEN_ALIASES.get(token, ())):
        token_id = tokenizer.token_id(name)
        if token_id is not None:
            return token_id
    return INTERNEVO_TOKEN_IDS.get(tokenizer.vocab_size, {}).get(token)
