"""Read the conversation of a raw record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from evomesh.data.chat import ROLES, ChatMessage
from evomesh.data.records.reader import SourceRecord
from evomesh.data.token_files.lines import json_kind
from evomesh.errors import UserError

RecordSchema = Literal["alpaca", "messages", "sharegpt", "xtuner"]
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def read_conversation(
    record: SourceRecord, schema: RecordSchema, roles: Sequence[str] = ("assistant",)
) -> list[ChatMessage]:
    """Return the messages of a record.

    Args:
        schema: "alpaca": instruction, input, output; "messages": a list (or its key ``messages``) of role and content,
            in which a message with ``"loss": false`` is not a target; "sharegpt": ``conversations`` of from and value;
            "xtuner": ``conversation`` of input and output, and system in the first.
        roles: the roles whose messages are targets.

    Raises:
        UserError: a key or role is missing or unknown; names the record.
    """
    if schema == "alpaca":
        return _read_alpaca(record, roles)
    if schema == "xtuner":
        return _read_xtuner(record, roles)
    key = "messages" if schema == "messages" else "conversations"
    entries = record.value if isinstance(record.value, list) else _get(record.value, key, record)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{key} has no messages", where=record.where, expected="a list of them")
    messages = []
    for entry in entries:
        if schema == "messages":
            role = _get_text(entry, "role", record)
            text = _get_text(entry, "content", record)
        else:
            sender = _get_text(entry, "from", record)
            role = SHAREGPT_ROLES.get(sender, sender)
            text = _get_text(entry, "value", record)
        if role not in ROLES:
            raise UserError(
                f"the role {role!r} is unknown", where=record.where, expected=f"one of {', '.join(ROLES)}"
            )
        is_muted = entry.get("loss", True) is False
        messages.append(ChatMessage(role, text, train=role in roles and not is_muted))
    return messages


def _read_alpaca(record: SourceRecord, roles: Sequence[str]) -> list[ChatMessage]:
    question = _get_text(record.value, "instruction", record)
    extra = _get_text(record.value, "input", record)
    answer = _get_text(record.value, "output", record)
    if extra:
        question += f"\n{extra}"
    return [
        ChatMessage("user", question, train="user" in roles),
        ChatMessage("assistant", answer, train="assistant" in roles),
    ]


def _read_xtuner(record: SourceRecord, roles: Sequence[str]) -> list[ChatMessage]:
    turns = record.value if isinstance(record.value, list) else _get(record.value, "conversation", record)
    if not isinstance(turns, list) or not turns:
        raise UserError("conversation has no turns", where=record.where, expected="a list of them")
    messages = []
    for turn in turns:
        for key, role in (("system", "system"), ("input", "user"), ("output", "assistant")):
            text = _get_text(turn, key, record) if key != "system" else turn.get(key) or ""
            if text or key == "output":
                is_muted = key == "output" and turn.get("output_with_loss", True) is False
                messages.append(ChatMessage(role, text, train=role in roles and not is_muted))
    return messages


def _get(value: Any, key: str, record: SourceRecord) -> Any:
    """Return a value of an object in a record, which must have this key."""
    if isinstance(value, dict) and key in value:
        return value[key]
    keys = ", ".join(value) if isinstance(value, dict) else json_kind(value)
    raise UserError(f"the record has no key {key!r} (it has: {keys or 'none'})", where=record.where)


def _get_text(value: Any, key: str, record: SourceRecord) -> str:
    text = _get(value, key, record)
    if not isinstance(text, str):
        raise UserError(f"{key} is of type {json_kind(text)}", where=record.where, expected="a string")
    return text
