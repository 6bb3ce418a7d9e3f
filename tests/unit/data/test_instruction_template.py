"""XTuner's prompt templates against texts written out here and encoded by sentencepiece itself."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, get_args

import pytest
import sentencepiece

from evomesh.config.data import ChatTemplateName
from evomesh.config.reading.xtuner.raw_data import TEMPLATES
from evomesh.data.chat import build_template
from evomesh.data.chat_message import ChatMessage
from evomesh.data.chat_styles import STYLES
from evomesh.data.instruction_styles import INSTRUCTION_STYLES
from evomesh.data.tokenizer import load_tokenizer
from evomesh.errors import UserError
from tests.unit.data.test_style_template import model_with


class Written(NamedTuple):
    """What a template makes of the instruction "is", of "the" as a system message before it, and of "cat" after it."""

    first: str
    with_system: str | None  # None: there is no place for one
    second: str
    separator: str = "\n"


WRITTEN = {
    "xtuner_default": Written(
        "<|User|>:is\n<|Bot|>:",
        "<|System|>:the\n<|User|>:is\n<|Bot|>:",
        "<|User|>:cat\n<|Bot|>:",
    ),
    "xtuner_zephyr": Written(
        "<|user|>\nis\n<|assistant|>\n",
        "<|system|>\nthe\n<|user|>\nis\n<|assistant|>\n",
        "<|user|>\ncat\n<|assistant|>\n",
    ),
    "xtuner_mistral": Written(
        "[INST] is [/INST]",
        "[INST] the [/INST]\n[INST] is [/INST]",
        "[INST] cat [/INST]",
    ),
    "xtuner_code_llama": Written(
        "[INST] is [/INST]", "the\n[INST] is [/INST]", "[INST] cat [/INST]", ""
    ),
    "xtuner_llama2": Written("[INST] is [/INST]", None, "[INST] cat [/INST]"),
    "xtuner_vicuna": Written("USER: is ASSISTANT:", None, "USER: cat ASSISTANT:"),
    "xtuner_wizardcoder": Written(
        "### Instruction:\nis\n\n### Response:",
        None,
        "### Instruction:\ncat\n\n### Response:",
        "\n\n",
    ),
    "xtuner_deepseek_coder": Written(
        "### Instruction:\nis\n### Response:\n",
        None,
        "### Instruction:\ncat\n### Response:\n",
    ),
    "xtuner_baichuan": Written(
        "<reserved_102>is<reserved_103>",
        "the\n<reserved_102>is<reserved_103>",
        "<reserved_102>cat<reserved_103>",
    ),
    "xtuner_baichuan2": Written(
        "<reserved_106>is<reserved_107>",
        "the\n<reserved_106>is<reserved_107>",
        "<reserved_106>cat<reserved_107>",
    ),
}
SYSTEM = ChatMessage("system", "the", False)
FIRST = ChatMessage("user", "is", False)
ANSWER = ChatMessage("assistant", "what the", True)
SECOND = ChatMessage("user", "cat", False)
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with(tmp_path_factory.mktemp("model"), [], [], prefix=True)


def test_names() -> None:
    assert sorted(WRITTEN) == sorted(INSTRUCTION_STYLES)
    names = [*STYLES, *INSTRUCTION_STYLES]
    assert list(get_args(ChatTemplateName)) == names
    assert set(TEMPLATES.values()) == set(names)


@pytest.mark.parametrize("name", WRITTEN)
class TestTexts:
    def test_two_turns(self, name: str, model: Path) -> None:
        plain = sentencepiece.SentencePieceProcessor(model_file=str(model))
        written = WRITTEN[name]
        template = build_template(name, load_tokenizer(model))
        ids = template.encode([FIRST, ANSWER, SECOND, ANSWER])
        answer = [*plain.encode("what the"), EOS]
        parts = [
            [BOS],
            [-token for token in plain.encode(written.first)],
            answer,
            [-token for token in plain.encode(written.separator)],
            [-BOS],
            [-token for token in plain.encode(written.second)],
            answer,
        ]
        assert ids == [token for part in parts for token in part]

        # A prompt is what stands before the answer; eos ends it.
        prompt = template.encode_prompt([FIRST, ANSWER, SECOND])
        assert prompt == [abs(token) for token in ids[: -len(answer)]]
        assert template.eos_ids == () and template.ending == []

    def test_a_system_message(self, name: str, model: Path) -> None:
        plain = sentencepiece.SentencePieceProcessor(model_file=str(model))
        template = build_template(name, load_tokenizer(model))
        text = WRITTEN[name].with_system
        if text is None:
            with pytest.raises(UserError, match="no place for the role 'system'"):
                template.encode([SYSTEM, FIRST, ANSWER])
            return
        ids = template.encode_prompt([SYSTEM, FIRST])
        assert ids == [BOS, *plain.encode(text)]


def test_targets(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    template = build_template("xtuner_vicuna", tokenizer)
    asked = ChatMessage("user", "cat", True)
    untrained = ChatMessage("assistant", "what the", False)
    ids = template.encode([asked, untrained, FIRST, ANSWER])
    targets = [token for token in ids[1:] if token > 0]
    assert tokenizer.decode(targets).split() == ["cat", "what", "the"]
    assert ids.count(EOS) == 1 and ids.count(-EOS) == 1


def test_tools_are_refused(model: Path) -> None:
    template = build_template("xtuner_mistral", load_tokenizer(model))
    with pytest.raises(UserError, match="xtuner_mistral has no place for tools"):
        template.encode([FIRST, ANSWER], tools=[{"name": "f"}])
