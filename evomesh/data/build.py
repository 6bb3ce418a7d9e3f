"""From the ``data`` section of a config to training batches and validation sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from evomesh.config.schema import DataConfig
from evomesh.config.step_values import BatchSizeRampup
from evomesh.data.packing.corpus import Corpus, check_manifest, open_corpus
from evomesh.data.packing.loader import BatchStream, PackStream, StepSampler
from evomesh.data.packing.mixture import MixedSampler, group_packs
from evomesh.data.packing.sampler import PackSampler, SamplerPosition
from evomesh.data.packing.streaming import open_streaming, read_documents
from evomesh.data.packing.synthetic import VALID_DOCUMENTS, SyntheticDocuments
from evomesh.data.packing.validation import ValidationSet, group_sets, open_set
from evomesh.data.token_files.bin_dataset import check_sources
from evomesh.data.token_files.fingerprint import check_same_tokenizer, check_vocabulary
from evomesh.data.token_files.folders import check_folder, find_files
from evomesh.errors import UserError

__all__ = [
    "BatchStream",
    "TrainData",
    "ValidationSet",
    "build_train_data",
    "build_valid_data",
    "check_manifest",
]


class TrainData(Protocol):
    """What a run is trained on.

    Attributes:
        types: type names; ``Batch.type_ids`` are places in it.
        num_packs: packs in one pass; 0 where that is not known beforehand.
        manifest: what the data consists of, as JSON, for ``check_manifest`` on a resume.
        report: one row a file.
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
        self, step: int = 0, dp_rank: int = 0, dp_size: int = 1, state: dict[str, Any] | None = None
    ) -> BatchStream:
        """Batches of one rank from step ``step``, or from where ``state`` was taken."""
        ...

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state for any layout from the states of all data-parallel ranks at the same step."""
        ...

    def table(self) -> str:
        """What each file gives, as text."""
        ...


@dataclass(frozen=True)
class PackedData:
    """Tokenised or synthetic data: a corpus and the section that says how to go through it."""

    config: DataConfig
    corpus: Corpus

    @property
    def types(self) -> list[str]:
        return self.corpus.types

    @property
    def manifest(self) -> dict[str, Any]:
        return self.corpus.manifest

    @property
    def report(self) -> list[dict[str, Any]]:
        return self.corpus.report

    @property
    def warnings(self) -> list[str]:
        return self.corpus.warnings

    @property
    def num_packs(self) -> int:
        return self.corpus.num_packs

    def stream(
        self, step: int = 0, dp_rank: int = 0, dp_size: int = 1, state: dict[str, Any] | None = None
    ) -> PackStream:
        """Batches of one rank from step ``step``, or from where ``state`` was taken.

        Raises:
            UserError: less data than one step, or the state belongs to other data.
        """
        config = self.config
        needed = config.micro_num * dp_size
        ramp_of_one_rank = config.rampup_batch_size
        rampup = ramp_of_one_rank.times(dp_size) if ramp_of_one_rank is not None else None
        first = rampup.start if rampup else needed
        if self.num_packs < first:
            raise UserError(
                f"the data gives {self.num_packs} pack(s) of {config.packed_length} tokens, one step needs {first}",
                where="data.train_folder",
                expected=f"micro_num {config.micro_num} x {dp_size} data-parallel rank(s) = {needed} packs",
                fix="add data, or lower data.micro_num, data.micro_bsz or data.seq_len",
            )
        sampler = self._sampler(needed, rampup, dp_size)
        if state is not None:
            check_manifest(state.get("manifest"), self.manifest)
        start = _start(sampler, state, needed) if state is not None else sampler.seek(step)
        extra = {"manifest": self.manifest["hash"]}
        return PackStream(self.corpus.packs, sampler, dp_rank, dp_size, start, config.num_worker, extra)

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return states[0]  # the position is global

    def table(self) -> str:
        return self.corpus.table()

    def _sampler(self, global_batch: int, rampup: BatchSizeRampup | None, dp_size: int) -> StepSampler:
        config = self.config
        if config.dataset_weights:
            rows = self.report
            sources, _ = group_packs(
                [row["file"] for row in rows], [row["packs"] for row in rows], config.dataset_weights
            )
            return MixedSampler(sources, config.seed, global_batch, rampup)
        unit = dp_size if config.order == "xtuner" else 1
        return PackSampler(self.num_packs, config.seed, global_batch, rampup, config.order, unit)


def _start(sampler: StepSampler, state: dict[str, Any], global_batch: int) -> SamplerPosition:
    """Where a saved state goes on: ours, or that of InternEvo, whose packs and order are the same by construction."""
    theirs = state.get("internevo")
    if theirs is None:
        return sampler.resume(state)
    found = sampler.seek(int(theirs["step"]))
    seed = sampler.seed if isinstance(sampler, PackSampler) else None
    here = {"seed": seed, "global_batch": global_batch, "offset": found.offset}
    wrong = [f"{name} {theirs[name]}, here {value}" for name, value in here.items() if theirs[name] != value]
    if wrong:
        raise UserError(
            f"InternEvo stood at another place of the data after {theirs['step']} steps: {'; '.join(wrong)}",
            where="resuming the data position",
            expected="its data, data.seed, micro_num x data-parallel size and rampup_batch_size",
            fix="set them so, or leave the position out: "
            'ckpt.load_ckpt_info=dict(path=..., content=("model", "optimizer", "scheduler")), auto_resume=False',
        )
    return found


def build_train_data(config: DataConfig, vocab_size: int) -> TrainData:
    """Open every file of ``data.train_folder`` and plan its packs; synthetic data when there is no folder.

    Small data is read whole, large data in part, so that a bad line ends the run before it has begun.

    Raises:
        UserError: no usable file, a broken one, or not one pack in all of them.
    """
    if config.type == "streaming":
        return open_streaming(config, vocab_size)
    corpus = open_corpus(config, vocab_size)
    check_sources([source for plan in corpus.packs.plans for source in plan.sources])
    return PackedData(config, corpus)


def build_valid_data(config: DataConfig, vocab_size: int) -> list[ValidationSet]:
    """The sets of ``data.valid_folder``; the documents' synthetic set "val" when there is no folder.

    Raises:
        UserError: no usable file, a broken one, or a tokenizer that differs from the training files'.
    """
    shape = (config.seq_len, config.micro_bsz, config.validation_micro_num)
    if config.valid_folder is None:
        synthetic = SyntheticDocuments(
            VALID_DOCUMENTS,
            config.seq_len,
            fixed_length=config.fixed_random_dataset_seqlen,
            vocab_size=vocab_size,
        )
        return [ValidationSet("val", [synthetic], *shape)]
    if config.type == "streaming":
        documents = read_documents(config, vocab_size)
        return [ValidationSet(documents.name, [documents], *shape)] if len(documents.lengths) else []
    folder = check_folder(config.valid_folder, "data.valid_folder")
    files = find_files(folder, "data.valid_folder")
    check_vocabulary(files, vocab_size)
    train = find_files(Path(config.train_folder), "data.train_folder") if config.train_folder else []
    check_same_tokenizer([*train, *files], config.allow_tokenizer_mismatch)
    sets = group_sets(files, folder.resolve().name)
    opened = [
        open_set(name, sets[name], min_length=config.valid_min_length, vocab_size=vocab_size, shape=shape)
        for name in sorted(sets)
    ]
    found = [one for one in opened if one is not None]
    check_sources([source for one in found for source in one.sources])
    return found
