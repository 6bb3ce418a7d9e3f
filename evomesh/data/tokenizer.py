"""Load tokenizers: a Hugging Face ``tokenizer.json`` (or a folder with one) or a sentencepiece ``.model``.

Python files in a tokenizer's folder are never executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from evomesh.config.user import expand_home
from evomesh.errors import UserError

BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>")


class Tokenizer(Protocol):
    """A tokenizer of any library.

    Attributes:
        path: file it was loaded from.
        hash: SHA-256 of that file; equal hashes give equal ids.
        vocab_size: all ids are less than this.
        bos_id, eos_id: None if the tokenizer has none.
        add_bos: whether the tokenizer's config puts bos at the start of texts.
        chat_template: jinja text from the tokenizer's folder, "" if there is none.
    """

    path: Path
    hash: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    chat_template: str

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without bos and eos; uses all cores."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without bos and eos."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        ...

    def token_id(self, token: str) -> int | None:
        """Return the id of a special or ordinary token by its exact name, or None."""
        ...

    def token_name(self, token_id: int) -> str:
        """Return the exact name of a token, "" for an id without a token; the inverse of ``token_id``."""
        ...


class HfTokenizer:
    """A ``tokenizers.Tokenizer`` with the bos, eos and chat template that the files beside it define."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"not a tokenizer.json ({error})", where=str(path)) from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self.path = path
        self.hash = _sha256(path)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        special_tokens = _read_json(path.parent / "special_tokens_map.json")
        settings = special_tokens | _read_json(path.parent / "tokenizer_config.json")
        self.bos_id = self._special_id(settings.get("bos_token"), BOS_NAMES)
        self.eos_id = self._special_id(settings.get("eos_token"), EOS_NAMES)
        # Without an explicit setting, encode an empty text and see whether it starts with bos.
        first = self._backend.encode("", add_special_tokens=True).ids[:1]
        starts_with_bos = self.bos_id is not None and first == [self.bos_id]
        self.add_bos = bool(settings.get("add_bos_token", starts_with_bos))
        self.chat_template = _chat_template(path.parent, settings)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        token_id = self._backend.token_to_id(token)
        return None if token_id is None else int(token_id)

    def token_name(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id) or ""

    def _special_id(self, setting: Any, common_names: Sequence[str]) -> int | None:
        """Return the id of the token that a setting names; without a setting, of the first common name that exists."""
        name = setting.get("content") if isinstance(setting, dict) else setting
        for candidate in [name] if name else common_names:
            token_id = self.token_id(candidate)
            if token_id is not None:
                return token_id
        return None


class SentencePieceTokenizer:
    """A ``sentencepiece`` model; bos is prepended only if a tokenizer_config.json beside it enables it."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._backend = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"not a sentencepiece model ({error})", where=str(path)) from None
        self.path = path
        self.hash = _sha256(path)
        self.vocab_size = int(self._backend.vocab_size())
        settings = _read_json(path.parent / "tokenizer_config.json")
        # sentencepiece returns -1 for a token that the model does not have
        bos_id = int(self._backend.bos_id())
        eos_id = int(self._backend.eos_id())
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_id = eos_id if eos_id >= 0 else None
        self.add_bos = bool(settings.get("add_bos_token", False))
        self.chat_template = _chat_template(path.parent, settings)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._backend.encode(texts)
        return encoded

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode([int(token) for token in ids]))

    def token_id(self, token: str) -> int | None:
        token_id = int(self._backend.piece_to_id(token))
        # Unknown names get the id of the unknown token.
        is_unknown = token_id == int(self._backend.unk_id())
        if is_unknown and token != self._backend.id_to_piece(token_id):
            return None
        return token_id

    def token_name(self, token_id: int) -> str:
        return str(self._backend.id_to_piece(token_id)) if 0 <= token_id < self.vocab_size else ""


def load_tokenizer(path: str | Path, where: str = "--tokenizer") -> Tokenizer:
    """Load the tokenizer of a file or folder.

    In a folder it is ``tokenizer.json``, else ``tokenizer.model``, else its only ``.model``.

    Args:
        where: the option or config key that names the path, for messages.

    Raises:
        UserError: there is no tokenizer at the path.
    """
    file = expand_home(path)
    if file.is_dir():
        file = _find_tokenizer(file, where)
    if not file.is_file():
        raise UserError(
            f"no tokenizer at {file}",
            where=where,
            expected="a tokenizer.json, a sentencepiece .model, or a folder with one of them",
        )
    return HfTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)


def _find_tokenizer(folder: Path, where: str) -> Path:
    candidates = [folder / "tokenizer.json", folder / "tokenizer.model"]
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        candidates += models
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    listing = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"no tokenizer in {folder} (it contains: {listing})",
        where=where,
        expected="tokenizer.json or tokenizer.model",
    )


def check_tokenizer_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer with ids that a model of ``vocab_size`` embedding rows does not know.

    Raises:
        UserError: the tokenizer has more ids than the embedding has rows.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the embedding {vocab_size} rows",
            where=str(tokenizer.path),
            expected="the tokenizer the model was trained with",
        )


def leading_bos(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the tokenizer puts in front of a text: [bos], or nothing."""
    return [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text to complete, after the bos that the tokenizer puts in front of texts."""
    return leading_bos(tokenizer) + tokenizer.encode(text)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"not JSON ({error})", where=str(path)) from None
    return record if isinstance(record, dict) else {}


def _chat_template(folder: Path, settings: dict[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template") or ""
    if isinstance(template, list):  # several named templates
        named = {entry.get("name"): entry.get("template", "") for entry in template}
        template = named.get("default", "")
    return str(template)
