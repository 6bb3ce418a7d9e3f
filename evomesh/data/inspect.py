"""What a dataset holds and what the model will see of it, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomesh.config.schema import IGNORE, DataConfig
from evomesh.data.packing.corpus import open_corpus
from evomesh.data.packing.packs import Pack, PackedCorpus, PackPlan, PackRule
from evomesh.data.token_files.bin_dataset import BinDataset
from evomesh.data.token_files.folders import walk
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError

BAR = 40


def open_files(path: str) -> list[BinDataset]:
    """The token files of a path: one ``.bin``, or all below a folder."""
    found = Path(path).expanduser()
    if found.is_dir():
        files = [BinDataset(file.path, name=file.name) for file in walk(found, ".bin")]
        if not files:
            raise UserError("no .bin file below the folder", where=str(found))
        return files
    return [BinDataset(found)]


def open_packs(path: str, config: DataConfig) -> PackedCorpus:
    """Packs of one file, or of a training folder as training numbers them."""
    if Path(path).expanduser().is_dir():
        return open_corpus(config.model_copy(update={"train_folder": path}), None).packs
    rule = PackRule(config.packed_length, config.seq_len, config.pack_sample_into_one, config.order)
    return PackedCorpus([PackPlan([BinDataset(path, min_length=config.min_length)], rule, config.remainder)])


def pack_json(pack: Pack) -> dict[str, list[int]]:
    """A pack as plain lists: tokens, cu_seqlens, indexes, labels (-100 where not a target), type_ids."""
    names = ("tokens", "cu_seqlens", "indexes", "labels", "type_ids")
    return {name: getattr(pack, name).tolist() for name in names}


def pack_text(pack: Pack, tokenizer: Tokenizer | None) -> str:
    """A pack for reading: segment by segment; with a tokenizer as text in which what is no target is dim."""
    lines = []
    for number, (low, high) in enumerate(zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True)):
        targets = int((pack.labels[low:high] != IGNORE).sum())
        lines.append(
            f"segment {number}: tokens {low} .. {high - 1}, {targets} targets, type {int(pack.type_ids[low])}"
        )
        ids = pack.tokens[low:high]
        if tokenizer is None:
            lines.append("  tokens " + " ".join(map(str, ids.tolist())))
            lines.append(
                "  labels " + " ".join("." if x == IGNORE else str(x) for x in pack.labels[low:high].tolist())
            )
        else:
            # A token is trained when the position before it has it as label; the first one never is.
            trained = np.concatenate([[False], pack.labels[low : high - 1] != IGNORE])
            lines.append(dimmed(ids, trained, tokenizer))
    return "\n".join(lines)


def dimmed(ids: NDArray[np.int64], trained: NDArray[np.bool_], tokenizer: Tokenizer) -> str:
    """Decoded ids, those that are no targets in the terminal's dim style."""
    if not len(ids):
        return ""
    edges = np.flatnonzero(np.diff(trained.astype(np.int8))) + 1
    parts = []
    for part, is_trained in zip(np.split(ids, edges), trained[np.concatenate([[0], edges])], strict=True):
        text = tokenizer.decode(part.tolist())
        parts.append(text if is_trained else f"\x1b[2m{text}\x1b[0m")
    return "".join(parts)


def summary(file: BinDataset) -> dict[str, Any]:
    """Counts of one file from its meta."""
    lengths = np.asarray(file.lengths)
    return {
        "file": file.name,
        "documents": len(lengths),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "shortest": int(lengths.min()),
        "median": int(np.median(lengths)),
        "longest": int(lengths.max()),
        "bytes": file.size,
    }


def histogram(lengths: NDArray[Any]) -> str:
    """Documents and tokens by length, in powers of two."""
    top = max(1, int(np.ceil(np.log2(int(lengths.max()) + 1))))
    bounds = 2 ** np.arange(top + 1)
    which = np.searchsorted(bounds, lengths, side="right")
    documents = np.bincount(which, minlength=top + 1)
    tokens = np.bincount(which, weights=lengths, minlength=top + 1)
    rows = []
    for place in range(len(documents)):
        if documents[place]:
            low, high = (0, 0) if place == 0 else (int(bounds[place - 1]), int(bounds[place - 1]) * 2 - 1)
            bar = "#" * max(1, round(BAR * documents[place] / documents.max()))
            share = tokens[place] / max(1, tokens.sum())
            rows.append(
                f"  {low:>9,} .. {high:<9,} {documents[place]:>11,} documents {share:6.1%} of tokens  {bar}"
            )
    return "\n".join(rows)


def id_summary(files: list[BinDataset], samples: int = 1000) -> str:
    """Ids of evenly spaced documents."""
    found = []
    for file in files:
        picks = np.unique(np.linspace(0, len(file) - 1, min(samples, len(file))).astype(np.int64))
        found.append(file.read(picks))
    ids = np.concatenate(found)
    if not len(ids):
        return "no tokens in the documents looked at"
    values, counts = np.unique(np.abs(ids), return_counts=True)
    top = np.argsort(-counts)[:5]
    most = ", ".join(f"{values[n]} ({counts[n] / len(ids):.1%})" for n in top)
    return (
        f"ids of {len(ids):,} tokens looked at: {len(values):,} distinct, {values.min()} .. {values.max()}, "
        f"{(ids < 0).mean():.1%} masked, {(ids == 0).mean():.1%} zero; most frequent: {most}"
    )
