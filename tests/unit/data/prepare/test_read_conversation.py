"""The forms in which a raw record may hold a conversation, and what the error says of any other."""

from __future__ import annotations

from typing import Any

import pytest

from evomesh.data.chat_message import ChatMessage
from evomesh.data.prepare.read_conversation import read_conversation
from evomesh.data.records.reader import SourceRecord
from evomesh.errors import UserError

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
]


@pytest.mark.parametrize("schema", ["messages", "sharegpt"])
@pytest.mark.parametrize("key", ["messages", "conversations", None])
@pytest.mark.parametrize("role_key", ["role", "from"])
@pytest.mark.parametrize("names", [("human", "gpt"), ("user", "assistant")])
def test_forms_of_messages_may_be_mixed(
    schema: Any, key: str | None, role_key: str, names: tuple[str, str]
) -> None:
    text_key = "value" if role_key == "from" else "content"
    turns = [
        {role_key: names[0], text_key: "hi", "id": "3"},
        {role_key: names[1], text_key: "hello", "weight": None},
    ]
    record: Any = turns if key is None else {"conversations": None, key: turns}
    assert read_conversation(SourceRecord(record, ""), schema) == [
        ChatMessage("user", "hi", False),
        ChatMessage("assistant", "hello", True),
    ]


@pytest.mark.parametrize(
    ("schema", "value", "part"),
    [
        (
            "messages",
            {"messages": TURNS, "conversations": TURNS},
            "both messages and conversations are given, which mean the same",
        ),
        (
            "sharegpt",
            [{"role": "user", "from": "gpt", "value": "a"}],
            "fix: remove from or role from the records",
        ),
        (
            "messages",
            [{"role": "user", "content": "a", "value": "b"}],
            "both content and value",
        ),
        ("alpaca", {"messages": TURNS}, "--format messages"),
        ("xtuner", {"conversations": TURNS}, "--format sharegpt"),
        ("messages", ALPACA, "--format alpaca"),
        ("sharegpt", {"conversation": []}, "--format xtuner"),
        ("messages", {"text": "a"}, 'as in {"messages": [{"role"'),
        (
            "messages",
            [{"role": "bot", "content": "a"}],
            "expected: one of system, user, human, assistant, gpt, tool, observation",
        ),
        (
            "sharegpt",
            [{"from": "function_call", "value": "{}"}],
            'fix: write the call as {"role": "assistant", "tool_calls"',
        ),
    ],
)
def test_the_error_of_another_form_says_what_is_read(
    schema: Any, value: Any, part: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_conversation(SourceRecord(value, "here"), schema)
    assert part in str(caught.value)
