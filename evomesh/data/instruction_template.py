"""XTuner's prompt templates without special tokens, as ids and targets.

    bos  system instruction  answer eos  separator  bos  instruction  answer eos

Each of these parts is encoded by itself. The answers and their eos are targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evomesh.data.chat_message import (
    ChatMessage,
    mark_targets,
    mask,
    refuse_without_place,
)
from evomesh.data.instruction_styles import InstructionStyle
from evomesh.data.template import Span
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError


class InstructionTemplate:
    """One of ``INSTRUCTION_STYLES`` with the ids of a tokenizer.

    Raises:
        UserError: the tokenizer has no eos, with which these answers end.
    """

    def __init__(
        self, style: InstructionStyle, name: str, tokenizer: Tokenizer
    ) -> None:
        if tokenizer.eos_id is None:
            raise UserError(
                f"the tokenizer has no end-of-text token, with which answers of the chat template {name!r} end",
                where=str(tokenizer.path),
                fix="use another template: --chat-template tokenizer",
                code="EVO-TOKEN-005",
            )
        self.name = name
        self.tokenizer = tokenizer
        self.separator = style.separator
        self.eos_id = tokenizer.eos_id
        self._around = {"user": style.instruction}
        if style.system is not None:
            self._around["system"] = style.system

    def encode(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None = None
    ) -> list[int]:
        self._check(messages, tools)
        return self._encode(messages)

    def left_out(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None = None
    ) -> list[str]:
        return []  # refused by ``encode``

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        self._check(messages, None)
        ids = self._encode(messages)
        if messages and messages[-1].role == "assistant":
            ids += self._between_turns()
        return [abs(token) for token in ids]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return ()  # beside the tokenizer's eos

    @property
    def ending(self) -> list[int]:
        return []

    def _check(
        self, messages: Sequence[ChatMessage], tools: Sequence[Any] | None
    ) -> None:
        refuse_without_place(
            messages,
            tools,
            roles=("assistant", *self._around),
            template=f"the chat template {self.name}",
            fix="put the text into the first user's message, or use a tokenizer whose own template has a place "
            "for it: --chat-template tokenizer",
        )

    def _encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        bos_id = self.tokenizer.bos_id
        ids = [] if bos_id is None else [bos_id]
        asked: list[ChatMessage] = []
        last = len(messages) - 1
        for number, message in enumerate(messages):
            if message.role != "assistant":
                asked.append(message)
                continue
            ids += self._encode_asked(asked)
            ids += self._encode_answer(message)
            asked = []
            if number < last:
                ids += self._between_turns()
        return ids + self._encode_asked(asked)

    def _between_turns(self) -> list[int]:
        """Return the ids after an answer and before the next instruction."""
        ids = mask(self.tokenizer.encode(self.separator))
        bos_id = self.tokenizer.bos_id
        if bos_id is not None:
            ids.append(-bos_id)
        return ids

    def _encode_answer(self, message: ChatMessage) -> list[int]:
        ids = self.tokenizer.encode(message.text)
        ids.append(self.eos_id)
        return ids if message.train else mask(ids)

    def _encode_asked(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the ids of a system message and an instruction, which are one text."""
        if not messages:
            return []
        text = ""
        targets: list[Span] = []
        for message in messages:
            before, after = self._around[message.role]
            text += before
            start = len(text)
            text += message.text
            if message.train:
                targets.append((start, len(text)))
            text += after
        if not targets:
            return mask(self.tokenizer.encode(text))
        return mark_targets(self.tokenizer.encode_with_spans(text), targets)
