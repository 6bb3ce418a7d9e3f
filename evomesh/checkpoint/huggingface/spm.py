"""A sentencepiece model for readers of Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPACE = "\u2581"  # sentencepiece's sign for a space


def read_model(path: Path) -> Any:
    """The model's own record of itself."""
    from sentencepiece import sentencepiece_model_pb2 as records

    return records.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]  # made at run time


def fits_llama_tokenizer(model: Any) -> bool:
    """Whether a Llama tokenizer without ``add_prefix_space`` and ``legacy`` cuts text as this model does.

    InternLM's do: byte-pair merges on the text as it is, without a space in front.
    """
    spec = model.normalizer_spec
    changes = spec.add_dummy_prefix or spec.remove_extra_whitespaces or spec.precompiled_charsmap
    return model.trainer_spec.model_type == model.trainer_spec.BPE and not changes


def build_fast_tokenizer(model: Any, add_bos: bool) -> Any:
    """A ``tokenizers.Tokenizer`` of the same pieces and the same treatment of spaces.

    A Llama tokenizer of ``transformers`` would not do: it puts no space in front of a text that begins with one.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    unknown = next(n for n, piece in enumerate(model.pieces) if piece.type == piece.UNKNOWN)
    trainer, spec = model.trainer_spec, model.normalizer_spec
    if trainer.model_type == trainer.BPE:
        vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
        core: Any = models.BPE(
            vocab,
            merges(model),
            unk_token=pieces[unknown][0],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        core = models.Unigram(pieces, unk_id=unknown, byte_fallback=trainer.byte_fallback)
    tokenizer = Tokenizer(core)
    steps: list[Any] = (
        [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    )
    if spec.remove_extra_whitespaces:
        from tokenizers import Regex

        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if spec.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(content=" ", left=1)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for piece in model.pieces:
        if piece.type in (piece.CONTROL, piece.USER_DEFINED):
            token = AddedToken(piece.piece, special=piece.type == piece.CONTROL, normalized=False)
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    if add_bos:
        bos = model.trainer_spec.bos_piece
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def merges(model: Any) -> list[tuple[str, str]]:
    """Every way a piece is made of two others, the earliest merges first."""
    ranks = {piece.piece: (-piece.score, number) for number, piece in enumerate(model.pieces)}
    found = []
    for piece, rank in ranks.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
