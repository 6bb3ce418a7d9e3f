"""The built-in template that data was tokenized with: in chats with the run's model, and in its exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from tokenizers import Tokenizer as Backend
from typer.testing import CliRunner

from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.restore import load_model
from evomesh.cli.app import app
from evomesh.config.data import ChatTemplateName
from evomesh.data.chat import build_template, choose_template, portable_source
from evomesh.data.chat_message import ChatMessage
from evomesh.data.chat_styles import STYLES
from evomesh.data.folder_template import JinjaTemplate
from evomesh.data.instruction_styles import INSTRUCTION_STYLES
from evomesh.data.style_template import StyleTemplate
from evomesh.data.tokenizer import load_tokenizer
from tests.support.covers import covers
from tests.support.serving import VOCAB, byte_tokenizer
from tests.unit.checkpoint.huggingface.hf_models import export, model_config, save_model

INTERNLM2_MARKS = ["[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"]
TALK = [
    ChatMessage("system", "be kind", False),
    ChatMessage("user", "hello", False),
    ChatMessage("assistant", "yes", True),
]


def plain_tokenizer(folder: Path, marks: list[str]) -> Path:
    """Write a tokenizer of bytes and marks, without a template."""
    byte_tokenizer(folder, "")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<s>", "</s>", *marks])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_the_key_takes_the_names_of_the_styles() -> None:
    names = (*STYLES, *INSTRUCTION_STYLES)
    assert get_args(ChatTemplateName) == names


@covers("data.chat_template")
def test_auto_is_the_datas_template_where_the_tokenizer_has_none(
    tmp_path: Path,
) -> None:
    plain = load_tokenizer(plain_tokenizer(tmp_path / "plain", INTERNLM2_MARKS))
    assert choose_template("auto", plain) is None
    assert choose_template("none", plain, "chatml") is None
    chosen = choose_template("auto", plain, "chatml")
    assert isinstance(chosen, StyleTemplate) and chosen.style is STYLES["chatml"]
    # The tokenizer's own comes first.
    settings = json.loads((tmp_path / "plain/tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "plain/tokenizer_config.json").write_text(json.dumps(settings))
    own = load_tokenizer(tmp_path / "plain")
    assert isinstance(choose_template("auto", own, "chatml"), JinjaTemplate)


@pytest.mark.parametrize(
    "marks",
    [["<|im_start|>", "<|im_end|>"], INTERNLM2_MARKS],
    ids=["chatml", "internlm2"],
)
def test_an_export_chats_as_the_data_was_written(
    marks: list[str], tmp_path: Path
) -> None:
    folder = plain_tokenizer(tmp_path / "tok", marks)
    config = model_config("INTERNLM2_PUBLIC", vocab_size=VOCAB + 8)
    ckpts = tmp_path / "ckpts"
    _, found = save_model(ckpts, config, str(folder), chat_template="chatml")
    out = export(found, tmp_path / "hf", ExportOptions(), lambda line: None)
    written = load_tokenizer(out)
    ours = build_template("chatml", load_tokenizer(folder))
    theirs = build_template("tokenizer", written)
    # Their signs are of training only.
    assert [*map(abs, theirs.encode(TALK))] == [*map(abs, ours.encode(TALK))]
    assert theirs.encode_prompt(TALK[:2]) == ours.encode_prompt(TALK[:2])
    # An answer ends with the mark, in the run and in the folder.
    (end,) = ours.eos_ids
    generation = json.loads((Path(out) / "generation_config.json").read_text())
    assert end in generation["eos_token_id"]
    assert end in load_model(str(tmp_path / "ckpts"), template="auto").eos_ids
    for ckpt in ("ckpts", "hf"):
        command = ["generate", "--ckpt", str(tmp_path / ckpt), "--prompt", "hello", "--chat"]  # fmt: skip
        result = CliRunner().invoke(
            app, [*command, "--max-new-tokens", "2", "--device", "cpu"]
        )
        assert result.exit_code == 0, result.exception


def test_generate_takes_a_template_by_name(tmp_path: Path) -> None:
    folder = plain_tokenizer(tmp_path / "tok", ["<|im_start|>", "<|im_end|>"])
    config = model_config("INTERNLM2_PUBLIC", vocab_size=VOCAB + 8)
    save_model(tmp_path / "ckpts", config, str(folder))
    command = ["generate", "--ckpt", str(tmp_path / "ckpts"), "--prompt", "hi", "--chat"]  # fmt: skip
    refused = CliRunner().invoke(app, command)
    assert "--chat-template chatml" in str(refused.exception)
    named = CliRunner().invoke(
        app, [*command, "--chat-template", "chatml", "--max-new-tokens", "2"]
    )
    assert named.exit_code == 0, named.exception


def test_a_style_without_a_jinja_form_is_not_exported(tmp_path: Path) -> None:
    folder = plain_tokenizer(tmp_path / "tok", ["<eoh>", "<eoa>"])
    assert portable_source("internlm", load_tokenizer(folder)) is None
