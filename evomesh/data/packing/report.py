"""Describe a corpus: one row per file for the user, a manifest for the checkpoint, warnings and refusals.

The rows and the manifest are plain JSON: the manifest is stored in every checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import xxhash

from evomesh.config.data import DataConfig
from evomesh.config.start_anew import start_anew
from evomesh.data.config_folders import absent_tokenizer
from evomesh.data.packing.packs import PackPlan
from evomesh.data.token_files.bin_dataset import BinDataset, DocumentSource
from evomesh.errors import UserError
from evomesh.quantities import counted

COUNTS = ("documents", "tokens", "filtered", "dropped", "packs")
MANIFEST_KEYS = ("file", "type", "documents", "tokens", "bytes", "hash")


def source_row(
    source: DocumentSource,
    type_name: str,
    *,
    documents: int,
    tokens: int,
    plan: PackPlan,
) -> dict[str, Any]:
    """Return the report row of a source that alone makes up a stream; ``documents`` includes the filtered ones."""
    return {
        "file": source.name,
        "type": type_name,
        "documents": documents,
        "tokens": tokens,
        "filtered": documents - len(source.lengths),
        "dropped": plan.dropped,
        "packs": len(plan),
    }


def file_row(
    source: BinDataset, types: Sequence[str], plan: PackPlan
) -> dict[str, Any]:
    """Return the report row of a token file, with its size and a hash of its meta."""
    row = source_row(
        source,
        types[source.type_id],
        documents=len(source.rows),
        tokens=source.tokens,
        plan=plan,
    )
    if len(plan.sources) > 1:
        row |= _share_of_stream(source, plan)
    row["bytes"] = source.size
    row["hash"] = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(source.rows).data)
    return row


def _share_of_stream(source: BinDataset, plan: PackPlan) -> dict[str, int]:
    """Return packs and dropped tokens of one file in a stream of all files: a pack counts where it ends."""
    number = plan.sources.index(source)
    start, end = (
        _tokens_before(plan, document)
        for document in plan.first_document[number : number + 2]
    )
    length = plan.rule.packed_length
    is_last = end == plan.tokens
    return {
        "packs": end // length - start // length,
        "dropped": plan.dropped if is_last else 0,
    }


def _tokens_before(plan: PackPlan, document: int) -> int:
    """Return the number of tokens in the stream before the document at this position."""
    return int(plan.document_ends[document - 1]) if document else 0


def report_table(report: Sequence[dict[str, Any]]) -> str:
    """Return the report as text, with a line of totals."""
    table = [["file", "type", *COUNTS]]
    for row in report:
        cells = _table_row(row["file"], row["type"], row)
        table.append(cells)
    if len(report) > 1:
        totals: Counter[str] = Counter()
        for row in report:
            for name in COUNTS:
                totals[name] += row[name]
        cells = _table_row(f"{len(report)} files", "", totals)
        table.append(cells)
    return _align_columns(table)


def _align_columns(table: Sequence[Sequence[str]]) -> str:
    """Return the table as text: names in the first two columns on the left, counts on the right."""
    columns = list(zip(*table, strict=True))
    names = [_align(cells, "<") for cells in columns[:2]]
    counts = [_align(cells, ">") for cells in columns[2:]]
    rows = zip(*names, *counts, strict=True)
    return "\n".join(map("  ".join, rows))


def _align(cells: Sequence[str], side: str) -> list[str]:
    """Pad the cells of a column to the width of the longest; ``side`` is "<" (left) or ">" (right)."""
    width = max(map(len, cells))
    return [f"{cell:{side}{width}}" for cell in cells]


def _table_row(file: str, type_name: str, counts: Mapping[str, int]) -> list[str]:
    return [file, type_name, *(f"{counts[name]:,}" for name in COUNTS)]


def make_manifest(
    report: Sequence[dict[str, Any]], types: Sequence[str]
) -> dict[str, Any]:
    """Describe the data: files with their sizes, documents, tokens and hashes, in order."""
    files = []
    identities = []
    for row in report:
        file = {key: row[key] for key in MANIFEST_KEYS if key in row}
        files.append(file)
        identities.append(_identity(file))
    # Checkpoints store this hash: another way to write it would refuse old ones.
    written = repr(identities)
    encoded = written.encode()
    digest = xxhash.xxh3_64_hexdigest(encoded)
    return {"files": files, "types": list(types), "hash": digest}


def _identity(file: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the facts that identify a file and its content; synthetic documents have neither bytes nor a hash."""
    return file["file"], file["type"], file.get("bytes"), file.get("hash")


def check_manifest(saved: dict[str, Any] | str | None, current: dict[str, Any]) -> None:
    """Compare a checkpoint's data (its manifest, or only the manifest's hash) with the current data.

    Raises:
        UserError: they differ; lists each file that was added, removed or changed, and the options.
    """
    saved_hash = saved.get("hash") if isinstance(saved, dict) else saved
    if saved is None or saved_hash == current["hash"]:
        return
    # Data stages may have been added, with further folders.
    present_parts = current.get("parts", [])
    saved_parts = saved.get("parts", []) if isinstance(saved, dict) else []
    if set(saved_parts or [saved_hash]) <= set(present_parts):
        return
    lines = [
        f"the data changed since the checkpoint ({saved_hash} -> {current['hash']})"
    ]
    if isinstance(saved, dict):
        lines += _list_changes(saved["files"], current["files"])
    raise UserError(
        "\n".join(lines),
        where="data.train_folder",
        fix="restore the old files to resume with the same order, or start a new pass over the new files with the "
        f"checkpoint's weights: {start_anew()}",
        code="EVO-DATA-020",
    )


def _list_changes(
    old_files: list[dict[str, Any]], new_files: list[dict[str, Any]]
) -> list[str]:
    """Return a line for each file that was removed, changed or added."""
    old = {file["file"]: file for file in old_files}
    new = {file["file"]: file for file in new_files}
    lines = []
    for name, file in old.items():
        content = _content(file)
        if name not in new:
            lines.append(f"  removed: {name} ({content})")
        elif new[name] != file:
            new_content = _content(new[name])
            lines.append(f"  changed: {name} ({content} -> {new_content})")
    for name, file in new.items():
        if name not in old:
            lines.append(f"  added: {name} ({_content(file)})")
    return lines or ["  the files are the same but their order differs"]


def _content(file: dict[str, Any]) -> str:
    """Return what identifies a file's content; random tokens of a run without data have no hash."""
    return str(file.get("hash", "no file"))


def find_warnings(
    report: Sequence[dict[str, Any]], sources: Sequence[BinDataset], config: DataConfig
) -> list[str]:
    """Return what a user should know before the run starts."""
    warnings = absent_tokenizer(config)
    for row, source in zip(report, sources, strict=True):
        name = row["file"]
        if row["packs"] == 0 and config.remainder != "carry":
            warnings.append(f"{name} yields no pack: {_missing(source, config)}")
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


def _missing(source: BinDataset, config: DataConfig) -> str:
    """Return what a file has and what a pack needs: tokens, or documents where each has a row."""
    if config.use_packed_dataset:
        return (
            f"{source.kept_tokens:,} tokens after filtering, "
            f"a pack needs {config.packed_length:,}"
        )
    return (
        f"{len(source):,} documents after filtering, a micro-batch needs "
        f"{config.micro_bsz:,}, one a row (data.use_packed_dataset=False)"
    )


def _repeated_rows(source: BinDataset) -> int:
    """Return half the number of rows of a file whose second half repeats the first, else 0.

    Only the meta is read, so the documents may still differ in their ids.
    """
    half, odd = divmod(len(source.rows), 2)
    if odd or half < 2:
        return 0
    middle = int(source.rows[half, 0])  # byte at which the second half starts
    if 2 * middle != source.size:
        return 0
    # Offsets of the second half are larger by the size of the first, the counts of
    # tokens are equal.
    first_half = source.rows[:half]
    second_half = source.rows[half:]
    expected = first_half + np.array([middle, 0])
    is_repeated = np.array_equal(second_half, expected)
    return half if is_repeated else 0


def refuse_empty(config: DataConfig, sources: Sequence[BinDataset]) -> NoReturn:
    """Refuse files that do not fill a single pack: every document was filtered out, or there is too little data.

    Raises:
        UserError: always.
    """
    stored = sum(source.tokens for source in sources)
    kept = sum(source.kept_tokens for source in sources)
    if kept == 0 and stored > 0:
        _refuse_all_filtered(config, sources)
    largest = max(sources, key=lambda source: source.kept_tokens)
    if not config.use_packed_dataset:
        raise UserError(
            f"no file fills a micro-batch: the largest, {largest.name}, has {_missing(largest, config)}",
            where="data.train_folder",
            expected=f"at least {counted(config.micro_bsz, 'document')} in one file",
            fix='add data, lower data.micro_bsz, or set data.remainder="carry" or "pad"',
            code="EVO-DATA-017",
        )
    raise UserError(
        f"no file fills a pack: {counted(kept, 'token')} in {counted(len(sources), 'file')}, "
        f"the largest, {largest.name}, has {largest.kept_tokens:,}, one pack needs {config.packed_length:,}",
        where="data.train_folder",
        expected=f"at least {config.packed_length:,} tokens (seq_len {config.seq_len} x micro_bsz {config.micro_bsz}) "
        "in one file",
        fix='add data, lower data.seq_len or data.micro_bsz, or join the ends of files with data.remainder="carry"',
        code="EVO-DATA-017",
    )


def check_filtered(config: DataConfig, sources: Sequence[BinDataset]) -> None:
    """Refuse a file whose documents are all shorter than the minimum length: it would vanish from the run.

    Raises:
        UserError: there is one, and other files have longer documents.
    """
    empty = [source for source in sources if source.tokens and not source.kept_tokens]
    if empty and len(empty) < len(sources):
        _refuse_all_filtered(config, empty[:1], f" of {empty[0].name}")


def _refuse_all_filtered(
    config: DataConfig, sources: Sequence[BinDataset], place: str = ""
) -> NoReturn:
    lengths = np.concatenate([source.rows[:, 1] for source in sources])
    tenth, median, ninetieth = np.percentile(lengths, (10, 50, 90)).astype(int)
    raise UserError(
        f"all {len(lengths):,} documents{place} are shorter than the minimum length",
        where="data.min_length",
        expected=f"at most {int(lengths.max())} tokens, the longest document (shortest {int(lengths.min())}, "
        f"median {median}, 90th percentile {ninetieth}); min_length is {config.min_length}",
        fix=f"set data.min_length to {tenth} or less, or that of the file in data.min_length_dict",
        code="EVO-DATA-018",
    )
