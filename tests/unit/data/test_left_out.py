"""What a chat template leaves out of a conversation: refused where a message says nothing else, else named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.data.chat_message import ChatMessage
from evomesh.data.left_out import find_left_out
from evomesh.data.template import TemplateRenderer
from evomesh.data.token_files.fingerprint import read_fingerprint
from evomesh.errors import UserError
from tests.support.chat_folders import FOLDERS

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
CALLS = (
    "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
LAST_THOUGHT = (
    "{% for m in messages %}{% if loop.last %}{{ m.reasoning_content }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
LOUD = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
SYSTEM_LATE = (
    "{% for m in messages[1:] %}{{ m.content }}"
    "{% if loop.last %}{{ messages[0].content }}{% endif %}{% endfor %}"
)
WITH_TOOLS = "{{ tools }}" + CALLS

CALL = [{"function": {"name": "weather", "arguments": "{}"}}]
QUESTION = ChatMessage("user", "a question", False)
ANSWER = ChatMessage("assistant", " an answer ", True)
CALLING = ChatMessage("assistant", "", True, {"tool_calls": CALL})
TALKING = ChatMessage("assistant", "wait", True, {"tool_calls": CALL})
RESULT = ChatMessage("tool", "sunny", False, {"tool_call_id": "1"})
THOUGHT = ChatMessage("assistant", "an answer", True, {"reasoning_content": "hm"})
THINKING = ChatMessage("assistant", "an answer", True, {"thinking": "hm"})
NAMED = ChatMessage("user", "a question", False, {"name": "Ann"})
SYSTEM = ChatMessage("system", "question", False)


def left_out(
    source: str, messages: Sequence[ChatMessage], tools: list[Any] | None = None
) -> list[str]:
    renderer = TemplateRenderer(source, "there")

    def render(messages: Sequence[ChatMessage], tools: Sequence[Any] | None) -> str:
        turns = [
            {"role": message.role, "content": message.text, **message.extra}
            for message in messages
        ]
        return renderer.render(turns, variables={"tools": tools}).text

    return find_left_out(messages, tools, render, "there")


@pytest.mark.parametrize(
    ("source", "messages", "tools", "names"),
    [
        (PLAIN, [SYSTEM, QUESTION, ANSWER], None, []),
        (PLAIN, [QUESTION, THOUGHT, NAMED, THINKING], None, ["reasoning_content", "name", "reasoning_content"]),
        (CALLS, [QUESTION, CALLING, RESULT, ANSWER], None, []),
        (CALLS, [QUESTION, TALKING, RESULT], None, ["content beside tool_calls"]),
        (CALLS, [QUESTION, CALLING], CALL, ["tools"]),
        (WITH_TOOLS, [QUESTION, CALLING], CALL, []),
        (LAST_THOUGHT, [QUESTION, THOUGHT, QUESTION, THINKING], None, ["reasoning_content"]),
        (SYSTEM_LATE, [SYSTEM, QUESTION, ANSWER], None, []),
        (LOUD, [SYSTEM, QUESTION, ANSWER], None, []),
    ],
)  # fmt: skip
def test_what_a_message_can_do_without_is_named(
    source: str, messages: list[ChatMessage], tools: list[Any] | None, names: list[str]
) -> None:
    assert left_out(source, messages, tools) == names


@pytest.mark.parametrize(
    ("source", "messages", "words"),
    [
        (PLAIN, [QUESTION, CALLING, RESULT, TALKING], "tool_calls of message 2, tool_calls of message 4"),
        (LAST_THOUGHT, [QUESTION, CALLING], "tool_calls of message 2"),
        # Its text stands in the question too.
        (NO_SYSTEM, [SYSTEM, QUESTION, ANSWER], "the text of message 1 (system)"),
    ],
)  # fmt: skip
def test_what_is_all_that_a_message_says_is_refused(
    source: str, messages: list[ChatMessage], words: str
) -> None:
    with pytest.raises(UserError) as error:
        left_out(source, messages)
    assert error.value.found == f"the chat template leaves out {words}"


def test_the_command_refuses_calls_and_counts_reasoning(tmp_path: Path) -> None:
    folder = FOLDERS["internlm2 fast"].write(tmp_path / "tok")
    question = {"role": "user", "content": "the cat"}
    thought = {"role": "assistant", "content": "sat", "reasoning_content": "the mat"}
    call = {"role": "assistant", "content": "", "tool_calls": CALL}
    raw = tmp_path / "raw.jsonl"
    output = str(tmp_path / "a.bin")
    options = ["--format", "messages", "--chat-template", "tokenizer"]
    options += ["-t", str(folder), "-o", output]

    records = [{"messages": [question, answer]} for answer in (thought, thought, call)]
    raw.write_text("\n".join(map(json.dumps, records[:2])))
    result = CliRunner().invoke(app, ["tokenize", str(raw), *options])
    assert result.exit_code == 0
    warning = "warning: the chat template leaves out reasoning_content 2 times\n"
    assert warning in result.stderr
    record = read_fingerprint(output)
    assert record is not None and record["left_out"] == {"reasoning_content": 2}

    raw.write_text("\n".join(map(json.dumps, records)))
    result = CliRunner().invoke(app, ["tokenize", str(raw), *options])
    error = result.exception
    assert isinstance(error, UserError)
    assert error.found == "the chat template leaves out tool_calls of message 2"
    assert error.where.endswith("raw.jsonl line 3") and error.code == "EVO-TOKEN-009"
