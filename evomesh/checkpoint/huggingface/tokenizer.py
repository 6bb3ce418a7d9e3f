"""Write the tokenizer's files next to exported weights, so that other systems tokenize text as in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from evomesh.checkpoint.huggingface.config import SpecialTokenIds
from evomesh.checkpoint.huggingface.folder import read_json
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.schema import GenerationConfig
from evomesh.data.chat import end_of_answer_ids
from evomesh.data.sentencepiece_model import (
    build_fast_tokenizer,
    fits_llama_tokenizer,
    read_model,
    set_leading_bos,
)
from evomesh.data.tokenizer import HfTokenizer, Tokenizer
from evomesh.storage.local import LocalStorage

BESIDE = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
TEXTS = (
    "Hello world",
    " a  b\tc\nd",
    "12345 + 6.7 = ?",
    "def f(x):\n    return x",
    "春眠不觉晓",
    "naïve café — ok",
)


def special_ids(
    tokenizer: Tokenizer | None, generation: GenerationConfig | None, vocab_size: int
) -> SpecialTokenIds:
    """Return bos, the ids that end an answer, and pad; without a tokenizer, those of the config or its defaults."""
    if tokenizer is None:
        generation = generation or GenerationConfig()
    bos = None if tokenizer is None else tokenizer.bos_id
    pad = None
    if generation is not None:
        bos = generation.bos_id if bos is None else bos
        pad = generation.pad_id
    return SpecialTokenIds(
        bos, end_of_answer_ids(tokenizer, generation, vocab_size), pad
    )


def write_tokenizer(
    tokenizer: Tokenizer, target: Path, template: str | None, max_length: int
) -> None:
    """Copy the tokenizer and the settings next to it, without remote code and references to it.

    Args:
        template: Jinja text of the chat template; None: the tokenizer's template.
    """
    fast = tokenizer.path.suffix == ".json"
    beside = tokenizer.path.parent
    model_name = "tokenizer.json" if fast else "tokenizer.model"
    shutil.copyfile(tokenizer.path, target / model_name)
    for name in BESIDE:
        if (beside / name).is_file():
            shutil.copyfile(beside / name, target / name)
    settings: dict[str, Any] = {}
    if (beside / "tokenizer_config.json").is_file():
        settings = read_json(LocalStorage(), str(beside), "tokenizer_config.json")
    if settings.pop("auto_map", None) is not None:
        settings.pop("tokenizer_class", None)
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    settings.setdefault("model_max_length", max_length)
    settings.setdefault("clean_up_tokenization_spaces", False)
    for key in ("bos_token", "eos_token"):
        if key in tokenizer.special_tokens and not settings.get(key):
            settings[key] = tokenizer.special_tokens[key]
    if not fast:
        settings |= _sentencepiece_settings(tokenizer, target, settings)
    if template is not None:
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")
        settings["chat_template"] = template
    write_json(target / "tokenizer_config.json", settings)


def _sentencepiece_settings(
    tokenizer: Tokenizer, target: Path, given: dict[str, Any]
) -> dict[str, Any]:
    """Return settings for a Llama tokenizer if it tokenizes like the model; else write a tokenizer.json and name it."""
    model = read_model(tokenizer.path)
    unknown = next(piece.piece for piece in model.pieces if piece.type == piece.UNKNOWN)
    common = {"unk_token": given.get("unk_token") or unknown}
    if isinstance(tokenizer, HfTokenizer) and tokenizer.adds_tokens:
        tokenizer.save(target / "tokenizer.json")
        return given | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if not fits_llama_tokenizer(model):
        backend = build_fast_tokenizer(model)
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            set_leading_bos(
                backend, tokenizer.special_tokens["bos_token"], tokenizer.bos_id
            )
        backend.save(str(target / "tokenizer.json"))
        return common | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return common | {
        "tokenizer_class": "LlamaTokenizer",
        "add_prefix_space": False,
        "legacy": False,
        "add_bos_token": given.get("add_bos_token", tokenizer.add_bos),
        "add_eos_token": given.get("add_eos_token", False),
    }


def compare_tokenizers(ours: Tokenizer, folder: Path) -> None:
    """Compare the ids that the training tokenizer and ``transformers`` with the exported folder give for a few texts.

    Raises:
        CheckpointError: they differ.
    """
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(
        str(folder), trust_remote_code=False, local_files_only=True
    )
    for text in TEXTS:
        wanted = ours.encode(text)
        found = list(theirs.encode(text, add_special_tokens=False))
        if wanted != found:
            raise CheckpointError(
                f"transformers tokenizes {text!r} to {found[:12]}, the training tokenizer to {wanted[:12]}",
                where=str(ours.path),
                fix="export without a tokenizer (--tokenizer none) and add one that agrees",
            )


def write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
