"""Show people what a dataset holds and what the model will see of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomesh.config.data import DataConfig
from evomesh.config.schema import IGNORE
from evomesh.config.user import expand_home
from evomesh.data.packing.corpus import Corpus, open_corpus
from evomesh.data.packing.packs import Pack
from evomesh.data.packing.rows import make_plan
from evomesh.data.token_files.bin_dataset import BinDataset, evenly_spaced
from evomesh.data.token_files.folders import find_bins
from evomesh.data.tokenizer import Tokenizer

BAR_WIDTH = 40
DIM, RESET = "\x1b[2m", "\x1b[0m"  # terminal styles


def open_files(path: str) -> list[BinDataset]:
    """Open the token files of a path: one ``.bin``, or all below a folder."""
    return [BinDataset(file.path, name=file.name) for file in find_bins(path)]


def open_packs(path: str, config: DataConfig) -> Corpus:
    """Open the packs of one file, or those of a training folder under the numbers that training uses."""
    if expand_home(path).is_dir():
        return open_corpus(config.model_copy(update={"train_folder": path}), None)
    (file,) = find_bins(path)
    source = BinDataset(file.path, min_length=config.min_length)
    return Corpus(config, [make_plan([source], config)])


def pack_json(pack: Pack) -> dict[str, list[int]]:
    """Return a pack as plain lists: labels are -100 where a position has no target, indexes are position_ids."""
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
    bounds = pack.cu_seqlens.tolist()
    for number, (start, stop) in enumerate(pairwise(bounds)):
        labels = pack.labels[start:stop]
        targets = np.count_nonzero(labels != IGNORE)
        type_id = int(pack.type_ids[start])
        lines.append(
            f"segment {number}: tokens {start} .. {stop - 1}, {targets} targets, type {type_id}"
        )
        ids = pack.tokens[start:stop]
        if tokenizer is None:
            lines += _number_rows(ids, labels)
        else:
            text = _segment_text(ids, labels, tokenizer)
            lines.append(text)
    return "\n".join(lines)


def _number_rows(ids: NDArray[Any], labels: NDArray[Any]) -> list[str]:
    """Return a row of ids and one of labels, in which "." stands for a token without a target."""
    shown_ids = ids.astype(str)
    is_target = labels != IGNORE
    all_labels = labels.astype(str)
    shown_labels = np.where(is_target, all_labels, ".")
    return [
        "  tokens " + " ".join(shown_ids),
        "  labels " + " ".join(shown_labels),
    ]


def _segment_text(ids: NDArray[Any], labels: NDArray[Any], tokenizer: Tokenizer) -> str:
    # A token is trained if it is the label of the position before it; the first token
    # never is.
    is_target = labels != IGNORE
    is_trained = np.append(False, is_target[:-1])
    return dimmed(ids, is_trained, tokenizer)


def dimmed(
    ids: NDArray[np.int64],
    trained: NDArray[np.bool_],
    tokenizer: Tokenizer,
) -> str:
    """Decode ids; those that are not trained appear in the terminal's dim style."""
    # Neighbors that are both trained or both not trained are decoded together: F F T T
    # F has the bounds 0 2 4 5.
    changes = np.flatnonzero(np.diff(trained)) + 1
    bounds = [0, *changes.tolist(), len(ids)]
    texts = []
    for start, stop in pairwise(bounds):
        if start == stop:  # there are no ids
            continue
        text = tokenizer.decode(ids[start:stop].tolist())
        if not trained[start]:
            text = f"{DIM}{text}{RESET}"
        texts.append(text)
    return "".join(texts)


def summary(file: BinDataset) -> dict[str, Any]:
    """Return counts of one file, from its meta."""
    return {
        "file": file.name,
        "documents": len(file),
        "tokens": file.kept_tokens,
        "shortest": int(file.lengths.min()),
        "median": int(np.median(file.lengths)),
        "longest": int(file.lengths.max()),
        "bytes": file.size,
    }


def histogram(lengths: NDArray[Any]) -> str:
    """Return documents and tokens by length, in powers of two, as text."""
    # 1. Count. Bin 0 holds length 0, bin k the lengths 2^(k-1) .. 2^k - 1.
    num_bins = int(lengths.max()).bit_length() + 1
    starts = np.append(0, 2 ** np.arange(num_bins))
    starts_not_above = np.searchsorted(starts, lengths, side="right")
    bins = starts_not_above - 1
    documents = np.bincount(bins)
    tokens = np.bincount(bins, weights=lengths)

    # 2. Draw. The longest bar is that of the bin with most documents.
    all_tokens = max(1, tokens.sum())
    shares = tokens / all_tokens
    heights = documents / documents.max()
    bar_widths = np.round(BAR_WIDTH * heights)
    rows = []
    for number in np.flatnonzero(documents):
        first = starts[number]
        last = starts[number + 1] - 1
        # A single document among many is a bar of one sign, not of none.
        bar_width = max(1, int(bar_widths[number]))
        bar = "#" * bar_width
        count = documents[number]
        share = shares[number]
        lengths_of_bin = f"{first:>9,} .. {last:<9,}"
        row = f"  {lengths_of_bin} {count:>11,} documents {share:6.1%} of tokens  {bar}"
        rows.append(row)
    return "\n".join(rows)


def id_summary(files: Sequence[BinDataset], samples: int = 1000) -> str:
    """Summarize the ids of evenly spaced documents, as text."""
    sampled = [file.read(evenly_spaced(len(file), samples)) for file in files]
    ids = np.concatenate(sampled)
    if not len(ids):
        return "no tokens in the sampled documents"
    # A masked id counts like any other.
    values, counts = np.unique(np.abs(ids), return_counts=True)
    shares = counts / len(ids)
    most_frequent = np.argsort(-counts)[:5]
    top = ", ".join(f"{values[n]} ({shares[n]:.1%})" for n in most_frequent)
    return (
        f"ids of {len(ids):,} sampled tokens: {len(values):,} distinct, {values.min()} .. {values.max()}, "
        f"{(ids < 0).mean():.1%} masked, {(ids == 0).mean():.1%} zero; most frequent: {top}"
    )
