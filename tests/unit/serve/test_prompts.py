"""A prompt is what the model saw in training up to its answer, and its stops are what stood behind the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer as Backend

from evomesh.data.chat import build_template
from evomesh.data.chat_message import ChatMessage
from evomesh.data.chat_styles import STYLES
from evomesh.data.tokenizer import Tokenizer, load_tokenizer
from tests.support.serving import TEMPLATE, byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [("system", "be short"), ("user", "hi"), ("assistant", "yes"), ("user", "and?")]


def special_tokenizer(folder: Path, template: str = "") -> Tokenizer:
    byte_tokenizer(folder, template)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(
        [
            "<s>",
            "</s>",
            *{piece for style in STYLES.values() for piece in style.special},
        ]
    )
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def talk(turns: list[tuple[str, str]]) -> list[ChatMessage]:
    return [ChatMessage(role, text, role == "assistant") for role, text in turns]


@pytest.mark.parametrize("name", [*STYLES, "tokenizer"])
def test_a_prompt_is_the_beginning_of_the_training_text(
    tmp_path: Path, name: str
) -> None:
    tokenizer = special_tokenizer(tmp_path, CHATML if name == "tokenizer" else "")
    template = build_template(name, tokenizer)
    whole = [
        abs(token) for token in template.encode(talk([*TURNS, ("assistant", "well")]))
    ]
    prompt = template.encode_prompt(talk(TURNS))
    answer = tokenizer.encode("well")
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) : len(prompt) + len(answer)] == answer
    assert whole[len(prompt) + len(answer)] in template.eos_ids


@pytest.mark.parametrize("source", [CHATML, TEMPLATE])
def test_jinja_prompts_equal_transformers(tmp_path: Path, source: str) -> None:
    tokenizer = special_tokenizer(tmp_path, source)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=source
    )
    turns = [{"role": role, "content": text} for role, text in TURNS]
    wanted = theirs.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert build_template("tokenizer", tokenizer).encode_prompt(talk(TURNS)) == list(
        wanted
    )
