"""Sentencepiece tokenizers in exported folders: the ids of ``transformers`` and of sentencepiece itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from evomesh.checkpoint.huggingface.tokenizer import (
    TEXTS,
    compare_tokenizers,
    special_ids,
    write_json,
    write_tokenizer,
)
from evomesh.config.schema import GenerationConfig
from evomesh.data.folder_template import JinjaTemplate
from evomesh.data.tokenizer import load_tokenizer
from evomesh.errors import UserError
from tests.support.chat_folders import FOLDERS

CORPUS = [
    "the cat sat on the mat",
    "a dog saw the cat",
    "12345 + 6.7 = ?",
    "def f(x):\n    return x",
    "春眠不觉晓",
]
MORE = ["", " ", "  the cat", "the cat ", "\n\n x", "cat\u00a0dog", "the " * 20]


def train(folder: Path, *, prefix: bool, **options: Any) -> Path:
    """A model that leaves text as it is, as InternLM's do; the prefix is the space Llama's puts in front."""
    given: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 320,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 9),
        model_prefix=str(folder / "tokenizer"),
        add_dummy_prefix=prefix,
        hard_vocab_limit=False,
        minloglevel=2,
        **given | options,
    )
    return folder / "tokenizer.model"


@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        (False, {}),
        (True, {}),
        (
            True,
            {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        ),
        (True, {"model_type": "unigram", "vocab_size": 300}),
        (False, {"user_defined_symbols": ["<eoa>"]}),
    ],
)
def test_ids_of_sentencepiece(
    prefix: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "hf").mkdir()
    path = train(tmp_path, prefix=prefix, **options)
    write_tokenizer(load_tokenizer(path), tmp_path / "hf", None, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(
        str(tmp_path / "hf"), trust_remote_code=False
    )
    truth = SentencePieceProcessor(model_file=str(path))
    for text in (*TEXTS, *MORE, *CORPUS):
        ids = truth.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert load_tokenizer(tmp_path / "hf").encode(text) == ids, text
        if text and not options:
            assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (
        truth.bos_id(),
        truth.eos_id(),
    )
    settings = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    if not prefix and not options:  # InternLM's form
        assert (
            settings["tokenizer_class"],
            settings["add_prefix_space"],
            settings["legacy"],
        ) == (
            "LlamaTokenizer",
            False,
            False,
        )


@pytest.mark.parametrize("prefix", [False, True])
def test_bos_where_the_tokenizer_adds_it(prefix: bool, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    path = train(tmp_path, prefix=prefix)
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": True})
    tokenizer = load_tokenizer(path)
    write_tokenizer(tokenizer, tmp_path / "hf", "{{ messages[0].content }}", 64)
    theirs = transformers.AutoTokenizer.from_pretrained(
        str(tmp_path / "hf"), trust_remote_code=False
    )
    assert theirs.encode("the cat") == [1, *tokenizer.encode("the cat")]
    assert (
        theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        == "hi"
    )
    assert list(load_tokenizer(tmp_path / "hf").leading)


def test_another_cut_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    tokenizer = load_tokenizer(train(tmp_path, prefix=False))
    write_tokenizer(tokenizer, tmp_path / "hf", None, 64)
    file = tmp_path / "hf/tokenizer_config.json"
    file.write_text(
        file.read_text().replace(
            '"add_prefix_space": false', '"add_prefix_space": true'
        )
    )
    with pytest.raises(UserError, match="transformers tokenizes 'Hello world' to"):
        compare_tokenizers(tokenizer, tmp_path / "hf")


def test_a_folder_in_which_transformers_gives_other_ids_is_refused(
    tmp_path: Path,
) -> None:
    """As a Llama tokenizer, InternLM2's marks get new ids past the embedding."""
    row = FOLDERS["internlm2"]
    named_llama = replace(
        row, settings=row.settings | {"tokenizer_class": "LlamaTokenizer"}
    )
    tokenizer = load_tokenizer(named_llama.write(tmp_path))
    with pytest.raises(UserError, match=r"gives the token .*\n.*ids below 330"):
        compare_tokenizers(tokenizer, tmp_path)
    (tmp_path / "hf").mkdir()
    write_tokenizer(tokenizer, tmp_path / "hf", None, 64)
    compare_tokenizers(tokenizer, tmp_path / "hf")


def test_a_config_that_transformers_cannot_read_is_refused_with_its_reason(
    tmp_path: Path,
) -> None:
    tokenizer = load_tokenizer(FOLDERS["qwen3"].write(tmp_path))
    # Without a class of the model, transformers does not find the length that it reads here.
    rope = {"rope_type": "llama3", "factor": 8.0}
    config = {"model_type": "internlm2", "rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cannot load the tokenizer: .*Error: .*max_p"):
        compare_tokenizers(tokenizer, tmp_path)


def test_a_conversation_is_compared_with_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(FOLDERS["qwen3"].write(tmp_path))
    compare_tokenizers(tokenizer, tmp_path)
    monkeypatch.setattr(JinjaTemplate, "encode_prompt", lambda *_: [1])
    with pytest.raises(UserError, match="transformers encodes the conversation"):
        compare_tokenizers(tokenizer, tmp_path)


def test_the_template_of_an_export_names_the_ids_that_end_answers(
    tmp_path: Path,
) -> None:
    tokenizer = load_tokenizer(FOLDERS["llama3"].write(tmp_path))
    (tmp_path / "hf").mkdir()
    template = (
        "{% for m in messages %}{{ m.content + '<|end_header_id|>' }}{% endfor %}"
    )
    write_tokenizer(tokenizer, tmp_path / "hf", template, 64)
    ids = special_ids(load_tokenizer(tmp_path / "hf"), None, 330)
    assert ids.eos == (tokenizer.eos_id, tokenizer.token_id("<|end_header_id|>"))


def test_templates_in_separate_files_are_exported(tmp_path: Path) -> None:
    tokenizer_path = FOLDERS["qwen3"].write(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    (tmp_path / "hf").mkdir()
    tokenizer = load_tokenizer(tokenizer_path)
    write_tokenizer(tokenizer, tmp_path / "hf", None, 64)
    assert load_tokenizer(tmp_path / "hf").templates == tokenizer.templates


def test_special_ids_without_a_row_in_the_embedding_are_refused() -> None:
    for key in ("bos_id", "pad_id"):
        section = GenerationConfig.model_validate({key: 330})
        with pytest.raises(UserError, match=f"generation.{key}: the id 330 has no row"):
            special_ids(None, section, 330)
    assert special_ids(None, GenerationConfig(pad_id=-1), 330).pad is None
