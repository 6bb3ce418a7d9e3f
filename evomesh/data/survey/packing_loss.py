"""Count what packs leave out, pad and split, for a config and for other lengths, from the lengths of documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evomesh.config.data import DataConfig
from evomesh.config.user import expand_home
from evomesh.data.packing.corpus import open_sources
from evomesh.data.packing.packs import PackPlan, PackRule
from evomesh.data.packing.rows import RowPlan, make_plan
from evomesh.data.token_files.bin_dataset import BinDataset, DocumentSource

SEQ_LENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
MANY_DOCUMENTS = 20_000_000  # past them only the config's own length is planned


def sources_of(config: DataConfig) -> list[BinDataset]:
    """Open the files of ``train_folder``, which may also be a single file, as training does."""
    assert config.train_folder is not None
    path = expand_home(config.train_folder)
    if path.is_file():
        return [BinDataset(path, min_length=config.min_length)]
    sources, _ = open_sources(config)
    return sources


def packing_losses(
    sources: Sequence[BinDataset], config: DataConfig
) -> list[dict[str, Any]]:
    """Return one row for each length of segment, in ascending order.

    Args:
        sources: the files, without the documents that ``config`` leaves out.
    """
    lengths = {config.seq_len}
    if sum(len(source) for source in sources) <= MANY_DOCUMENTS:
        lengths |= set(SEQ_LENS)
    rows = []
    for seq_len in sorted(lengths):
        section = config.model_copy(update={"seq_len": seq_len})
        row = packing_loss(sources, section)
        row["is_config"] = seq_len == config.seq_len
        rows.append(row)
    return rows


def packing_loss(sources: Sequence[BinDataset], config: DataConfig) -> dict[str, Any]:
    """Return counts of tokens and documents over all files as one ``data`` section packs them.

    ``dropped`` tokens are in no pack, ``padding`` fills packs, ``split`` documents are in
    several segments, so that attention does not reach from one part to another; of documents laid in rows
    the part after ``seq_len`` is dropped.
    """
    # One stream of all files with "carry", else one for each file.
    streams: list[list[DocumentSource]] = [[source] for source in sources]
    if config.remainder == "carry":
        streams = [list(sources)]
    stored = sum(source.tokens for source in sources)
    kept = sum(source.kept_tokens for source in sources)
    row = {
        "seq_len": config.seq_len,
        "pack": config.packed_length,
        "packs": 0,
        "tokens": stored,
        "short": stored - kept,
        "dropped": 0,
        "padding": 0,
        "split": 0,
        "split_tokens": 0,
        "documents": sum(len(source) for source in sources),
    }
    for stream in streams:
        plan = make_plan(stream, config)
        row["packs"] += len(plan)
        row["dropped"] += plan.dropped
        tokens = sum(int(source.lengths.sum()) for source in stream)
        row["padding"] += len(plan) * config.packed_length - (tokens - plan.dropped)
        documents, split_tokens = _split(plan)
        row["split"] += documents
        row["split_tokens"] += split_tokens
    return row


def _split(plan: PackPlan) -> tuple[int, int]:
    """Return how many documents of a stream are in several segments, and their tokens."""
    if isinstance(plan, RowPlan):
        return 0, 0
    rule = plan.rule
    ends = plan.document_ends
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    # The stream is divided at every pack, and with one_sample at every segment.
    period = rule.packed_length
    if rule.one_sample:
        period = rule.seq_len
    last = np.maximum(ends - 1, starts)
    is_split = starts // period != last // period
    if _divides_long(rule):
        is_split |= lengths > rule.seq_len
    # What is past the last pack is dropped: a document there is in no segment.
    packed = len(plan) * rule.packed_length
    is_split &= starts < packed
    documents = int(is_split.sum())
    tokens = int(lengths[is_split].sum())
    return documents, tokens


def _divides_long(rule: PackRule) -> bool:
    """Return whether a document longer than ``seq_len`` is several segments wherever it starts."""
    return rule.order == "internevo" and not rule.one_sample
