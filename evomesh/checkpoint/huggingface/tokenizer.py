"""Write the tokenizer's files next to exported weights.

Other systems then tokenize text as in training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from evomesh.checkpoint.huggingface.config import SpecialTokenIds
from evomesh.checkpoint.huggingface.folder import read_json
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.schema import GenerationConfig
from evomesh.data.chat import end_of_answer_ids
from evomesh.data.chat_message import ChatMessage
from evomesh.data.folder_template import JinjaTemplate
from evomesh.data.sentencepiece_model import (
    build_fast_tokenizer,
    fits_llama_tokenizer,
    read_model,
)
from evomesh.data.tokenizer import (
    HfTokenizer,
    Tokenizer,
    check_embedded,
    load_tokenizer,
)
from evomesh.errors import UserError
from evomesh.storage.local import LocalStorage

BESIDE = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
NAMED_TEMPLATES = "additional_chat_templates"
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
    """Return bos, the ids that end an answer, and pad; without a tokenizer, those of the config or its defaults.

    A negative pad id stands for none, as in the config.json of the first Llama models.

    Raises:
        UserError: an id has no row in the embedding.
    """
    if tokenizer is None:
        generation = generation or GenerationConfig()
    bos = None if tokenizer is None else tokenizer.bos_id
    pad = None
    if generation is not None:
        bos = generation.bos_id if bos is None else bos
        pad = generation.pad_id
    if pad is not None and pad < 0:
        pad = None
    for name, token in (("generation.bos_id", bos), ("generation.pad_id", pad)):
        if token is not None:
            check_embedded(token, vocab_size, name)
    return SpecialTokenIds(
        bos, end_of_answer_ids(tokenizer, generation, vocab_size), pad
    )


def write_tokenizer(
    tokenizer: Tokenizer, target: Path, template: str | None, max_length: int
) -> None:
    """Copy the tokenizer and the settings next to it, without remote code.

    References to remote code are left out too.

    Args:
        template: Jinja text of the chat template; None: the tokenizer's template.
    """
    fast = tokenizer.path.suffix == ".json"
    model_name = "tokenizer.json" if fast else "tokenizer.model"
    shutil.copyfile(tokenizer.path, target / model_name)
    _copy_files_beside(tokenizer.path.parent, target)
    settings = _copied_settings(tokenizer)
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    settings.setdefault("model_max_length", max_length)
    # The default of older transformers, True, removes the space of " ." in decoded text.
    settings.setdefault("clean_up_tokenization_spaces", False)
    if not fast:
        settings |= _sentencepiece_settings(tokenizer, target, settings)
    if template is not None:
        # Older readers look for it in the settings only.
        template_file = target / "chat_template.jinja"
        template_file.write_text(template, encoding="utf-8")
        settings["chat_template"] = template
    write_json(target / "tokenizer_config.json", settings)


def _copy_files_beside(source: Path, target: Path) -> None:
    for name in BESIDE:
        file = source / name
        if file.is_file():
            shutil.copyfile(file, target / name)
    templates = source / NAMED_TEMPLATES
    if templates.is_dir():
        shutil.copytree(templates, target / NAMED_TEMPLATES)


def _copied_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings beside a tokenizer that an export keeps."""
    name = "tokenizer_config.json"
    folder = tokenizer.path.parent
    settings = {}
    if (folder / name).is_file():
        settings = read_json(LocalStorage(), str(folder), name)
    # ``auto_map`` names a Python file of the folder, and the class is one of that file.
    if settings.pop("auto_map", None) is not None:
        settings.pop("tokenizer_class", None)
    for key in ("bos_token", "eos_token"):
        token = tokenizer.special_tokens.get(key)
        if token is not None and not settings.get(key):
            settings[key] = token
    return settings


def _sentencepiece_settings(
    tokenizer: Tokenizer, target: Path, given: dict[str, Any]
) -> dict[str, Any]:
    """Return settings for a Llama tokenizer if it tokenizes like the model; else write a tokenizer.json and name it."""
    model = read_model(tokenizer.path)
    unknown = next(piece.piece for piece in model.pieces if piece.type == piece.UNKNOWN)
    common = {"unk_token": given.get("unk_token") or unknown}
    if isinstance(tokenizer, HfTokenizer):
        tokenizer.save(target / "tokenizer.json")
        return given | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if not fits_llama_tokenizer(model):
        build_fast_tokenizer(model).save(str(target / "tokenizer.json"))
        return common | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return common | {
        "tokenizer_class": "LlamaTokenizer",
        "add_prefix_space": False,
        "legacy": False,
        "add_bos_token": given.get("add_bos_token", False),
        "add_eos_token": given.get("add_eos_token", False),
    }


def compare_tokenizers(ours: Tokenizer, folder: Path) -> None:
    """Compare the ids that the training tokenizer and ``transformers`` with the exported folder give.

    A few texts are compared, and a conversation in the folder's own chat template.

    Raises:
        CheckpointError: they differ, or ``transformers`` gives a token an id that the training tokenizer lacks.
    """
    theirs = _load_with_transformers(folder)
    for text in TEXTS:
        wanted = ours.encode(text)
        found = list(theirs.encode(text, add_special_tokens=False))
        if wanted != found:
            raise CheckpointError(
                f"transformers tokenizes {text!r} to {found[:12]}, the training tokenizer to {wanted[:12]}",
                where=str(ours.path),
                fix="export without a tokenizer (--tokenizer none) and add one that agrees",
                code="EVO-HF-006",
            )

    # The largest id of all must be one that the model was trained with.
    known = theirs.get_vocab()
    last_token = max(known, key=known.__getitem__)
    if known[last_token] >= ours.vocab_size:
        raise CheckpointError(
            f"transformers gives the token {last_token!r} the id {known[last_token]}",
            where=str(folder),
            expected=f"ids below {ours.vocab_size}, as in training",
            fix="name it in added_tokens_decoder of tokenizer_config.json with the id that it has",
            code="EVO-HF-006",
        )
    _compare_chats(load_tokenizer(folder), theirs, folder)


def _load_with_transformers(folder: Path) -> Any:
    """Return the tokenizer that ``transformers`` loads from a folder.

    Raises:
        CheckpointError: it cannot.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except MemoryError:
        raise
    except Exception as error:  # whatever it raises says something about the folder
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"transformers cannot load the tokenizer: {type(error).__name__}: {reason}",
            where=str(folder),
            fix="export without a tokenizer (--tokenizer none)",
            code="EVO-HF-006",
        ) from None


def _compare_chats(ours: Tokenizer, theirs: Any, folder: Path) -> None:
    """Compare the ids of a conversation in the folder's template, and of a prompt.

    Raises:
        CheckpointError: they differ.
    """
    if not ours.chat_template:
        return
    template = JinjaTemplate(ours)
    question = {"role": "user", "content": f"{TEXTS[0]}\n{TEXTS[4]}"}
    answer = {"role": "assistant", "content": TEXTS[3]}
    conversations: list[list[dict[str, str]]] = [[question], [question, answer]]
    for turns in conversations:
        is_prompt = turns[-1] is question
        wanted = _rendered_ids(template, turns, is_prompt)
        try:
            found = theirs.apply_chat_template(
                turns, add_generation_prompt=is_prompt, return_dict=True
            )["input_ids"]
        except TemplateError:
            found = None
        if wanted != found:
            raise CheckpointError(
                f"transformers encodes the conversation {turns} as {found}, evomesh as {wanted}",
                where=str(folder),
                fix="give another template with --chat-template, or export without a tokenizer (--tokenizer none)",
                code="EVO-HF-006",
            )


def _rendered_ids(
    template: JinjaTemplate, turns: Sequence[dict[str, str]], is_prompt: bool
) -> list[int] | None:
    """Return the ids of a conversation, all positive; None if the template rejects it."""
    messages = [ChatMessage(turn["role"], turn["content"], False) for turn in turns]
    try:
        if is_prompt:
            return template.encode_prompt(messages)
        return [abs(token) for token in template.encode(messages)]
    except UserError:
        return None


def write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
