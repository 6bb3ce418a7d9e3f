"""Tokenizer folders of public shapes: text, ids and targets are those of ``transformers``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
import transformers

from evomesh.data.chat import build_template, end_of_answer_ids
from evomesh.data.chat_message import ChatMessage
from evomesh.data.folder_template import JinjaTemplate
from evomesh.data.prepare.read_conversation import read_conversation, read_tools
from evomesh.data.records.reader import SourceRecord
from evomesh.data.template import TemplateRenderer
from evomesh.data.tokenizer import load_tokenizer
from evomesh.errors import UserError
from tests.support.chat_folders import (
    ANSWER,
    CHATML,
    CONVERSATIONS,
    FOLDERS,
    LAST,
    MARKS,
    THOUGHT,
    TOOL,
    TOOLS,
    USER,
)

STYLED_FOLDERS = [name for name, row in FOLDERS.items() if row.style]
PLAIN_CONVERSATIONS = [
    name
    for name, turns in CONVERSATIONS.items()
    if all(turn.keys() == {"role", "content"} for turn in turns) and name != "tools"
]
PLAIN_CHATML = CHATML.replace("@[", "").replace("]@", "")


@pytest.fixture(scope="module", params=FOLDERS)
def row(request: pytest.FixtureRequest) -> str:
    """The name of a folder of the table."""
    return str(request.param)


@pytest.fixture(scope="module")
def folder(row: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[row].write(tmp_path_factory.mktemp("folder"))


def load_theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(
        str(folder), trust_remote_code=False, local_files_only=True
    )


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return load_theirs(folder)


@pytest.fixture(scope="module")
def ours(folder: Path) -> JinjaTemplate:
    return JinjaTemplate(load_tokenizer(folder))


@pytest.fixture(scope="module")
def tagged(row: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same folder in transformers, with tags around what the model writes."""
    return load_theirs(
        FOLDERS[row].write(tmp_path_factory.mktemp("tagged"), tagged=True)
    )


def tools_of(turns: list[dict[str, Any]]) -> list[Any] | None:
    return [TOOL] if any(turn["role"] == "tool" for turn in turns) else None


def read(turns: list[dict[str, Any]]) -> tuple[list[ChatMessage], list[Any] | None]:
    """Return messages and tools as they are read from a record."""
    record = SourceRecord({"messages": turns, "tools": tools_of(turns)}, "here")
    return read_conversation(record, "messages"), read_tools(record)


def messages(turns: list[dict[str, Any]]) -> list[ChatMessage]:
    return read(turns)[0]


def encode_theirs(theirs: Any, turns: list[dict[str, Any]], **options: Any) -> Any:
    """Return what transformers encodes; None if the template rejects the conversation."""
    try:
        return theirs.apply_chat_template(
            turns, tools=tools_of(turns), return_dict=True, **options
        )
    except jinja2.TemplateError:
        return None


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_text_and_ids_of_transformers(
    ours: JinjaTemplate, theirs: Any, name: str
) -> None:
    turns = CONVERSATIONS[name]
    given, tools = read(turns)
    untrained = [replace(message, train=False) for message in given]
    wanted = encode_theirs(theirs, turns)
    if wanted is None:
        with pytest.raises(UserError, match="rejects the conversation"):
            ours.encode(untrained, tools)
    else:
        found = ours.encode(untrained, tools)
        assert [abs(token) for token in found] == wanted["input_ids"]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_of_transformers(ours: JinjaTemplate, theirs: Any, name: str) -> None:
    """Up to each answer of a conversation: the ids that a server answers, and the text that an evaluation reads."""
    turns = CONVERSATIONS[name]
    answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    for number in answers:
        prompt = turns[:number]
        if not prompt or tools_of(prompt):
            continue  # a server has no empty conversation, and no tools
        wanted = encode_theirs(theirs, prompt, add_generation_prompt=True)
        if wanted is None:
            with pytest.raises(UserError, match="rejects the conversation"):
                ours.encode_prompt(messages(prompt))
            continue
        assert ours.encode_prompt(messages(prompt)) == wanted["input_ids"]
        text = theirs.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=False
        )
        assert ours.render(prompt, add_generation_prompt=True) == text


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_targets_are_what_the_model_writes(
    ours: JinjaTemplate, tagged: Any, name: str
) -> None:
    """Marked in the template by hand, and counted by transformers."""
    turns = CONVERSATIONS[name]
    given, tools = read(turns)
    wanted = encode_theirs(tagged, turns, return_assistant_tokens_mask=True)
    is_rewritten = (
        name == "history rewritten" and "ns.last" in ours.tokenizer.chat_template
    )
    if wanted is None or is_rewritten:
        with pytest.raises(
            UserError, match=r"rejects the conversation|changes earlier"
        ):
            ours.encode(given, tools)
        return
    ids = ours.encode(given, tools)
    # An id of 0 has no sign.
    pairs = [
        pair for pair in zip(ids, wanted["assistant_masks"], strict=True) if pair[0]
    ]
    assert [int(token > 0) for token, _ in pairs] == [target for _, target in pairs]
    assert any(target for _, target in pairs)


@pytest.mark.parametrize("name", PLAIN_CONVERSATIONS)
@pytest.mark.parametrize("row", STYLED_FOLDERS, indirect=True, scope="module")
def test_a_built_in_style_gives_the_ids_of_the_template(
    row: str, ours: JinjaTemplate, name: str
) -> None:
    turns = CONVERSATIONS[name]
    style = FOLDERS[row].style
    built_in = build_template(style, ours.tokenizer)
    wanted = ours.encode(messages(turns))
    found = built_in.encode(messages(turns))
    assert [abs(token) for token in found] == [abs(token) for token in wanted]
    prompt = messages(turns[:1])
    assert built_in.encode_prompt(prompt) == ours.encode_prompt(prompt)
    # The template's last newline is a target, the style's is not; a bos keeps its sign.
    newline = ours.tokenizer.encode("\n")
    ignored = {*newline, ours.tokenizer.bos_id}
    targets = [token for token in found if token > 0 and token not in ignored]
    assert targets == [token for token in wanted if token > 0 and token not in ignored]


def test_plain_texts_and_special_tokens_of_transformers(
    folder: Path, theirs: Any
) -> None:
    tokenizer = load_tokenizer(folder)
    for text in (
        "the cat",
        " a  b\n\n",
        "x</s> y<|im_end|>z",
        "春眠 é🙂",
        "",
        "<s>[INST] a",
    ):
        assert tokenizer.encode(text) == theirs.encode(
            text, add_special_tokens=False
        ), text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
    )
    assert dict(tokenizer.special_tokens) == theirs.special_tokens_map
    assert tokenizer.vocab_size == max(theirs.get_vocab().values()) + 1


def test_the_terminator_of_an_answer_ends_answers(ours: JinjaTemplate) -> None:
    for turns in (CONVERSATIONS["one turn"], CONVERSATIONS["two turns"]):
        ids = ours.encode(messages(turns))
        ends = end_of_answer_ids(ours.tokenizer, None, 1000, ours)
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        assert len([token for token in ids if token in ends]) >= len(answers)


def test_an_answer_that_is_not_trained_has_no_targets(tmp_path: Path) -> None:
    ours = JinjaTemplate(load_tokenizer(FOLDERS["smollm3"].write(tmp_path)))
    first_muted = messages(CONVERSATIONS["two turns"])
    first_muted[1] = ChatMessage("assistant", ANSWER["content"], False)
    targets = [token for token in ours.encode(first_muted) if token > 0]
    assert ours.tokenizer.decode(targets) == "12345\n<|im_end|>\n"


def test_history_that_the_template_rewrites_is_no_target(tmp_path: Path) -> None:
    ours = JinjaTemplate(load_tokenizer(FOLDERS["qwen3"].write(tmp_path)))
    turns = messages([USER, THOUGHT, MARKS, LAST])
    with pytest.raises(UserError, match=r"message 2 of 4"):
        ours.encode(turns)
    turns[1] = replace(turns[1], train=False)
    assert (
        ours.tokenizer.decode([token for token in ours.encode(turns) if token > 0])
        == "12345\n<|im_end|>\n"
    )
    assert "hm" in ours.tokenizer.decode(
        [abs(token) for token in ours.encode(turns[:2])]
    )


def test_tools_choose_the_template_that_is_named_so(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": PLAIN_CHATML},
        {"name": "tool_use", "template": TOOLS.replace("@[", "").replace("]@", "")},
    ]
    folder = FOLDERS["qwen2"].write(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = named
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = load_theirs(folder)
    ours = JinjaTemplate(load_tokenizer(folder))
    turns = CONVERSATIONS["one turn"]
    for given in ([TOOL], None):
        wanted = theirs.apply_chat_template(turns, tools=given, return_dict=True)
        found = ours.encode(messages(turns), given)
        assert [abs(token) for token in found] == wanted["input_ids"]


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("{{ 'a' * 10000000000 }}", "longer than"),
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "steps",
        ),
        (
            "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
            "nested too deeply",
        ),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "longer",
        ),
        ("{{ 'a'.center(10 ** 9) }}", "width"),
        ("{{ '{:999999999}'.format(1) }}", "width"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('no\nway') }}", "rejects the conversation: no way"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% if", "not a chat template: line 1"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
        ("a" * (1 << 21), "characters"),
    ],
)
def test_templates_that_fail_are_one_line(source: str, part: str) -> None:
    with pytest.raises(UserError, match=part) as caught:
        TemplateRenderer(source, "here").render([USER])
    assert "\n" not in caught.value.found
