"""Tokenizers: a Hugging Face ``tokenizer.json`` (or a folder with one) or a sentencepiece ``.model``.

A folder's Python files are never run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from evomesh.errors import UserError

BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>")


class Tokenizer(Protocol):
    """Text to ids and back, whatever library does it.

    Attributes:
        path: file it was loaded from.
        hash: SHA-256 of that file: equal hashes give equal ids.
        vocab_size: ids are below this.
        bos_id, eos_id: None when the tokenizer has none.
        add_bos: whether the tokenizer itself says that texts begin with bos.
        chat_template: jinja text of the tokenizer's folder, "" when it has none.
    """

    path: Path
    hash: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    chat_template: str

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without bos and eos, on all cores."""
        ...

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_id(self, token: str) -> int | None:
        """Id of a special or ordinary token by its exact name."""
        ...


class HfTokenizer:
    """``tokenizers.Tokenizer`` with the bos, eos and chat template that the files beside it name."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"not a tokenizer.json ({error})", where=str(path)) from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self.path, self.hash = path, _hash(path)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        settings = _read_json(path.parent / "special_tokens_map.json") | _read_json(
            path.parent / "tokenizer_config.json"
        )
        self.bos_id = self._special(settings.get("bos_token"), BOS_NAMES)
        self.eos_id = self._special(settings.get("eos_token"), EOS_NAMES)
        first = self._backend.encode("", add_special_tokens=True).ids[:1]
        self.add_bos = bool(settings.get("add_bos_token", self.bos_id is not None and first == [self.bos_id]))
        self.chat_template = _chat_template(path.parent, settings)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def _special(self, named: Any, candidates: Sequence[str]) -> int | None:
        name = named.get("content") if isinstance(named, dict) else named
        for candidate in [name] if name else candidates:
            if (found := self.token_id(candidate)) is not None:
                return found
        return None


class SentencePieceTokenizer:
    """``sentencepiece`` model; bos is added only where a tokenizer_config.json beside it says so."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._backend = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"not a sentencepiece model ({error})", where=str(path)) from None
        self.path, self.hash = path, _hash(path)
        self.vocab_size = int(self._backend.vocab_size())
        settings = _read_json(path.parent / "tokenizer_config.json")
        bos, eos = int(self._backend.bos_id()), int(self._backend.eos_id())
        self.bos_id, self.eos_id = (bos if bos >= 0 else None), (eos if eos >= 0 else None)
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
        found = int(self._backend.piece_to_id(token))
        return (
            None
            if found == int(self._backend.unk_id()) and token != self._backend.id_to_piece(found)
            else found
        )


def load_tokenizer(path: str | Path, where: str = "--tokenizer") -> Tokenizer:
    """The tokenizer of a file, or of a folder: ``tokenizer.json``, else ``tokenizer.model``, else its one ``.model``.

    Raises:
        UserError: nothing there that is a tokenizer.
    """
    found = Path(path).expanduser()
    if found.is_dir():
        models = sorted(found.glob("*.model"))
        named = [found / "tokenizer.json", found / "tokenizer.model", *(models if len(models) == 1 else [])]
        file = next((candidate for candidate in named if candidate.is_file()), None)
        if file is None:
            listing = ", ".join(sorted(entry.name for entry in found.iterdir())[:8]) or "nothing"
            raise UserError(
                f"no tokenizer in {found} (it holds: {listing})",
                where=where,
                expected="tokenizer.json or tokenizer.model",
            )
        found = file
    if not found.is_file():
        raise UserError(
            f"no tokenizer at {found}",
            where=where,
            expected="a tokenizer.json, a sentencepiece .model, or their folder",
        )
    return HfTokenizer(found) if found.suffix == ".json" else SentencePieceTokenizer(found)


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


def _hash(path: Path) -> str:
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
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template", "") for entry in template}
        template = named.get("default", "")
    return str(template)
