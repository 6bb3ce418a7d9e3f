"""Describe a corpus: one row per file for the user, a manifest for the checkpoint, warnings and refusals.

The rows and the manifest are plain JSON: the manifest is stored in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import xxhash

from evomesh.config.schema import DataConfig
from evomesh.data.packing.packs import PackPlan
from evomesh.data.token_files.bin_dataset import BinDataset, DocumentSource
from evomesh.errors import UserError

COUNTS = ("documents", "tokens", "filtered", "dropped", "packs")
MANIFEST_KEYS = ("file", "type", "documents", "tokens", "bytes", "hash")


def source_row(
    source: DocumentSource, type_name: str, *, documents: int, tokens: int, plan: PackPlan
) -> dict[str, Any]:
    """Return the report row of a source that is a stream of its own; ``documents`` includes the filtered ones."""
    return {
        "file": source.name,
        "type": type_name,
        "documents": documents,
        "tokens": tokens,
        "filtered": documents - len(source.lengths),
        "dropped": plan.dropped,
        "packs": len(plan),
    }


def file_row(source: BinDataset, types: Sequence[str], plan: PackPlan) -> dict[str, Any]:
    """Return the report row of a token file, with its size and a hash of its meta."""
    tokens = int(source.rows[:, 1].sum(dtype=np.int64))
    type_name = types[source.type_id]
    row = source_row(source, type_name, documents=len(source.rows), tokens=tokens, plan=plan)
    if len(plan.sources) > 1:
        row |= _share_of_stream(source, plan)
    row["bytes"] = source.size
    row["hash"] = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(source.rows).data)
    return row


def _share_of_stream(source: BinDataset, plan: PackPlan) -> dict[str, int]:
    """Return packs and dropped tokens of one file in a stream of all files: a pack counts where it ends."""
    number = plan.sources.index(source)
    start = _tokens_before(plan, int(plan.first_document[number]))
    end = _tokens_before(plan, int(plan.first_document[number + 1]))
    length = plan.rule.packed_length
    return {
        "packs": end // length - start // length,
        "dropped": plan.dropped if end == plan.tokens else 0,
    }


def _tokens_before(plan: PackPlan, document: int) -> int:
    return int(plan.document_ends[document - 1]) if document else 0


def report_table(report: Sequence[dict[str, Any]]) -> str:
    """Return the report as text, with a line of totals."""
    rows = [[row["file"], row["type"], *(f"{row[name]:,}" for name in COUNTS)] for row in report]
    if len(report) > 1:
        totals = [sum(row[name] for row in report) for name in COUNTS]
        rows.append([f"{len(report)} files", "", *(f"{total:,}" for total in totals)])
    rows.insert(0, ["file", "type", *COUNTS])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_table_line(row, widths) for row in rows)


def _table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return one line: file and type are left-aligned, the counts right-aligned."""
    left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join(left + right)


def make_manifest(report: Sequence[dict[str, Any]], types: Sequence[str]) -> dict[str, Any]:
    """Return what the data consists of: files with sizes, documents, tokens and hashes, in order."""
    files = [{key: row[key] for key in MANIFEST_KEYS if key in row} for row in report]
    identity = [(file["file"], file["type"], file.get("bytes"), file.get("hash")) for file in files]
    digest = xxhash.xxh3_64_hexdigest(repr(identity).encode())
    return {"files": files, "types": list(types), "hash": digest}


def check_manifest(saved: dict[str, Any] | str | None, current: dict[str, Any]) -> None:
    """Compare a checkpoint's data (its manifest, or only the manifest's hash) with the current data.

    Raises:
        UserError: they differ; lists each file that was added, removed or changed, and the options.
    """
    saved_hash = saved.get("hash") if isinstance(saved, dict) else saved
    if saved is None or saved_hash == current["hash"]:
        return
    lines = [f"the data changed since the checkpoint ({saved_hash} -> {current['hash']})"]
    if isinstance(saved, dict):
        lines += _list_changes(saved["files"], current["files"])
    raise UserError(
        "\n".join(lines),
        where="data.train_folder",
        fix="restore the old files to resume with the same order, or start a new pass over the new files with the "
        'checkpoint\'s weights: ckpt.load_ckpt_info=dict(path=..., content=("model",)), auto_resume=False',
    )


def _list_changes(old_files: list[dict[str, Any]], new_files: list[dict[str, Any]]) -> list[str]:
    old = {file["file"]: file for file in old_files}
    new = {file["file"]: file for file in new_files}
    lines = [f"  removed: {name} ({file['hash']})" for name, file in old.items() if name not in new]
    lines += [f"  added: {name} ({file['hash']})" for name, file in new.items() if name not in old]
    changed = [name for name in old if name in new and old[name] != new[name]]
    lines += [f"  changed: {name} ({old[name]['hash']} -> {new[name]['hash']})" for name in changed]
    return lines or ["  the files are the same but their order differs"]


def find_warnings(
    report: Sequence[dict[str, Any]], sources: Sequence[BinDataset], config: DataConfig
) -> list[str]:
    """Return what a user should know before the run starts."""
    warnings = []
    for row, source in zip(report, sources, strict=True):
        name = row["file"]
        if row["packs"] == 0 and config.remainder != "carry":
            kept = int(source.lengths.sum(dtype=np.int64))
            warnings.append(
                f"{name} yields no pack: {kept:,} tokens after filtering, a pack needs {config.packed_length:,}"
            )
        if 0 < len(source.rows) < config.min_length:
            warnings.append(
                f"{name} has {len(source.rows)} documents, fewer than min_length {config.min_length} "
                "(min_length is a number of tokens per document, not of documents per file)"
            )
        repeated = _repeated_rows(source)
        if repeated:
            warnings.append(
                f"{name}: rows {repeated} .. {2 * repeated - 1} have the same sizes as rows 0 .. {repeated - 1}: "
                f"was the file written twice in append mode? check: evomesh data verify {source.path}"
            )
    return warnings


def _repeated_rows(source: BinDataset) -> int:
    """Return half the rows of a file whose second half repeats the first, else 0; looks at the meta only."""
    half, odd = divmod(len(source.rows), 2)
    if odd or half < 2:
        return 0
    first, second = source.rows[:half], source.rows[half:]
    middle = int(second[0, 0])
    same_lengths = np.array_equal(first[:, 1], second[:, 1])
    if not same_lengths or 2 * middle != source.size:
        return 0
    same_offsets = np.array_equal(first[:, 0], second[:, 0] - middle)
    return half if same_offsets else 0


def refuse_empty(config: DataConfig, sources: Sequence[BinDataset]) -> NoReturn:
    """Raise the UserError for files that hold not one pack: everything was filtered out, or there is too little."""
    stored = [int(source.rows[:, 1].sum(dtype=np.int64)) for source in sources]
    kept = [int(source.lengths.sum(dtype=np.int64)) for source in sources]
    if sum(kept) == 0 and sum(stored) > 0:
        _refuse_all_filtered(config, sources)
    largest = int(np.argmax(kept))
    raise UserError(
        f"no file holds a whole pack: {sum(kept):,} tokens in {len(sources)} file(s), "
        f"the largest, {sources[largest].name}, has {kept[largest]:,}, one pack needs {config.packed_length:,}",
        where="data.train_folder",
        expected=f"at least {config.packed_length:,} tokens (seq_len {config.seq_len} x micro_bsz {config.micro_bsz}) "
        "in one file",
        fix='add data, lower data.seq_len or data.micro_bsz, or join the ends of files with data.remainder="carry"',
    )


def _refuse_all_filtered(config: DataConfig, sources: Sequence[BinDataset]) -> NoReturn:
    lengths = np.concatenate([source.rows[:, 1] for source in sources])
    tenth, median, ninetieth = (int(np.percentile(lengths, q)) for q in (10, 50, 90))
    raise UserError(
        f"all {len(lengths):,} documents are shorter than the minimum length",
        where="data.min_length",
        expected=f"at most {int(lengths.max())} tokens, the longest document (shortest {int(lengths.min())}, "
        f"median {median}, 90 % {ninetieth}); min_length is {config.min_length}",
        fix=f"set data.min_length to {tenth} or less",
    )
