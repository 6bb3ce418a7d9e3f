"""Convert a sentencepiece model to a backend of ``tokenizers``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

SPACE = "\u2581"  # what sentencepiece writes for a space


def read_model(path: Path) -> Any:
    """Read the protocol buffer that a sentencepiece ``.model`` file holds."""
    from sentencepiece import sentencepiece_model_pb2 as records

    return records.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]  # made at run time


def fits_llama_tokenizer(model: Any) -> bool:
    """Return whether a Llama tokenizer without ``add_prefix_space`` and ``legacy`` tokenizes text as this model does.

    InternLM's models are of this kind: byte-pair merges on the text as it is, without a
    space in front.
    """
    spec = model.normalizer_spec
    changes = (
        spec.add_dummy_prefix
        or spec.remove_extra_whitespaces
        or spec.precompiled_charsmap
    )
    return model.trainer_spec.model_type == model.trainer_spec.BPE and not changes


def build_fast_tokenizer(model: Any) -> Any:
    """Build a ``tokenizers.Tokenizer`` with the same pieces and the same treatment of spaces.

    A Llama tokenizer of ``transformers`` is not an option: it adds no space in front of
    a text that begins with one.
    """
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer(_tokenizer_model(model))
    tokenizer.normalizer = _normalizer(model.normalizer_spec)
    tokenizer.decoder = _decoder(model.normalizer_spec)
    for piece in model.pieces:
        if piece.type == piece.CONTROL:
            tokenizer.add_special_tokens(
                [AddedToken(piece.piece, special=True, normalized=False)]
            )
        elif piece.type == piece.USER_DEFINED:
            tokenizer.add_tokens(
                [AddedToken(piece.piece, special=False, normalized=False)]
            )
    return tokenizer


def set_leading_bos(tokenizer: Any, bos: str, bos_id: int) -> None:
    """Make a ``tokenizers.Tokenizer`` put bos in front of texts."""
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )


def _tokenizer_model(model: Any) -> Any:
    """Build the algorithm: byte-pair merges, or unigram."""
    from tokenizers import models

    trainer = model.trainer_spec
    scores = [(piece.piece, piece.score) for piece in model.pieces]
    unknown = next(
        number
        for number, piece in enumerate(model.pieces)
        if piece.type == piece.UNKNOWN
    )
    if trainer.model_type != trainer.BPE:
        return models.Unigram(
            scores, unk_id=unknown, byte_fallback=trainer.byte_fallback
        )
    return models.BPE(
        {piece: number for number, (piece, _) in enumerate(scores)},
        merges(model),
        unk_token=scores[unknown][0],
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _normalizer(spec: Any) -> Any:
    """Build the steps before tokenizing, in sentencepiece's order."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        several_spaces = Regex(" {2,}")
        steps.append(normalizers.Strip())
        steps.append(normalizers.Replace(several_spaces, " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(spec: Any) -> Any:
    """Build the inverse, which removes the space that was added in front."""
    from tokenizers import decoders

    steps: list[Any] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)


def merges(model: Any) -> list[tuple[str, str]]:
    """Return every pair of pieces that joins to a piece, the earliest merges first."""
    times = _learning_times(model)

    def time_of_merge(pair: tuple[str, str]) -> list[Any]:
        left, right = pair
        joined = left + right
        pieces = (joined, left, right)
        return [times[piece] for piece in pieces]

    pairs = _pairs_of_pieces(times)
    pairs.sort(key=time_of_merge)
    return pairs


def _learning_times(model: Any) -> dict[str, tuple[float, int]]:
    """Return a key for each piece, which sorts them in the order in which they were learned.

    That is by decreasing score; the id breaks ties.
    """
    times = {}
    for number, piece in enumerate(model.pieces):
        times[piece.piece] = (-piece.score, number)
    return times


def _pairs_of_pieces(pieces: Collection[str]) -> list[tuple[str, str]]:
    """Split every piece at every place: "the" joins "t" + "he" and "th" + "e", if these are pieces."""
    pairs = []
    for joined in pieces:
        for middle in range(1, len(joined)):
            left = joined[:middle]
            right = joined[middle:]
            if left in pieces and right in pieces:
                pairs.append((left, right))
    return pairs


def merges_by_id(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return every pair of pieces that joins to a piece, in the order of the joined pieces' ids.

    So ``transformers`` finds the merges of a model; a shorter left part comes first.
    """

    def id_of_joined(pair: tuple[str, str]) -> tuple[int, int]:
        left, right = pair
        return vocabulary[left + right], len(left)

    pairs = _pairs_of_pieces(vocabulary)
    pairs.sort(key=id_of_joined)
    return pairs
