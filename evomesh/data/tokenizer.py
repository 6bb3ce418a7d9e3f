"""Load tokenizers: a Hugging Face ``tokenizer.json`` (or a folder with one) or a sentencepiece ``.model``.

Ids are those of ``transformers`` for the same folder. Python files in a tokenizer's
folder are never executed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from evomesh.config.user import expand_home
from evomesh.data.tokenizer_backend import build_backend
from evomesh.data.tokenizer_class import BACKEND, LLAMA, choose_class, declared_class
from evomesh.data.tokenizer_folder import TokenizerFolder, read_tokenizer_folder
from evomesh.errors import UserError
from evomesh.user_files import read_json

# Taken for bos and eos of a tokenizer.json without any file beside it.
BOS_NAMES = (
    "<s>",
    "<|begin_of_text|>",
    "<bos>",
    "[BOS]",
    "<|startoftext|>",
    "<|endoftext|>",
)
EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>")


class EncodedText(NamedTuple):
    """The ids of a text, and the span of characters that each stands for.

    Attributes:
        spans: start and end; equal for a token that adds no character, such as a byte inside one.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


class Tokenizer(Protocol):
    """A tokenizer of any library.

    Attributes:
        path: file it was loaded from.
        hash: SHA-256 of that file, and of the tokens that its folder adds; equal hashes give equal ids.
        vocab_size: all ids are less than this.
        bos_id, eos_id: None if the tokenizer has none.
        leading: the ids that the tokenizer puts in front of texts, such as bos.
        chat_template: jinja text from the tokenizer's folder, "" if there is none.
        templates: all chat templates of the folder by name; ``chat_template`` is "default".
        special_tokens: the text of each special token by its name ("bos_token").
    """

    path: Path
    hash: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    leading: Sequence[int]
    chat_template: str
    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without bos and eos; uses all cores."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without bos and eos."""
        ...

    def encode_with_spans(self, text: str) -> EncodedText:
        """Return the ids of ``encode`` and the characters that each stands for."""
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

    def is_added(self, token_id: int) -> bool:
        """Return whether an id is recognized in text by its name, as special tokens are."""
        ...


class HfTokenizer:
    """A ``tokenizers.Tokenizer`` with the added tokens, special tokens and chat templates that its folder names.

    Args:
        path: a tokenizer.json, or a sentencepiece model beside which the folder has other files.

    """

    leading: Sequence[int]
    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]

    def __init__(self, path: Path) -> None:
        folder = read_tokenizer_folder(path.parent)
        built = build_backend(path, folder)
        self._backend = built.backend
        self.path = path
        self.class_name = built.class_name
        # Of every file that has a say in the ids: a run resumes with the same ones.
        self.hash = _hash(path, folder, built.class_name)
        # Ids may have gaps, so that the number of tokens is not enough.
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        ids = vocabulary.values()
        largest_id = max(ids, default=-1)
        self.vocab_size = largest_id + 1

        self.special_tokens = built.special
        if not folder.exists:
            self.special_tokens = self._common_ends()
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.leading = built.leading
        self.templates = folder.templates
        self.chat_template = self.templates.get("default", "")

    def _common_ends(self) -> dict[str, str]:
        """Return bos and eos by the names in common use."""
        names = {}
        for name, common in (("bos_token", BOS_NAMES), ("eos_token", EOS_NAMES)):
            known = [token for token in common if self.token_id(token) is not None]
            if known:
                names[name] = known[0]
        return names

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_id(token)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [
            encoding.ids
            for encoding in self._backend.encode_batch_fast(
                texts, add_special_tokens=False
            )
        ]

    def encode(self, text: str) -> list[int]:
        # As a batch: the library's own ``encode`` keeps the interpreter to itself for
        # all of a long text, in which no other thread of a server answers.
        (ids,) = self.encode_batch([text])
        return ids

    def encode_with_spans(self, text: str) -> EncodedText:
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=False)
        return EncodedText(list(encoding.ids), list(encoding.offsets))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        token_id = self._backend.token_to_id(token)
        return None if token_id is None else int(token_id)

    def token_name(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id) or ""

    def is_added(self, token_id: int) -> bool:
        return token_id in self._backend.get_added_tokens_decoder()

    def beside_file(self) -> list[str]:
        """Return the tokens that a tokenizer.json lacks: those of the other files of its folder, and of the class."""
        from tokenizers import Tokenizer as Backend

        if self.path.suffix != ".json":
            return []
        of_file = Backend.from_file(str(self.path))
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        added = []
        for token in sorted(vocabulary, key=vocabulary.__getitem__):
            if of_file.token_to_id(token) is None:
                added.append(token)
        return added

    def save(self, path: Path) -> None:
        """Write a tokenizer.json with all tokens, those of the folder included."""
        self._backend.save(str(path))


class SentencePieceTokenizer:
    """A ``sentencepiece`` model without any file beside it; bos is not prepended."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._backend = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"not a sentencepiece model ({error})",
                where=str(path),
                code="EVO-TOKEN-002",
            ) from None
        self.path = path
        self.hash = _sha256(path)
        self.vocab_size = int(self._backend.vocab_size())
        # sentencepiece returns -1 for a token that the model does not have
        bos_id = int(self._backend.bos_id())
        eos_id = int(self._backend.eos_id())
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_id = eos_id if eos_id >= 0 else None
        ends = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        self.special_tokens: Mapping[str, str] = {
            name: self.token_name(token_id)
            for name, token_id in ends.items()
            if token_id is not None
        }
        self.leading: Sequence[int] = ()
        self.templates: Mapping[str, str] = {}
        self.chat_template = ""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._backend.encode(texts)
        return encoded

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text)
        return ids

    def encode_with_spans(self, text: str) -> EncodedText:
        from sentencepiece import sentencepiece_pb2 as records

        record = self._backend.encode(text, out_type="serialized_proto")
        encoded = records.SentencePieceText.FromString(record)  # type: ignore[attr-defined]  # made at run time
        # The library counts in bytes of UTF-8.
        character_at = _characters_at_bytes(text)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for piece in encoded.pieces:
            begin = character_at[piece.begin]
            end = character_at[piece.end]
            span = (begin, end)
            spans.append(span)
            ids.append(piece.id)
        return EncodedText(ids, spans)

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
        return (
            str(self._backend.id_to_piece(token_id))
            if 0 <= token_id < self.vocab_size
            else ""
        )

    def is_added(self, token_id: int) -> bool:
        # Control symbols are never recognized; between letters, only a user-defined
        # symbol stays one token.
        between_letters = self._backend.encode(f"a{self.token_name(token_id)}a")
        is_control = bool(self._backend.is_control(token_id))
        return not is_control and token_id in between_letters


def load_tokenizer(path: str | Path, where: str = "--tokenizer") -> Tokenizer:
    """Load the tokenizer of a file or folder.

    In a folder it is ``tokenizer.json``, else ``tokenizer.model``, else its only
    ``.model``.

    Args:
        where: the option or config key that names the path, for messages.

    Raises:
        UserError: there is no tokenizer at the path.
    """
    file = find_tokenizer_file(path, where)
    if _is_bare_model(file, read_tokenizer_folder(file.parent)):
        return SentencePieceTokenizer(file)
    return HfTokenizer(file)


def load_recorded_tokenizer(path: str, source: str) -> Tokenizer:
    """Load the tokenizer that the config of a checkpoint names.

    Args:
        path: its ``data.tokenizer_path``.
        source: the checkpoint, for messages.

    Raises:
        UserError: there is no tokenizer at the path.
    """
    try:
        return load_tokenizer(path, f"data.tokenizer_path in the config of {source}")
    except UserError as refusal:
        if refusal.code != "EVO-TOKEN-001":
            raise
        raise UserError(
            absent_recorded_tokenizer(path),
            where=refusal.where,
            expected=refusal.expected,
            fix="give one with --tokenizer PATH",
            code="EVO-TOKEN-001",
        ) from None


def absent_recorded_tokenizer(path: str) -> str:
    """Return that there is no tokenizer where the config of a checkpoint names one; a run may start in any folder."""
    found = f"no tokenizer at {path}"
    if not expand_home(path).is_absolute():
        found += f" in {Path.cwd()}: the path is relative to where the run was started"
    return found


def read_tokenizer_hash(path: str | Path, where: str = "--tokenizer") -> str:
    """Return the ``hash`` that ``load_tokenizer`` would give the tokenizer; only its files are read.

    Args:
        where: the option or key that names the tokenizer, for messages.

    Raises:
        UserError: there is no tokenizer at the path, or it is of a class that cannot be read.
    """
    file = find_tokenizer_file(path, where)
    folder = read_tokenizer_folder(file.parent)
    if _is_bare_model(file, folder):
        return _sha256(file)
    settings = folder.settings
    model_config = folder.model_config
    record = None
    if file.suffix == ".json":
        # Large vocabularies take long to parse, and few folders need it.
        needs_content = declared_class(settings, model_config) == LLAMA
        record = read_json(file) if needs_content else {}
    class_name = choose_class(settings, model_config, record, str(folder.path))
    return _hash(file, folder, class_name)


def _is_bare_model(file: Path, folder: TokenizerFolder) -> bool:
    """Return whether a tokenizer is a sentencepiece model without any file beside it."""
    return file.suffix != ".json" and not folder.exists


def find_tokenizer_file(path: str | Path, where: str = "--tokenizer") -> Path:
    """Return the file that ``load_tokenizer`` reads.

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
            code="EVO-TOKEN-001",
        )
    return file


def _find_tokenizer(folder: Path, where: str) -> Path:
    candidates = [folder / "tokenizer.json", folder / "tokenizer.model"]
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        candidates += models
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    listing = (
        ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    )
    raise UserError(
        f"no tokenizer in {folder} (it contains: {listing})",
        where=where,
        expected="tokenizer.json or tokenizer.model",
        code="EVO-TOKEN-001",
    )


def check_tokenizer_fits(tokenizer: Tokenizer, vocab_size: int, fix: str = "") -> None:
    """Refuse a tokenizer with ids that a model of ``vocab_size`` embedding rows does not know.

    Args:
        fix: how another one is given, for the message.

    Raises:
        UserError: the tokenizer has more ids than the embedding has rows.
    """
    if tokenizer.vocab_size > vocab_size:
        found = f"the tokenizer has {tokenizer.vocab_size} ids, the embedding {vocab_size} rows"
        raise UserError(
            found + _words_on_ids_beside_file(tokenizer),
            where=str(tokenizer.path),
            expected="the tokenizer the model was trained with",
            fix=fix,
            code="EVO-TOKEN-004",
        )


def _words_on_ids_beside_file(tokenizer: Tokenizer) -> str:
    """Return which of the ids are not in the file of a tokenizer; "" if all are."""
    added = tokenizer.beside_file() if isinstance(tokenizer, HfTokenizer) else []
    if not added:
        return ""
    assert isinstance(tokenizer, HfTokenizer)
    names = ", ".join(map(repr, added[:5])) + ", ..." * (len(added) > 5)
    return (
        f"; not in the file itself: {names}, from the class {tokenizer.class_name}, with which transformers loads "
        "the folder, or from the folder's other files"
    )


def check_embedded(token: int, vocab_size: int, name: str) -> None:
    """Refuse a special token's id that has no row in the embedding.

    Args:
        name: what names the id, for the message.

    Raises:
        UserError: it has none.
    """
    if not 0 <= token < vocab_size:
        raise UserError(
            f"the id {token} has no row in the embedding, which has {vocab_size}",
            where=name,
            expected=f"ids from 0 to {vocab_size - 1}",
            fix="name a token of the vocabulary, or train with a larger model.vocab_size",
            code="EVO-TOKEN-004",
        )


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text to complete, after the bos that the tokenizer puts in front of texts."""
    return [*tokenizer.leading, *tokenizer.encode(text)]


def _characters_at_bytes(text: str) -> list[int]:
    """Return the number of the character at each byte of UTF-8, and at the end.

    Of "é!", whose characters have two bytes and one: 0, 1, 1, 2.
    """
    character_at = [0]
    for number, character in enumerate(text, 1):
        size = len(character.encode())
        character_at += [number] * size
    return character_at


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hash(path: Path, folder: TokenizerFolder, class_name: str) -> str:
    """Return a hash of all that determines the ids; that of the file if the folder adds nothing to it."""
    named = [token for token in folder.named.values() if token is not None]
    splits = bool(folder.settings.get("split_special_tokens"))
    # Data that was made with the bare file stays valid for a folder that adds nothing
    # to it.
    as_it_is = path.suffix == ".json" and class_name == BACKEND and not splits
    if as_it_is and not (folder.added or folder.extra or named):
        return _sha256(path)
    settings = [folder.settings.get(key) for key in ("legacy", "add_prefix_space")]
    facts = [
        _sha256(path),
        class_name,
        folder.added,
        named,
        folder.extra,
        settings,
        splits,
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
