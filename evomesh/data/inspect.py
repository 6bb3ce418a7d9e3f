"""Show people what a dataset holds and what the model will see of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomesh.config.schema import IGNORE, DataConfig
from evomesh.data.packing.corpus import Corpus, open_corpus
from evomesh.data.packing.packs import Pack, PackPlan, PackRule
from evomesh.data.token_files.bin_dataset import BinDataset
from evomesh.data.token_files.folders import walk
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError

BAR_WIDTH = 40
DIM, RESET = "\x1b[2m", "\x1b[0m"  # terminal styles


def open_files(path: str) -> list[BinDataset]:
    """Open the token files of a path: one ``.bin``, or all below a folder."""
    root = Path(path).expanduser()
    if not root.is_dir():
        return [BinDataset(root)]
    files = [BinDataset(file.path, name=file.name) for file in walk(root, ".bin")]
    if not files:
        raise UserError("no .bin file below the folder", where=str(root))
    return files


def open_packs(path: str, config: DataConfig) -> Corpus:
    """Open the packs of one file, or of a training folder with the numbers that training gives them."""
    if Path(path).expanduser().is_dir():
        return open_corpus(config.model_copy(update={"train_folder": path}), None)
    source = BinDataset(path, min_length=config.min_length)
    return Corpus(config, [PackPlan([source], PackRule.from_config(config), config.remainder)])


def pack_json(pack: Pack) -> dict[str, list[int]]:
    """Return a pack as plain lists; labels are -100 where a position is not a target, indexes are position_ids."""
    return {
        "tokens": pack.tokens.tolist(),
        "cu_seqlens": pack.cu_seqlens.tolist(),
        "indexes": pack.position_ids.tolist(),
        "labels": pack.labels.tolist(),
        "type_ids": pack.type_ids.tolist(),
    }


def pack_text(pack: Pack, tokenizer: Tokenizer | None) -> str:
    """Return a pack segment by segment: ids and labels, or with a tokenizer text in which masked tokens are dim."""
    lines = []
    for number in range(len(pack.cu_seqlens) - 1):
        start, stop = pack.cu_seqlens[number : number + 2]
        ids = pack.tokens[start:stop]
        labels = pack.labels[start:stop]
        targets = int((labels != IGNORE).sum())
        type_id = int(pack.type_ids[start])
        lines.append(f"segment {number}: tokens {start} .. {stop - 1}, {targets} targets, type {type_id}")
        if tokenizer is None:
            shown = ["." if label == IGNORE else str(label) for label in labels.tolist()]
            lines.append("  tokens " + " ".join(map(str, ids.tolist())))
            lines.append("  labels " + " ".join(shown))
        else:
            # A token is trained when the position before it has it as label; the first one never is.
            trained = np.append(False, labels[:-1] != IGNORE)
            lines.append(dimmed(ids, trained, tokenizer))
    return "\n".join(lines)


def dimmed(ids: NDArray[np.int64], trained: NDArray[np.bool_], tokenizer: Tokenizer) -> str:
    """Decode ids; those that are not trained appear in the terminal's dim style."""
    if not len(ids):
        return ""
    # Runs of equal ``trained`` are decoded together.
    edges = np.flatnonzero(np.diff(trained.astype(np.int8))) + 1
    texts = []
    for run, run_trained in zip(np.split(ids, edges), np.split(trained, edges), strict=True):
        text = tokenizer.decode(run.tolist())
        texts.append(text if run_trained[0] else f"{DIM}{text}{RESET}")
    return "".join(texts)


def summary(file: BinDataset) -> dict[str, Any]:
    """Return counts of one file, from its meta."""
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
    """Return documents and tokens by length, in powers of two, as text."""
    # Bin 0 holds length 0, bin k the lengths 2^(k-1) .. 2^k - 1.
    num_bins = max(1, int(lengths.max()).bit_length()) + 1
    starts = np.append(0, 2 ** np.arange(num_bins))
    bins = np.searchsorted(starts, lengths, side="right") - 1
    documents = np.bincount(bins, minlength=num_bins)
    tokens = np.bincount(bins, weights=lengths, minlength=num_bins)
    most = documents.max()
    total = max(1, tokens.sum())
    rows = []
    for number in np.flatnonzero(documents).tolist():
        low = int(starts[number])
        high = int(starts[number + 1]) - 1
        share = tokens[number] / total
        bar = "#" * max(1, round(BAR_WIDTH * documents[number] / most))
        count = f"{documents[number]:>11,} documents"
        rows.append(f"  {low:>9,} .. {high:<9,} {count} {share:6.1%} of tokens  {bar}")
    return "\n".join(rows)


def id_summary(files: Sequence[BinDataset], samples: int = 1000) -> str:
    """Return which ids evenly spaced documents hold, as text."""
    sampled = []
    for file in files:
        picks = np.linspace(0, len(file) - 1, min(samples, len(file)))
        sampled.append(file.read(np.unique(picks.astype(np.int64))))
    ids = np.concatenate(sampled)
    if not len(ids):
        return "no tokens in the sampled documents"
    values, counts = np.unique(np.abs(ids), return_counts=True)
    most_frequent = np.argsort(-counts)[:5]
    top = ", ".join(f"{values[n]} ({counts[n] / len(ids):.1%})" for n in most_frequent)
    return (
        f"ids of {len(ids):,} sampled tokens: {len(values):,} distinct, {values.min()} .. {values.max()}, "
        f"{(ids < 0).mean():.1%} masked, {(ids == 0).mean():.1%} zero; most frequent: {top}"
    )
