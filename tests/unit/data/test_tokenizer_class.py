"""Every tokenizer class that a folder may name: ids are those of ``transformers``, or the folder is refused."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from evomesh.data.chat_message import ChatMessage
from evomesh.data.folder_template import JinjaTemplate
from evomesh.data.tokenizer import (
    check_tokenizer_fits,
    encode_prompt,
    load_tokenizer,
    read_tokenizer_hash,
)
from evomesh.data.tokenizer_class import (
    BACKEND,
    CLASSES,
    FAMILIES,
    OF_PIECES,
    UNREAD,
    WRONGLY_NAMED,
)
from evomesh.errors import UserError
from tests.support.chat_folders import added, byte_level, sentencepiece

TEXTS = (
    "the cat sat",
    " a  b\n\n\t12345 it's",
    "x</s> y<|im_end|> <s>z<img>",
    "春眠 e\u0301 \u00e9🙂 ﬁ",
    "",
    "  ",
    "<|im_start|> [INST]\r\n<|endoftext|>",
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ image_token }}{{ eos_token }}"
)
MARKS = ["<|im_start|>", "<|im_end|>"]
ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FILES: dict[str, Callable[[Path], None]] = {
    "bytes": lambda path: byte_level(path, ["<unk>", "<s>", "</s>"]),
    "bytes with bos": lambda path: byte_level(path, ["<unk>", "<s>", "</s>"], bos="<s>"),
    "model with prefix": lambda path: sentencepiece(path, [], prefix=True),
    "model with symbols": lambda path: sentencepiece(path, ["<img>"], prefix=False),
}  # fmt: skip
OF_BYTES = [name for name, rules in CLASSES.items() if rules.treatment not in OF_PIECES]
NEXT_ID = 330  # of the files' vocabularies
# Files beside the tokenizer, by name; of tokenizer_config.json without class and template.
CONTENTS: dict[str, dict[str, Any]] = {
    "no names": {},
    "names": {"tokenizer_config.json": ENDS},
    "nulls": {"tokenizer_config.json": {"bos_token": None, "eos_token": None}},
    "new names": {"tokenizer_config.json": {"bos_token": "<|start|>", "eos_token": "<|im_end|>"}},
    "flags": {
        "tokenizer_config.json": ENDS
        | {"add_bos_token": True, "legacy": True, "add_prefix_space": True}
    },
    "no prefix": {"tokenizer_config.json": ENDS | {"add_bos_token": False, "add_prefix_space": False}},
    "additional": {"tokenizer_config.json": ENDS | {"additional_special_tokens": MARKS}},
    "named extra": {
        "tokenizer_config.json": ENDS
        | {"extra_special_tokens": {"image_token": "<img>"}, "additional_special_tokens": MARKS}
    },
    "split": {"tokenizer_config.json": ENDS | {"split_special_tokens": True}},
    "decoder": {
        "tokenizer_config.json": ENDS
        | {
            "added_tokens_decoder": {
                str(NEXT_ID + 1): added("<|im_end|>", special=False, rstrip=True),
                str(NEXT_ID): added("<|im_start|>", lstrip=True),
            }
        }
    },
    "older files": {
        "added_tokens.json": {"<|im_end|>": NEXT_ID + 1, "<|im_start|>": NEXT_ID},
        "special_tokens_map.json": {
            "eos_token": added("<|im_end|>", rstrip=True),
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        },
    },
    "of a family": {"config.json": {"model_type": "qwen2"}, "tokenizer_config.json": ENDS},
    "of mistral": {"config.json": {"model_type": "mistral"}, "tokenizer_config.json": ENDS},
}  # fmt: skip


@functools.cache  # trained once for all classes and contents
def trained_files(kind: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        FILES[kind](Path(folder))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def write_folder(path: Path, kind: str, class_name: str, contents: str) -> Path:
    for name, data in trained_files(kind).items():
        (path / name).write_bytes(data)
    files = {"tokenizer_config.json": {}} | CONTENTS[contents]
    settings = files["tokenizer_config.json"] | {"chat_template": TEMPLATE}
    if class_name:
        settings["tokenizer_class"] = class_name
    for name, content in (files | {"tokenizer_config.json": settings}).items():
        (path / name).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("class_name", ["", "PreTrainedTokenizerFast", *CLASSES])
@pytest.mark.parametrize("kind", FILES)
def test_texts_tokens_and_conversations_of_transformers(
    kind: str, class_name: str, tmp_path: Path
) -> None:
    is_model = kind.startswith("model")
    turns = [
        {"role": "user", "content": "the </s> cat <s>"},
        {"role": "assistant", "content": " e\u0301<|im_end|>12 "},
    ]
    for contents in CONTENTS:
        folder = tmp_path / contents.replace(" ", "-")
        folder.mkdir()
        write_folder(folder, kind, class_name, contents)
        # Qwen's own class replaces what its folders name, Mistral's family has none.
        is_of_bytes = class_name in OF_BYTES and contents != "of mistral"
        if is_model and (is_of_bytes or contents == "of a family"):
            with pytest.raises(UserError, match="its file is a sentencepiece model"):
                load_tokenizer(folder)
            continue
        theirs = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True
        )
        ours = load_tokenizer(folder)
        assert read_tokenizer_hash(folder) == ours.hash, contents
        for text in TEXTS:
            wanted = theirs.encode(text, add_special_tokens=False)
            assert ours.encode(text) == wanted, (contents, text)
            assert encode_prompt(ours, text) == theirs.encode(text), (contents, text)
        assert dict(ours.special_tokens) == theirs.special_tokens_map, contents
        assert ours.vocab_size == max(theirs.get_vocab().values()) + 1, contents
        ids = theirs.encode("the cat</s> sat")
        assert ours.decode(ids) == theirs.decode(ids), contents
        wanted = theirs.apply_chat_template(turns, return_dict=True)["input_ids"]
        messages = [ChatMessage(turn["role"], turn["content"], False) for turn in turns]
        found = JinjaTemplate(ours).encode(messages)
        assert [abs(token) for token in found] == wanted, contents


def test_a_class_that_is_not_known_here_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, "bytes", "XLMRobertaTokenizerFast", "names")
    with pytest.raises(UserError, match="is a XLMRobertaTokenizer, whose ids"):
        load_tokenizer(tmp_path)


def test_ids_that_the_file_lacks_are_explained(tmp_path: Path) -> None:
    write_folder(tmp_path, "bytes", "Qwen2Tokenizer", "no names")
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    num_ids = max(file["model"]["vocab"].values()) + 1
    ours = load_tokenizer(tmp_path)
    with pytest.raises(UserError) as refusal:
        check_tokenizer_fits(ours, num_ids, "take another")
    words = (
        f"has {num_ids + 1} ids, the embedding {num_ids} rows; not in the file itself: "
    )
    assert f"{words}'<|endoftext|>', from the class Qwen2Tokenizer" in str(
        refusal.value
    )
    assert "fix: take another" in str(refusal.value)
    # Of a file alone, nothing else adds any.
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"embedding 9 rows\n"):
        check_tokenizer_fits(load_tokenizer(tmp_path), 9)


def test_a_name_that_no_library_knows_takes_the_file_as_it_is(tmp_path: Path) -> None:
    write_folder(tmp_path, "bytes", "SomethingTokenizer", "names")
    theirs = transformers.AutoTokenizer.from_pretrained(
        str(tmp_path), local_files_only=True
    )
    assert load_tokenizer(tmp_path).encode(TEXTS[1]) == theirs.encode(TEXTS[1])


def test_the_tables_are_those_of_transformers() -> None:
    """A class of the library that is in no table would be taken for one that uses the file as it is."""
    from transformers.models.auto import tokenization_auto

    registered = {
        name for name in tokenization_auto.TOKENIZER_MAPPING_NAMES.values() if name
    }
    known = {name.removesuffix("Fast") for name in registered}
    assert known - set(CLASSES) - UNREAD - {"MistralCommonBackend"} == set()
    for family, class_name in FAMILIES.items():
        wanted = [class_name] if class_name else [BACKEND, "MistralCommonBackend"]
        assert tokenization_auto.TOKENIZER_MAPPING_NAMES[family] in wanted
    wrong = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    assert set(FAMILIES) & wrong == WRONGLY_NAMED
