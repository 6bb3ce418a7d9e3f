"""Build the ``tokenizers.Tokenizer`` of a folder, with the ids that ``transformers`` gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evomesh import user_files
from evomesh.data.sentencepiece_model import (
    SPACE,
    merges_by_id,
    read_model,
    set_leading_bos,
)
from evomesh.data.tokenizer_class import BACKEND, CLASSES, ClassRules, choose_class
from evomesh.data.tokenizer_folder import SPECIAL_NAMES, AddedTokenSpec, TokenizerFolder
from evomesh.errors import UserError

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LINES_AND_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# How Qwen's tokenizers split text: contractions, words, single digits, signs, line ends.
SPLITS = {
    "qwen2": rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{LINES_AND_SPACES}",
    "qwen3_5": rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{LINES_AND_SPACES}",
}


class Pieces(NamedTuple):
    """Pieces and merges of a file, for a class that builds its tokenizer from these.

    Attributes:
        vocabulary: ids by piece.
        merges: pairs, the earliest first.
        post_processor: what the file puts around texts; None for a sentencepiece model.
    """

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]
    post_processor: Any = None


@dataclass
class Draft:
    """A tokenizer before the tokens of its folder are added.

    Attributes:
        backend: a ``tokenizers.Tokenizer``.
        class_name: the class that ``transformers`` loads the folder with.
        added: tokens to add, by id.
        extra: special tokens to add that have neither id nor name.
        tokens: special tokens by name where the folder does not name them.
    """

    backend: Any
    class_name: str
    added: dict[int, AddedTokenSpec]
    extra: list[AddedTokenSpec]
    tokens: dict[str, str]


@dataclass(frozen=True)
class FolderBackend:
    """A tokenizer with all tokens of its folder.

    Attributes:
        backend: a ``tokenizers.Tokenizer``.
        special: the text of each special token by its name ("bos_token").
        class_name: the class that ``transformers`` loads the folder with.
        leading: the ids that are prepended to texts.
    """

    backend: Any
    special: dict[str, str]
    class_name: str
    leading: list[int]


def build_backend(path: Path, folder: TokenizerFolder) -> FolderBackend:
    """Build the tokenizer of a tokenizer.json or a sentencepiece model, and of the files beside it.

    Raises:
        UserError: the file is neither, or the folder contradicts it.
    """
    is_json = path.suffix == ".json"
    if is_json:
        draft = _draft_json(path, folder)
    else:
        draft = _draft_model(path, folder)
    backend = draft.backend

    # Tokens that the folder adds: those with ids first, then those with names.
    named = _specs(draft.tokens | folder.named)
    without_id = [*named.values(), *draft.extra]
    _add_tokens(backend, draft.added, folder)
    _add_missing(backend, without_id)
    if draft.class_name == "Qwen2Tokenizer":
        # The class adds them once more, without flags for the spaces around them.
        contents = [token.content for token in without_id]
        _add_again(backend, contents)
    backend.encode_special_tokens = bool(folder.settings.get("split_special_tokens"))
    backend.no_truncation()
    backend.no_padding()

    special = {name: token.content for name, token in named.items()}
    bos = special.get("bos_token")
    if bos is not None and _sets_bos(draft, folder, is_json):
        bos_id = backend.token_to_id(bos)
        set_leading_bos(backend, bos, bos_id)
    elif not CLASSES[draft.class_name].keeps_end:
        backend.post_processor = None
    leading = leading_ids(backend)
    return FolderBackend(backend, special, draft.class_name, leading)


def leading_ids(backend: Any) -> list[int]:
    """Return the ids that a tokenizer puts in front of texts: of bos, of two marks as with GLM, or none."""
    plain = backend.encode("a", add_special_tokens=False)
    whole = backend.encode("a", add_special_tokens=True)
    # Of "a" as [7] and as [1, 7, 2], the first one stands in front.
    ids: list[int] = whole.ids
    size = len(plain.ids)
    num_added = len(ids) - size
    for start in range(num_added + 1):
        stop = start + size
        if ids[start:stop] == plain.ids:
            return ids[:start]
    return []


def _draft_json(path: Path, folder: TokenizerFolder) -> Draft:
    record = _read_record(path)
    class_name = choose_class(
        folder.settings, folder.model_config, record, str(folder.path)
    )
    rules = CLASSES[class_name]
    backend = _load_json(path)
    if class_name != BACKEND:
        pieces = _pieces_of(record, backend.post_processor)
        backend = _build(pieces, rules, folder)
    added = dict(folder.added)
    if not folder.lists_added:
        added |= _added_by(record)
    extra = folder.fallback_extra if folder.extra is None else folder.extra
    return Draft(backend, class_name, added, extra, dict(rules.tokens))


def _draft_model(path: Path, folder: TokenizerFolder) -> Draft:
    model = _read_sentencepiece(path, folder)
    class_name = choose_class(
        folder.settings, folder.model_config, None, str(folder.path)
    )
    extra = folder.extra
    if extra is None:
        extra = _symbols(model)
    if class_name == BACKEND:
        backend = _build_plain(model)
        tokens = _ends_of(model)
    else:
        rules = CLASSES[class_name]
        pieces = _pieces_of_model(model)
        backend = _build(pieces, rules, folder)
        tokens = dict(rules.tokens)
    return Draft(backend, class_name, folder.added, extra, tokens)


def _sets_bos(draft: Draft, folder: TokenizerFolder, is_json: bool) -> bool:
    """Return whether the class puts bos in front of texts; a tokenizer.json says it itself."""
    if CLASSES[draft.class_name].adds_bos:
        return is_json or bool(folder.settings.get("add_bos_token", True))
    return not is_json and bool(folder.settings.get("add_bos_token"))


def _read_record(path: Path) -> dict[str, Any]:
    record = user_files.read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("model"), dict):
        raise UserError(
            "not a tokenizer.json (it has no object 'model')",
            where=str(path),
            code="EVO-TOKEN-002",
        )
    return record


def _load_json(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"not a tokenizer.json ({error})", where=str(path), code="EVO-TOKEN-003"
        ) from None


def _pieces_of(record: dict[str, Any], post_processor: Any) -> Pieces:
    model = record["model"]
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):
        # Of a unigram model: pieces with scores, in the order of their ids.
        pieces = vocabulary
        vocabulary = {}
        for number, (piece, _) in enumerate(pieces):
            vocabulary[piece] = number
    merges = []
    for merge in model.get("merges") or []:
        pair = merge
        # A pair, or in older files a text such as "th e".
        if isinstance(merge, str):
            pair = merge.split(" ")
        left, right = pair
        merges.append((left, right))
    return Pieces(vocabulary, merges, post_processor)


def _pieces_of_model(model: Any) -> Pieces:
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    return Pieces(vocabulary, merges_by_id(vocabulary))


def _read_sentencepiece(path: Path, folder: TokenizerFolder) -> Any:
    """Read a model; ids that the folder gives another name have that name."""
    try:
        model = read_model(path)
    except Exception as error:  # protobuf's own
        raise UserError(
            f"not a sentencepiece model ({error})",
            where=str(path),
            code="EVO-TOKEN-002",
        ) from None
    known = {piece.piece for piece in model.pieces}
    for number, token in folder.added.items():
        if number < len(model.pieces) and token.content not in known:
            piece = model.pieces[number]
            piece.piece = token.content
            piece.type = piece.USER_DEFINED
    return model


def _symbols(model: Any) -> list[AddedTokenSpec]:
    """Return the control and user-defined symbols of a sentencepiece model."""
    symbols = []
    for piece in model.pieces:
        is_control = piece.type == piece.CONTROL
        if is_control or piece.type == piece.USER_DEFINED:
            symbols.append(AddedTokenSpec(piece.piece, is_control, normalized=False))
    return symbols


def _ends_of(model: Any) -> dict[str, str]:
    """Return the special tokens that a sentencepiece model has itself."""
    trainer = model.trainer_spec
    ends = {}
    if trainer.bos_id >= 0:
        ends["bos_token"] = trainer.bos_piece or "<s>"
    if trainer.eos_id >= 0:
        ends["eos_token"] = trainer.eos_piece or "</s>"
    if trainer.unk_id >= 0:
        ends["unk_token"] = trainer.unk_piece or "<unk>"
    return ends


def _build_plain(model: Any) -> Any:
    """Build a sentencepiece model's tokenizer for a folder without a class: no space is prepended to a text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    # 1. The algorithm, with scores or merges from the model.
    trainer = model.trainer_spec
    if trainer.model_type == trainer.UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in model.pieces]
        algorithm: Any = models.Unigram(
            scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback
        )
    else:
        pieces = _pieces_of_model(model)
        algorithm = models.BPE(
            pieces.vocabulary,
            pieces.merges,
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    backend = Backend(algorithm)

    # 2. What is done to a text before: spaces become a visible sign. The model may
    #    bring a table of characters to replace first.
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    if model.normalizer_spec.precompiled_charsmap:
        charsmap = model.normalizer_spec.precompiled_charsmap
        steps.insert(0, normalizers.Precompiled(charsmap))
    backend.normalizer = normalizers.Sequence(steps)

    # 3. The way back.
    ending: list[Any] = []
    if trainer.byte_fallback:
        ending = [decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), *ending])
    return backend


def _build(pieces: Pieces, rules: ClassRules, folder: TokenizerFolder) -> Any:
    """Build the tokenizer of a class that takes no more than pieces and merges from a file."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers

    # 1. Byte-pair merges. What the vocabulary does not know becomes bytes, or a token
    #    that stands for all of it.
    options: dict[str, Any] = {"fuse_unk": False}
    if rules.treatment in ("llama", "gemma"):
        options = {"fuse_unk": True, "byte_fallback": True}
    unknown = folder.named.get("unk_token")
    takes_unknown = rules.treatment == "gemma" or rules.adds_bos
    if takes_unknown:
        name = unknown.content if unknown else rules.tokens["unk_token"]
        if name not in pieces.vocabulary:
            raise UserError(
                f"the vocabulary lacks the token {name!r}, which stands for what it does not know",
                where=str(folder.path),
                expected="a vocabulary with it, or another tokenizer_class",
                code="EVO-TOKEN-003",
            )
        options["unk_token"] = name
    backend = Backend(models.BPE(pieces.vocabulary, pieces.merges, **options))

    # 2. How a text becomes pieces, and pieces become text, depends on the class.
    if rules.composes:
        backend.normalizer = normalizers.NFC()
    if rules.treatment == "llama":
        _treat_like_llama(backend, folder, rules)
    elif rules.treatment == "gemma":
        _treat_like_gemma(backend)
    else:
        _treat_bytes(backend, rules, bool(folder.settings.get("add_prefix_space")))
    if pieces.post_processor is not None:
        backend.post_processor = pieces.post_processor
    return backend


def _treat_like_llama(backend: Any, folder: TokenizerFolder, rules: ClassRules) -> None:
    """Put a space in front of a text, or with ``legacy`` of every part between tokens."""
    from tokenizers import decoders, pre_tokenizers

    setting = folder.settings.get("add_prefix_space")
    has_prefix = setting is None or bool(setting)
    has_legacy = bool(folder.settings.get("legacy")) and not rules.adds_bos
    prefixed = "always" if has_legacy else "first"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE,
        prepend_scheme=prefixed if has_prefix else "never",
        split=False,
    )
    # The way back: signs become spaces, bytes become characters, and the space that was
    # put in front goes.
    steps: list[Any] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if has_prefix or rules.adds_bos:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)


def _treat_like_gemma(backend: Any) -> None:
    """Replace spaces, and put none in front of a text."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def _treat_bytes(backend: Any, rules: ClassRules, has_prefix: bool) -> None:
    """Cut a text as the class does, and tokenize its bytes."""
    from tokenizers import Regex, decoders, pre_tokenizers

    split = SPLITS.get(rules.treatment)
    steps: list[Any] = []
    if rules.treatment == "digits":
        digits = pre_tokenizers.Digits(individual_digits=True)
        steps.append(digits)
    if split is not None:
        parts = pre_tokenizers.Split(Regex(split), behavior="isolated")
        steps.append(parts)
    to_bytes = pre_tokenizers.ByteLevel(
        add_prefix_space=has_prefix, use_regex=split is None
    )
    steps.append(to_bytes)
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()


def _added_by(record: Mapping[str, Any]) -> dict[int, AddedTokenSpec]:
    """Return the added tokens of a tokenizer.json."""
    added = {}
    for token in record.get("added_tokens") or []:
        added[int(token["id"])] = AddedTokenSpec.of(token, special=False)
    return added


def _specs(named: Mapping[str, Any]) -> dict[str, AddedTokenSpec]:
    """Return the special tokens that exist, of texts or objects; those named as null are none."""
    specs = {}
    for name in sorted(named, key=_place):
        token = named[name]
        if token is None or token == "":
            continue
        is_spec = isinstance(token, AddedTokenSpec)
        specs[name] = token if is_spec else AddedTokenSpec(token, True, False)
    return specs


def _place(name: str) -> int:
    """Return where a special token is in the order in which they are added: the usual ones first."""
    is_usual = name in SPECIAL_NAMES
    return SPECIAL_NAMES.index(name) if is_usual else len(SPECIAL_NAMES)


def _add_tokens(
    backend: Any, added: Mapping[int, AddedTokenSpec], folder: TokenizerFolder
) -> None:
    """Add the tokens that the folder gives ids, in the order of these.

    Raises:
        UserError: the folder gives a token another id than it has.
    """
    for number in sorted(added):
        token = added[number]
        backend.add_tokens([token.build()])
        found = backend.token_to_id(token.content)
        if found != number:
            raise UserError(
                f"the files give the token {token.content!r} the id {number}, but it has {found}",
                where=str(folder.path),
                expected="added_tokens_decoder and added_tokens.json with the ids of the vocabulary",
                code="EVO-TOKEN-003",
            )


def _add_missing(backend: Any, tokens: Iterable[AddedTokenSpec]) -> None:
    """Add tokens that are not recognized in text yet."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [token.build() for token in tokens if token.content not in known]
    backend.add_tokens(missing)


def _add_again(backend: Any, contents: Iterable[str]) -> None:
    backend.add_tokens(
        [AddedTokenSpec(content, True, False).build() for content in contents]
    )
