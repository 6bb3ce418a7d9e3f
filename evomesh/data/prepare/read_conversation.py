"""Read the conversation of a raw record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from evomesh.data.chat_message import ChatMessage
from evomesh.data.records.chat_form import chat_format
from evomesh.data.records.reader import SourceRecord
from evomesh.data.token_files.lines import json_kind
from evomesh.errors import UserError

RecordSchema = Literal["alpaca", "messages", "sharegpt", "xtuner"]
FLAGS = ("loss", "train", "weight")  # keys of a message that say whether it is a target
XTUNER_FLAG = "output_with_loss"
XTUNER_KEYS = ("system", "input", "output", XTUNER_FLAG)
# Keys that mean the same, in OpenAI's form and in ShareGPT's; files mix them.
LIST_KEYS = ("messages", "conversations")
ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value")
ROLE_NAMES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
EMPTY: tuple[object, ...] = (None, "", [], {})


# Keys of messages that templates of tokenizer folders read.
TEMPLATE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
# Keys that say nothing about the conversation.
LABELS = ("id", "source", "dataset", "idx", "uid")


def read_conversation(
    record: SourceRecord, schema: RecordSchema, roles: Sequence[str] = ("assistant",)
) -> list[ChatMessage]:
    """Return the messages of a record.

    Args:
        schema: "alpaca": instruction, input, output, with an optional system text and history (pairs of question and
            answer); "messages" and "sharegpt": a list, alone or under ``messages`` or ``conversations``, of role and
            content or of from and value. A message with ``"loss"`` or ``"train"`` false, or ``"weight"`` 0, is not a
            target.
            "xtuner": ``conversation`` of input and output, and system in the first.
        roles: the roles whose messages are targets.

    Raises:
        UserError: a key or role is missing or unknown; names the record.
    """
    if schema == "alpaca":
        return _read_alpaca(record, roles)
    if schema == "xtuner":
        return _read_xtuner(record, roles)
    keys = LIST_KEYS if schema == "messages" else LIST_KEYS[::-1]
    return _read_messages(record, keys, roles)


def read_tools(record: SourceRecord) -> list[Any] | None:
    """Return the JSON schemas of the functions that a record lets the assistant call; None if it has none.

    Raises:
        UserError: they are not a list.
    """
    tools = record.value.get("tools") if isinstance(record.value, dict) else None
    if isinstance(tools, str):
        tools = _parse_json_text(tools, "tools", record)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise UserError(
            f"tools is of type {json_kind(tools)}",
            where=record.where,
            expected="a list of JSON schemas",
            code="EVO-DATA-014",
        )
    return tools


def _parse_json_text(text: str, key: str, record: SourceRecord) -> Any:
    """Return what a text of JSON holds; None for an empty one.

    Columns of csv and parquet files hold lists as such texts, and so do records in
    ShareGPT's form with their tools.
    """
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{key} is not JSON ({error})", where=record.where, code="EVO-DATA-014"
        ) from None


def _get_list(value: Any, key: str, record: SourceRecord) -> list[Any]:
    """Return the messages or turns of a record, given as a list or as a text of JSON."""
    if isinstance(value, str):
        value = _parse_json_text(value, key, record)
    if isinstance(value, list) and value:
        return value
    found = "is empty" if value == [] else f"is of type {json_kind(value)}"
    raise UserError(
        f"{key} {found}",
        where=record.where,
        expected="a list of at least one message",
        code="EVO-DATA-014",
    )


def _read_messages(
    record: SourceRecord, keys: Sequence[str], roles: Sequence[str]
) -> list[ChatMessage]:
    """Return the messages of a list.

    Args:
        keys: the names that the list may have in an object, first the one that the format says.
    """
    entries = record.value
    key = keys[0]
    messages = []
    if not isinstance(entries, list):
        key = _choose_key(record.value, keys, record)
        entries = _get_of_record(record, key)
        _refuse_unknown(record.value, (key, "system", "tools"), record)
        messages += _system_message(record, roles)
    for entry in _get_list(entries, key, record):
        messages.append(_read_message(entry, record, roles))
    return messages


def _read_message(
    entry: Any, record: SourceRecord, roles: Sequence[str]
) -> ChatMessage:
    """Return one message of a list."""
    role_key = _choose_key(entry, ROLE_KEYS, record)
    text_key = _choose_key(entry, TEXT_KEYS, record)
    name = _get_text(entry, role_key, record)
    extra = {}
    for key in TEMPLATE_KEYS:
        if entry.get(key) is not None:
            extra[key] = entry[key]
    text = ""
    # A message that calls tools may come without content, or with a null one.
    if entry.get(text_key) is not None or "tool_calls" not in extra:
        text = _get_text(entry, text_key, record)
    _refuse_unknown(entry, (role_key, text_key, *TEMPLATE_KEYS, *FLAGS), record)
    role = ROLE_NAMES.get(name)
    if role is None:
        raise _unknown_role(name, record)
    is_muted = _is_muted(entry, record)
    return ChatMessage(role, text, role in roles and not is_muted, extra)


def _choose_key(value: Any, names: Sequence[str], record: SourceRecord) -> str:
    """Return which of several names that mean the same an object uses; the first if none.

    Raises:
        UserError: more than one of them has a value.
    """
    if not isinstance(value, dict):
        return names[0]
    given = [name for name in names if name in value]
    filled = [name for name in given if value[name] not in EMPTY]
    if len(filled) > 1:
        raise UserError(
            f"both {' and '.join(filled)} are given, which mean the same",
            where=record.where,
            expected=f"one of {', '.join(names)}",
            fix=f"remove {filled[1]} or {filled[0]} from the records",
            code="EVO-DATA-014",
        )
    chosen = filled or given or names
    return chosen[0]


def _unknown_role(name: str, record: SourceRecord) -> UserError:
    """Return the error that a message has a role that no record may have."""
    fix = "rename it to the one that it means, or remove the message"
    if name == "function_call":
        # Other programs have several forms of its text.
        fix = (
            'write the call as {"role": "assistant", "tool_calls": [...]} and take a template that renders it: '
            "--chat-template tokenizer"
        )
    return UserError(
        f"the role {name!r} is unknown",
        where=record.where,
        expected=f"one of {', '.join(ROLE_NAMES)}",
        fix=fix,
        code="EVO-DATA-014",
    )


def _is_muted(
    entry: dict[str, Any], record: SourceRecord, flags: Sequence[str] = FLAGS
) -> bool:
    """Return whether a message or turn says that it is not a target.

    Raises:
        UserError: one of its flags is neither true nor false.
    """
    for key in flags:
        value = entry.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise UserError(
                f"{key} of a message is {value!r}",
                where=record.where,
                expected="true or 1: a target; false or 0: none",
                code="EVO-DATA-014",
            )
        if not value:
            return True
    return False


def _read_alpaca(record: SourceRecord, roles: Sequence[str]) -> list[ChatMessage]:
    _get_of_record(record, "instruction")
    question = _get_text(record.value, "instruction", record)
    extra = ""
    if record.value.get("input") is not None:
        extra = _get_text(record.value, "input", record)
    answer = _get_text(record.value, "output", record)
    # "text" is the whole prompt of Alpaca's own data, which repeats the other keys.
    _refuse_unknown(
        record.value,
        ("instruction", "input", "output", "system", "history", "tools", "text"),
        record,
    )
    if extra:
        question += f"\n{extra}"
    messages = _system_message(record, roles)
    trains_user = "user" in roles
    trains_assistant = "assistant" in roles
    for old_question, old_answer in _history(record):
        messages.append(ChatMessage("user", old_question, trains_user))
        messages.append(ChatMessage("assistant", old_answer, trains_assistant))
    messages.append(ChatMessage("user", question, trains_user))
    messages.append(ChatMessage("assistant", answer, trains_assistant))
    return messages


def _read_xtuner(record: SourceRecord, roles: Sequence[str]) -> list[ChatMessage]:
    turns = (
        record.value
        if isinstance(record.value, list)
        else _get_of_record(record, "conversation")
    )
    turns = _get_list(turns, "conversation", record)
    if isinstance(record.value, dict):
        _refuse_unknown(record.value, ("conversation", "tools"), record)
    messages = []
    for turn in turns:
        messages += _read_xtuner_turn(turn, record, roles)
    return messages


def _read_xtuner_turn(
    turn: Any, record: SourceRecord, roles: Sequence[str]
) -> list[ChatMessage]:
    """Return the messages of one turn: its system text and its question if it has them, and its answer."""
    if isinstance(turn, dict):
        _refuse_unknown(turn, XTUNER_KEYS, record)
    question = _get_text(turn, "input", record)
    answer = _get_text(turn, "output", record)
    messages = []
    if turn.get("system"):
        rules = _get_text(turn, "system", record)
        system = ChatMessage("system", rules, "system" in roles)
        messages.append(system)
    # Without a question a turn is text to continue, as in pre-training.
    if question:
        user = ChatMessage("user", question, "user" in roles)
        messages.append(user)
    is_target = "assistant" in roles and not _is_muted(turn, record, (XTUNER_FLAG,))
    assistant = ChatMessage("assistant", answer, is_target)
    messages.append(assistant)
    return messages


def _system_message(record: SourceRecord, roles: Sequence[str]) -> list[ChatMessage]:
    """Return the message of a record's system text, if it has one."""
    if not record.value.get("system"):
        return []
    rules = _get_text(record.value, "system", record)
    return [ChatMessage("system", rules, "system" in roles)]


def _history(record: SourceRecord) -> list[tuple[str, str]]:
    """Return the pairs of question and answer before a record's own."""
    pairs = record.value.get("history") or []
    if isinstance(pairs, str):
        pairs = _parse_json_text(pairs, "history", record) or []
    is_known = isinstance(pairs, list) and all(map(_is_pair, pairs))
    if not is_known:
        raise UserError(
            "history has another form",
            where=record.where,
            expected="a list of [question, answer]",
            code="EVO-DATA-014",
        )
    return [(question, answer) for question, answer in pairs]


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(text, str) for text in value)
    )


def _refuse_unknown(
    value: dict[str, Any], known: Sequence[str], record: SourceRecord
) -> None:
    """Refuse keys that would be lost silently; labels and keys without a value are allowed."""
    unknown = [
        key
        for key, found in value.items()
        if key not in (*known, *LABELS) and found not in EMPTY
    ]
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise UserError(
            f"unknown keys: {names}",
            where=record.where,
            expected=f"some of {', '.join(known)}",
            fix="remove them, or rename them to what they mean",
            code="EVO-DATA-014",
        )


def _get_of_record(record: SourceRecord, key: str) -> Any:
    """Return a value of a record; the error says which format the record has."""
    return _get(record.value, key, record, fix=_format_fix(record.value))


def _format_fix(value: Any) -> str:
    """Return what to do with a record that lacks the keys of the format."""
    name = chat_format(value)
    if name:
        return f"its form is another one: --format {name}"
    return (
        'rename its keys, as in {"messages": [{"role": "user", "content": "..."}, ...]} with --format messages, '
        "or tokenize it as text: --format text"
    )


def _get(value: Any, key: str, record: SourceRecord, fix: str = "") -> Any:
    """Return a value of an object in a record, which must have this key."""
    if isinstance(value, dict) and key in value:
        return value[key]
    keys = ", ".join(value) if isinstance(value, dict) else json_kind(value)
    raise UserError(
        f"the record has no key {key!r} (it has: {keys or 'none'})",
        where=record.where,
        fix=fix,
        code="EVO-DATA-014",
    )


def _get_text(value: Any, key: str, record: SourceRecord) -> str:
    text = _get(value, key, record)
    if not isinstance(text, str):
        raise UserError(
            f"{key} is of type {json_kind(text)}",
            where=record.where,
            expected="a string",
            code="EVO-DATA-014",
        )
    return text
