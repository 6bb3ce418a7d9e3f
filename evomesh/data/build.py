"""Open the training data and the validation sets that the ``data`` section of a config names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from evomesh.config.data import DataConfig
from evomesh.config.user import expand_home
from evomesh.data.config_folders import validation_files
from evomesh.data.packing.corpus import open_corpus
from evomesh.data.packing.loader import BatchStream
from evomesh.data.packing.packs import PackRule
from evomesh.data.packing.report import check_manifest
from evomesh.data.packing.staged import open_training_corpus
from evomesh.data.packing.streaming import open_streaming
from evomesh.data.packing.synthetic import VALID_DOCUMENTS, SyntheticDocuments
from evomesh.data.packing.text_documents import read_documents
from evomesh.data.packing.validation import ValidationSet
from evomesh.data.token_files.bin_dataset import (
    BinDataset,
    DocumentSource,
    check_sources,
)
from evomesh.data.token_files.fingerprint import (
    check_same_tokenizer,
    check_vocabulary,
    read_fingerprint,
)
from evomesh.data.token_files.folders import find_files, group_sets
from evomesh.errors import UserError

logger = logging.getLogger(__name__)

__all__ = [
    "BatchStream",
    "TrainData",
    "ValidationSet",
    "build_train_data",
    "build_valid_data",
    "check_manifest",
]


class TrainData(Protocol):
    """Training data of a run: a ``Corpus`` of token files, one of data stages, or ``StreamingData``.

    Attributes:
        types: type names; ``Batch.type_ids`` index into it.
        num_packs: packs in one pass; 0 if it is not known in advance.
        manifest: description of the data, as JSON, for ``check_manifest`` on a resume.
        report: one row per file.
        warnings: what a user should know before the run starts.
    """

    @property
    def types(self) -> list[str]: ...
    @property
    def num_packs(self) -> int: ...
    @property
    def manifest(self) -> dict[str, Any]: ...
    @property
    def report(self) -> list[dict[str, Any]]: ...
    @property
    def warnings(self) -> list[str]: ...
    def stream(
        self, dp_rank: int = 0, dp_size: int = 1, state: dict[str, Any] | None = None
    ) -> BatchStream:
        """Return the batches of one rank, from the first step or from where ``state`` was taken."""
        ...

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return one state for any layout from the states of all data-parallel ranks at the same step."""
        ...

    def table(self) -> str:
        """Return what each file contributes, as text."""
        ...


def build_train_data(config: DataConfig, vocab_size: int) -> TrainData:
    """Open every file of ``data.train_folder`` and plan its packs; synthetic data when there is no folder.

    Small data is read completely and large data in part, so that bad lines are found
    before the run starts.

    Raises:
        UserError: there is no usable file, one is broken, or all of them together do not fill a pack.
    """
    if config.type == "streaming":
        return open_streaming(config, vocab_size)
    corpus = open_training_corpus(config, vocab_size)
    # All sources together, since the share of each that is read depends on the size of all.
    sources: list[DocumentSource] = []
    for plan in corpus.plans:
        sources += plan.sources
    crosses_documents = PackRule.from_config(config).crosses_documents
    check_sources(sources, crosses_documents=crosses_documents)
    return corpus


def find_training_problems(config: DataConfig, folder: str) -> list[str]:
    """Return why a run with this ``data`` section would refuse the token files of a folder; none: it would train."""
    options = {"train_folder": folder, "type": "tokenized"}
    section = config.model_copy(update=options)
    try:
        open_corpus(section, None)
    except UserError as error:
        return [str(error)]
    return []


def build_valid_data(config: DataConfig, vocab_size: int) -> list[ValidationSet]:
    """Open the sets of ``data.valid_folder``; InternEvo's synthetic set "val" when there is no folder.

    Raises:
        UserError: there is no usable file, one is broken, its tokenizer differs from that of the training files, or a
            set has no target or no document that is long enough.
    """
    rule = PackRule(config.packed_length, config.seq_len)
    micro_num = config.validation_micro_num
    if config.valid_folder is None:
        synthetic = SyntheticDocuments(
            VALID_DOCUMENTS,
            config.seq_len,
            fixed_length=config.fixed_random_dataset_seqlen,
            vocab_size=vocab_size,
        )
        return [ValidationSet("val", [synthetic], rule, micro_num)]
    if config.type == "streaming":
        documents = read_documents(config, vocab_size)
        text_bytes = documents.text_bytes
        return [ValidationSet(documents.name, [documents], rule, micro_num, text_bytes)]
    return _open_valid_sets(config, vocab_size, rule)


def _open_valid_sets(
    config: DataConfig, vocab_size: int, rule: PackRule
) -> list[ValidationSet]:
    """Open the token files of ``data.valid_folder``: each folder is a set."""
    # 1. The files, which must have been made by the tokenizer of the training data.
    folder, files = validation_files(config)
    check_vocabulary(files, vocab_size)
    train_files = []
    if config.train_folder is not None:
        train_files = find_files(expand_home(config.train_folder), "data.train_folder")
    check_same_tokenizer([*train_files, *files], config.allow_tokenizer_mismatch)

    # 2. A set for each folder. Files without a document that is long enough are left
    #    out.
    sets = []
    all_sources: list[DocumentSource] = []
    groups = group_sets(files, folder.resolve().name)
    for name, members in groups.items():
        sources = []
        for file in members:
            source = BinDataset(
                file.path,
                name=file.name,
                min_length=config.valid_min_length,
                vocab_size=vocab_size,
            )
            sources.append(source)
        kept = [source for source in sources if len(source)]
        if not kept:
            raise _too_short(name, sources, config)
        valid_set = ValidationSet(
            name, kept, rule, config.validation_micro_num, _text_bytes(name, sources)
        )
        sets.append(valid_set)
        all_sources += kept
    check_sources(all_sources, crosses_documents=False)
    return sets


def _why_bytes_are_unknown(record: Mapping[str, Any]) -> str:
    schema = record.get("options", {}).get("schema")
    if schema is not None:
        return f"the bytes of conversations (schema {schema}) are not counted"
    return "its fingerprint has no text_bytes: tokenize the texts again with evomesh tokenize"


def _text_bytes(name: str, sources: Sequence[BinDataset]) -> int | None:
    """Return the bytes of the texts of a set, None if they are not known, which is logged."""
    total = 0
    for source in sources:
        record = read_fingerprint(source.path) or {}
        reason = ""
        if "text_bytes" not in record:
            reason = _why_bytes_are_unknown(record)
        elif len(source) < len(source.rows):
            reason = "data.valid_min_length leaves documents out"
        if reason:
            logger.info(
                "no bits per byte of validation set %s: %s: %s",
                name,
                source.name,
                reason,
            )
            return None
        total += int(record["text_bytes"])
    return total


def _too_short(
    name: str, sources: Sequence[BinDataset], config: DataConfig
) -> UserError:
    lengths = np.concatenate([source.rows[:, 1] for source in sources])
    longest = int(lengths.max())
    return UserError(
        f"none of the {len(lengths):,} documents of the validation set {name} has "
        f"data.valid_min_length={config.valid_min_length} tokens, the longest has {longest:,}",
        where="data.valid_folder",
        expected="at least one document that is long enough in every set",
        fix=f"lower data.valid_min_length to {longest} or less, or move the set out of the folder",
        code="EVO-DATA-018",
    )
