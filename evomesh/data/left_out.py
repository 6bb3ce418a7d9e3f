"""Find what the chat template of a tokenizer's folder leaves out of a conversation.

A part counts as left out if the text is the same without it. Some templates leave parts out on
purpose, such as the reasoning before earlier answers; a part that is all that a message says is
not one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from evomesh.data.chat_message import ChatMessage
from evomesh.data.template import REASONING_KEYS
from evomesh.errors import UserError

# Return the text of messages and tools.
RenderFunction = Callable[[Sequence[ChatMessage], Sequence[Any] | None], str]
CALLS = "tool_calls"
# Keys of one meaning, of which templates read the first one that they know. The id of a
# call is not among them: it says only which call a message answers.
OPTIONAL_KEYS = (REASONING_KEYS, ("name",))


def find_left_out(
    messages: Sequence[ChatMessage],
    tools: Sequence[Any] | None,
    render: RenderFunction,
    where: str,
) -> list[str]:
    """Return the name of each part that a template leaves out of a conversation that says more, as often as it does.

    These are reasoning, names, texts beside a call, and tools.

    Args:
        where: file or folder of the template, for messages.

    Raises:
        UserError: it leaves out calls of tools, or all that a message says.
    """
    whole = render(messages, tools)
    _refuse_essential(messages, tools, whole, render, where)
    found = []
    if tools and _is_same(render, messages, None, whole):
        found.append("tools")
    for number, message in enumerate(messages):
        for name, without in _without_optional_parts(message):
            if _is_same_with(render, messages, tools, number, without, whole):
                found.append(name)
    return found


def _refuse_essential(
    messages: Sequence[ChatMessage],
    tools: Sequence[Any] | None,
    whole: str,
    render: RenderFunction,
    where: str,
) -> None:
    lacking = []
    for number in _unseen_texts(messages, whole):
        message = messages[number]
        if CALLS in message.extra:
            continue
        silent = _silent(message)
        if _is_same_with(render, messages, tools, number, silent, whole):
            lacking.append(f"the text of message {number + 1} ({message.role})")
    for number, message in enumerate(messages):
        without = _without(message, (CALLS,))
        if without is None:
            continue
        if _is_same_with(render, messages, tools, number, without, whole):
            lacking.append(f"{CALLS} of message {number + 1}")
    if lacking:
        raise UserError(
            f"the chat template leaves out {', '.join(lacking)}",
            where=where,
            fix="use a tokenizer whose template has a place for it, or remove it from the data",
            code="EVO-TOKEN-009",
        )


def _without_optional_parts(message: ChatMessage) -> Iterator[tuple[str, ChatMessage]]:
    """Yield the name of each part that a message can do without, and the message without it."""
    for keys in OPTIONAL_KEYS:
        without = _without(message, keys)
        if without is not None:
            yield keys[0], without
    if CALLS in message.extra and message.text.strip():
        yield f"content beside {CALLS}", _silent(message)


def _unseen_texts(messages: Sequence[ChatMessage], whole: str) -> list[int]:
    """Return the messages whose texts have to be looked at: none if all stand in the whole, one after another."""
    spoken = [number for number, message in enumerate(messages) if message.text.strip()]
    start = 0
    for number in spoken:
        text = messages[number].text.strip()
        place = whole.find(text, start)
        if place < 0:
            return spoken
        start = place + len(text)
    return []


def _silent(message: ChatMessage) -> ChatMessage:
    return replace(message, text="")


def _without(message: ChatMessage, keys: Sequence[str]) -> ChatMessage | None:
    """Return a message without some of its keys, None if it has none of them."""
    kept = {key: value for key, value in message.extra.items() if key not in keys}
    if len(kept) == len(message.extra):
        return None
    return replace(message, extra=kept)


def _is_same_with(
    render: RenderFunction,
    messages: Sequence[ChatMessage],
    tools: Sequence[Any] | None,
    number: int,
    other: ChatMessage,
    whole: str,
) -> bool:
    """Return whether the text stays as it is with another message in one place."""
    changed = [*messages[:number], other, *messages[number + 1 :]]
    return _is_same(render, changed, tools, whole)


def _is_same(
    render: RenderFunction,
    messages: Sequence[ChatMessage],
    tools: Sequence[Any] | None,
    whole: str,
) -> bool:
    try:
        return render(messages, tools) == whole
    except UserError:
        return False  # what the template misses it reads
