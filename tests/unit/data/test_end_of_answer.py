"""One rule for the ids that end an answer, and one for the bos in front of a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from evomesh.config.schema import GenerationConfig
from evomesh.data.chat import build_template, choose_template, end_of_answer_ids
from evomesh.data.tokenizer import (
    Tokenizer,
    check_tokenizer_fits,
    encode_prompt,
    load_tokenizer,
)
from evomesh.errors import UserError
from tests.support.serving import VOCAB, byte_tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<eoh>", "<eoa>"]
IDS = {name: VOCAB + number for number, name in enumerate(SPECIAL)}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


def chat_tokenizer(
    folder: Path, template: str = CHATML, add_bos: bool = False
) -> Tokenizer:
    byte_tokenizer(folder, template)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(SPECIAL)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", IDS["<s>"])]
        )
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


def test_eos_turn_end_and_configured_ids_end_an_answer_in_this_order(
    tmp_path: Path,
) -> None:
    tokenizer = chat_tokenizer(tmp_path)
    section = GenerationConfig(eos_id=(7, IDS["</s>"]), additional_eos_token_list=(9,))
    eos, turn_end = IDS["</s>"], IDS["<|im_end|>"]
    assert end_of_answer_ids(tokenizer, section, 300) == (eos, turn_end, 7, 9)
    assert end_of_answer_ids(tokenizer, None, 300) == (eos, turn_end)
    assert end_of_answer_ids(None, section, 300) == (7, eos, 9)
    assert end_of_answer_ids(None, None, 300) == ()


def test_the_template_in_use_replaces_the_tokenizers_own(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path)
    internlm = build_template("internlm", tokenizer)
    assert end_of_answer_ids(tokenizer, None, 300, internlm) == (
        IDS["</s>"],
        IDS["<eoa>"],
    )


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ({"eos_id": (7, 400)}, "generation.eos_id: the id 400 has no row"),
        ({"eos_id": (-1,)}, "generation.eos_id: the id -1 has no row"),
        (
            {"additional_eos_token_list": (300,)},
            "generation.additional_eos_token_list: the id 300 has no row in the embedding, which has 300",
        ),
    ],
)
def test_ids_that_the_model_cannot_generate_are_refused(
    section: dict[str, Any], part: str
) -> None:
    with pytest.raises(UserError, match=part):
        end_of_answer_ids(None, GenerationConfig(**section), 300)


def test_ends_of_a_tokenizer_past_the_embedding_are_refused(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path)
    with pytest.raises(UserError, match="the tokenizer's eos: the id 257 has no row"):
        end_of_answer_ids(tokenizer, None, VOCAB)
    with pytest.raises(UserError, match="the end of an answer in the chat template"):
        end_of_answer_ids(tokenizer, None, IDS["<|im_end|>"])


def test_auto_is_the_tokenizers_own_template_if_it_has_one(tmp_path: Path) -> None:
    assert choose_template("auto", chat_tokenizer(tmp_path / "chat")) is not None
    assert (
        choose_template("auto", chat_tokenizer(tmp_path / "plain", template="")) is None
    )
    assert choose_template("none", chat_tokenizer(tmp_path / "chat")) is None


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_prompt_starts_with_bos_if_the_tokenizer_adds_it(
    tmp_path: Path, add_bos: bool
) -> None:
    tokenizer = chat_tokenizer(tmp_path, add_bos=add_bos)
    assert encode_prompt(tokenizer, "ab") == [IDS["<s>"]] * add_bos + tokenizer.encode(
        "ab"
    )


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path)
    check_tokenizer_fits(tokenizer, tokenizer.vocab_size)
    with pytest.raises(
        UserError,
        match=f"the tokenizer has {tokenizer.vocab_size} ids, the embedding 256 rows",
    ):
        check_tokenizer_fits(tokenizer, VOCAB)
