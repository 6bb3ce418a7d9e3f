"""All packs of the training files: what they are, in which order, what was left out, and what to refuse."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from evomesh.config.schema import DataConfig
from evomesh.data.packing.mixture import group_packs
from evomesh.data.packing.packs import PackedCorpus, PackPlan, PackRule
from evomesh.data.packing.synthetic import TRAIN_DOCUMENTS, TYPES, SyntheticDocuments
from evomesh.data.token_files.bin_dataset import BinDataset, DocumentSource, LongLineCache
from evomesh.data.token_files.fingerprint import check_vocabulary
from evomesh.data.token_files.folders import TokenFile, assign_types, check_folder, find_files
from evomesh.data.token_files.shared_index import remove_stale
from evomesh.errors import UserError

MAPPED = 3  # files mapped for each token file: itself, its meta, its cache
MAPPED_SHARED = 8  # and with use_shm: kept, lengths, starts, order, ends


@dataclass(frozen=True)
class Corpus:
    """All packs of a run.

    Attributes:
        packs: read by global number.
        types: type names; ``Batch.type_ids`` are places in it.
        manifest: what the data consists of, as JSON: files with sizes, documents, tokens and hashes, in order.
        report: one row a file: name, type, documents, tokens, filtered (documents), dropped (tokens), packs.
        warnings: what a user should know before the run starts.
    """

    packs: PackedCorpus
    types: list[str]
    manifest: dict[str, Any]
    report: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)

    @property
    def num_packs(self) -> int:
        return len(self.packs)

    def table(self) -> str:
        """The report as text, with a line of totals."""
        numbers = ("documents", "tokens", "filtered", "dropped", "packs")
        total = {name: sum(row[name] for row in self.report) for name in numbers}
        cells = [["file", "type", *numbers]]
        cells += [[row["file"], row["type"], *(f"{row[name]:,}" for name in numbers)] for row in self.report]
        if len(self.report) > 1:
            cells.append([f"{len(self.report)} files", "", *(f"{total[name]:,}" for name in numbers)])
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if n < 2 else cell.rjust(width)
                for n, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        )


def open_corpus(config: DataConfig, vocab_size: int | None) -> Corpus:
    """Open every file of ``data.train_folder`` and plan its packs; synthetic data when there is no folder.

    Raises:
        UserError: no usable file, a broken one, or not one pack in all of them.
    """
    rule = PackRule(config.packed_length, config.seq_len, config.pack_sample_into_one, config.order)
    if config.train_folder is None:
        documents = SyntheticDocuments(
            TRAIN_DOCUMENTS,
            config.seq_len,
            fixed_length=config.fixed_random_dataset_seqlen,
            vocab_size=vocab_size or 2**31,
        )
        plan = PackPlan([documents], rule)
        row = _row(documents, "en", len(documents.lengths), plan.tokens, plan)
        warning = "data.train_folder is None: training on synthetic counting sequences"
        return Corpus(PackedCorpus([plan]), TYPES, _manifest([row], TYPES), [row], [warning])
    folder = check_folder(config.train_folder, "data.train_folder")
    files = find_files(folder, "data.train_folder", config.data_order_path)
    types = assign_types(files, folder)
    if vocab_size is not None:
        check_vocabulary(files, vocab_size)
    shared = Path(config.shm_path) if config.use_shm else None
    if shared is not None:
        remove_stale(shared)
    _raise_open_file_limit(len(files) * (MAPPED_SHARED if shared else MAPPED))
    last_long = LongLineCache()
    sources = [
        BinDataset(
            file.path,
            name=file.name,
            type_id=types.index(file.type),
            min_length=_min_length(file, config),
            vocab_size=vocab_size,
            last_long=last_long,
            shared=shared,
        )
        for file in files
    ]
    streams: list[list[BinDataset]] = (
        [sources] if config.remainder == "carry" else [[source] for source in sources]
    )
    plans = [PackPlan(stream, rule, config.remainder, shared) for stream in streams]
    report = [
        _file_row(source, types, plan)
        for plan, stream in zip(plans, streams, strict=True)
        for source in stream
    ]
    corpus = PackedCorpus(plans)
    if not len(corpus):
        _refuse_empty(config, sources)
    warnings = _warnings(report, sources, config)
    if config.dataset_weights:
        names, packs = [row["file"] for row in report], [row["packs"] for row in report]
        _, alone = group_packs(names, packs, config.dataset_weights)
        warnings += [f"{name} matches no key of data.dataset_weights: it is not trained on" for name in alone]
    return Corpus(corpus, types, _manifest(report, types), report, warnings)


def check_manifest(saved: dict[str, Any] | str | None, current: dict[str, Any]) -> None:
    """Compare the data of a checkpoint (its manifest, or only the manifest's hash) with the data at hand.

    Raises:
        UserError: listing each file that was added, removed or changed, and the choices.
    """
    saved_hash = saved.get("hash") if isinstance(saved, dict) else saved
    if saved is None or saved_hash == current["hash"]:
        return
    lines = []
    if isinstance(saved, dict):
        old = {file["file"]: file for file in saved["files"]}
        new = {file["file"]: file for file in current["files"]}
        lines += [f"  removed: {name} ({old[name]['hash']})" for name in old if name not in new]
        lines += [f"  added: {name} ({new[name]['hash']})" for name in new if name not in old]
        changed = [name for name in old if name in new and old[name] != new[name]]
        lines += [f"  changed: {name} ({old[name]['hash']} -> {new[name]['hash']})" for name in changed]
        if not lines:
            lines = ["  the files are the same, their order is not"]
    raise UserError(
        "\n".join([f"the data changed since the checkpoint ({saved_hash} -> {current['hash']})", *lines]),
        where="data.train_folder",
        fix="restore the old files to go on with the same order, or start a new pass over the new ones with the "
        'checkpoint\'s weights: ckpt.load_ckpt_info=dict(path=..., content=("model",)), auto_resume=False',
    )


def _min_length(file: TokenFile, config: DataConfig) -> int:
    keys = [key for key in config.min_length_dict if key in file.name]
    if len(keys) > 1:
        raise UserError(
            f"the file matches several keys: {', '.join(keys)}",
            where=f"data.min_length_dict, {file.path}",
            expected="one key in the path",
        )
    return config.min_length_dict[keys[0]] if keys else config.min_length


def _row(
    source: DocumentSource, type_name: str, documents: int, tokens: int, plan: PackPlan
) -> dict[str, Any]:
    return {
        "file": source.name,
        "type": type_name,
        "documents": documents,
        "tokens": tokens,
        "filtered": documents - len(source.lengths),
        "dropped": plan.dropped,
        "packs": len(plan),
    }


def _file_row(source: BinDataset, types: list[str], plan: PackPlan) -> dict[str, Any]:
    tokens = int(source.rows[:, 1].sum(dtype=np.int64))
    row = _row(source, types[source.type_id], len(source.rows), tokens, plan)
    if len(plan.sources) > 1:  # one stream of all files: a pack counts for the file in which it ends
        number = plan.sources.index(source)
        before, after = (
            int(plan.ends[place - 1]) if place else 0 for place in plan.first[number : number + 2]
        )
        length = plan.rule.packed_length
        row |= {
            "packs": after // length - before // length,
            "dropped": plan.dropped if after == plan.tokens else 0,
        }
    row["bytes"] = source.size
    row["hash"] = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(source.rows).data)
    return row


def _manifest(report: list[dict[str, Any]], types: list[str]) -> dict[str, Any]:
    keys = ("file", "type", "documents", "tokens", "bytes", "hash")
    files = [{key: row[key] for key in keys if key in row} for row in report]
    text = repr([(file["file"], file["type"], file.get("bytes"), file.get("hash")) for file in files])
    return {"files": files, "types": types, "hash": xxhash.xxh3_64_hexdigest(text.encode())}


def _warnings(report: list[dict[str, Any]], sources: list[BinDataset], config: DataConfig) -> list[str]:
    found = []
    for row, source in zip(report, sources, strict=True):
        if row["packs"] == 0 and config.remainder != "carry":
            kept = int(source.lengths.sum(dtype=np.int64))
            found.append(
                f"{row['file']} yields nothing: {kept:,} tokens after filtering, a pack needs {config.packed_length:,}"
            )
        if 0 < len(source.rows) < config.min_length:
            found.append(
                f"{row['file']} has {len(source.rows)} documents, fewer than min_length {config.min_length}, which "
                "counts the tokens of a document here, not the documents of a file"
            )
        if doubled := _doubled(source):
            found.append(
                f"{row['file']}: rows {doubled} .. {2 * doubled - 1} repeat rows 0 .. {doubled - 1} in size: "
                f"was it written twice in append mode? check: evomesh data verify {source.path}"
            )
    return found


def _doubled(source: BinDataset) -> int:
    """Rows of a file that looks like one content twice, else 0: judged by the meta alone."""
    half, odd = divmod(len(source.rows), 2)
    if odd or half < 2:
        return 0
    same_lengths = np.array_equal(source.rows[:half, 1], source.rows[half:, 1])
    middle = int(source.rows[half, 0])
    same = same_lengths and 2 * middle == source.size
    return half if same and np.array_equal(source.rows[:half, 0], source.rows[half:, 0] - middle) else 0


def _refuse_empty(config: DataConfig, sources: list[BinDataset]) -> None:
    documents = sum(len(source.rows) for source in sources)
    tokens = sum(int(source.rows[:, 1].sum(dtype=np.int64)) for source in sources)
    kept = sum(int(source.lengths.sum(dtype=np.int64)) for source in sources)
    if kept == 0 and tokens:
        lengths = np.concatenate([source.rows[:, 1] for source in sources])
        marks = ", ".join(
            f"{name} {int(np.percentile(lengths, q))}" for name, q in (("median", 50), ("90 %", 90))
        )
        raise UserError(
            f"all {documents:,} documents are shorter than the minimum length",
            where="data.min_length",
            expected=f"at most the longest document's {int(lengths.max())} tokens "
            f"(shortest {int(lengths.min())}, {marks}); min_length is {config.min_length}",
            fix=f"set data.min_length to {int(np.percentile(lengths, 10))} or less",
        )
    best = max(sources, key=lambda source: int(source.lengths.sum(dtype=np.int64)))
    most = int(best.lengths.sum(dtype=np.int64))
    raise UserError(
        f"no file holds a whole pack: {kept:,} tokens in {len(sources)} file(s), "
        f"the largest, {best.name}, has {most:,}, one pack needs {config.packed_length:,}",
        where="data.train_folder",
        expected=f"at least {config.packed_length:,} tokens (seq_len {config.seq_len} x micro_bsz {config.micro_bsz}) "
        "in one file",
        fix='add data, lower data.seq_len or data.micro_bsz, or keep tails with data.remainder="carry"',
    )


def _raise_open_file_limit(handles: int) -> None:
    """Each mapped file keeps a handle: lift the soft limit where the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = handles + 256
    if soft < wanted and (hard == resource.RLIM_INFINITY or soft < hard):
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
