"""Train a tokenizer from text files: byte-level BPE (``tokenizers``) or sentencepiece BPE with byte fallback.

Both encode every text without an unknown token and decode it back exactly.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evomesh.data.chat_styles import STYLES, TEMPLATED_STYLES, style_source
from evomesh.data.records.reader import read_records, record_text
from evomesh.data.records.source_files import SourceFile, open_files
from evomesh.errors import UserError
from evomesh.storage.atomic_file import write_atomically

TokenizerKind = Literal["bpe", "sentencepiece"]

BOS, EOS = "<s>", "</s>"
UNKNOWN = "<unk>"  # sentencepiece cannot do without; byte fallback leaves it unused
# Bytes; sentencepiece skips longer sentences, so longer lines are divided.
MAX_SENTENCE = 1 << 16


@dataclass(frozen=True)
class TokenizerRecipe:
    """The tokenizer to train.

    Attributes:
        vocab_size: number of ids, special tokens included.
        kind: "bpe": tokenizer.json; "sentencepiece": tokenizer.model.
        special_tokens: tokens that text never splits, beside bos and eos.
        chat: name of a built-in chat template whose marks become special tokens; "" for none.
    """

    vocab_size: int
    kind: TokenizerKind = "bpe"
    special_tokens: tuple[str, ...] = ()
    chat: str = ""

    @property
    def all_special_tokens(self) -> list[str]:
        marks = STYLES[self.chat].special if self.chat else ()
        return list(dict.fromkeys([*marks, *self.special_tokens]))


def train_tokenizer(
    files: Sequence[SourceFile], folder: Path, recipe: TokenizerRecipe, text_field: str
) -> Path:
    """Train a tokenizer and write its folder: the model, and tokenizer_config.json with bos, eos and chat template.

    Args:
        files: the texts to learn from; read once, one at a time.
        folder: the new folder.
        text_field: key of the text in each record.

    Returns:
        The model file in the folder.

    Raises:
        UserError: the folder holds a tokenizer already, or the texts do not give that many tokens.
    """
    name = {"bpe": "tokenizer.json", "sentencepiece": "tokenizer.model"}[recipe.kind]
    for existing in ("tokenizer.json", "tokenizer.model"):
        if (folder / existing).exists():
            raise UserError(
                f"{existing} exists: datasets made with it would no longer fit",
                where=str(folder),
                fix="choose another --output, or delete the file",
                code="EVO-CLI-005",
            )
    texts = read_texts(files, text_field)
    train = {"bpe": _train_bpe, "sentencepiece": _train_sentencepiece}[recipe.kind]
    model = train(texts, recipe)
    settings: dict[str, object] = {
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    if recipe.kind == "sentencepiece":
        # No space is added in front of a text or after a special token, so that
        # decoding restores every text.
        spacing = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_prefix_space": False,
        }
        settings |= {"unk_token": UNKNOWN, **spacing}
    if recipe.chat in TEMPLATED_STYLES:
        settings["chat_template"] = style_source(STYLES[recipe.chat])
    with write_atomically(folder / "tokenizer_config.json") as file:
        file.write(json.dumps(settings, indent=2).encode())
    with write_atomically(folder / name) as file:
        file.write(model)
    return folder / name


def read_texts(files: Sequence[SourceFile], text_field: str) -> Iterator[str]:
    """Yield the text of every record of the files."""
    for file, stream, _ in open_files(files):
        for record in read_records(stream, file):
            yield record_text(record, text_field)


def _train_bpe(texts: Iterator[str], recipe: TokenizerRecipe) -> bytes:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    # Pieces are sequences of bytes, so that every text can be encoded: the 256 bytes
    # are in the vocabulary whatever the texts are.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [BOS, EOS, *recipe.all_special_tokens]
    fewest = len(alphabet) + len(special)
    if recipe.vocab_size < fewest:
        raise UserError(
            f"{recipe.vocab_size} ids do not hold the 256 bytes and {len(special)} special tokens",
            where="--vocab-size",
            expected=f"at least {fewest}",
            code="EVO-TOKEN-006",
        )
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer ends early, and says nothing, when no pair of pieces is left to merge.
    learned = tokenizer.get_vocab_size()
    if learned < recipe.vocab_size:
        raise _too_little_text(recipe.vocab_size, learned)
    return tokenizer.to_str(pretty=True).encode()


def _train_sentencepiece(texts: Iterator[str], recipe: TokenizerRecipe) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=recipe.vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            split_digits=True,
            normalization_rule_name="identity",  # the text as it is, so that decoding restores it
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * MAX_SENTENCE,
            user_defined_symbols=recipe.all_special_tokens,
            unk_piece=UNKNOWN,
            bos_piece=BOS,
            eos_piece=EOS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"sentencepiece cannot learn {recipe.vocab_size} ids from these texts ({error})",
            where="--vocab-size",
            expected="more than the 259 of the bytes, unk, bos and eos, the special tokens and the characters, "
            "and no more than the texts give",
            fix="choose another --vocab-size, or give more text",
            code="EVO-TOKEN-006",
        ) from None
    return model.getvalue()


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    """Yield the lines of the texts, long ones in parts: sentencepiece learns within a line and skips long ones."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), MAX_SENTENCE):
                yield line[start : start + MAX_SENTENCE]


def _too_little_text(wanted: int, learned: int) -> UserError:
    return UserError(
        f"the texts give only {learned} tokens, not {wanted}",
        where="--vocab-size",
        fix=f"give more text, or --vocab-size {learned}",
        code="EVO-TOKEN-006",
    )
