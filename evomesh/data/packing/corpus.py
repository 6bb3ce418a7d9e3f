"""All packs of the training files, and the stream of batches that a rank reads from them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evomesh.config.data import DataConfig
from evomesh.config.start_anew import WITHOUT_POSITION, start_anew
from evomesh.config.user import expand_home
from evomesh.data.config_folders import training_files
from evomesh.data.packing.loader import PackStream, StepSampler
from evomesh.data.packing.mixture import MixedSampler, group_packs
from evomesh.data.packing.packs import Pack, PackPlan
from evomesh.data.packing.report import (
    check_filtered,
    check_manifest,
    file_row,
    find_warnings,
    make_manifest,
    refuse_empty,
    report_table,
    source_row,
)
from evomesh.data.packing.rows import make_plan
from evomesh.data.packing.sampler import PackSampler, SamplerPosition
from evomesh.data.packing.synthetic import TRAIN_DOCUMENTS, TYPES, SyntheticDocuments
from evomesh.data.token_files.bin_dataset import BinDataset, LongLineCache
from evomesh.data.token_files.fingerprint import check_vocabulary
from evomesh.data.token_files.folders import assign_types, match_key
from evomesh.data.token_files.shared_index import remove_stale
from evomesh.errors import UserError
from evomesh.quantities import counted


class Corpus:
    """The packs of all streams, numbered in file order.

    Args:
        config: the ``data`` section; sets the order of the packs and the batches.
        plans: one per stream.
        types: type names; ``Batch.type_ids`` index into it.
        report: one row per file: name, type, documents, tokens, filtered (documents), dropped (tokens), packs.
        warnings: what a user should know before the run starts.
    """

    def __init__(
        self,
        config: DataConfig,
        plans: Sequence[PackPlan],
        types: Sequence[str] = (),
        report: Sequence[dict[str, Any]] = (),
        warnings: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.plans = list(plans)
        self.types = list(types)
        self.report = list(report)
        self.warnings = list(warnings)
        self._first_pack = np.cumsum([0, *map(len, plans)])

    def __len__(self) -> int:
        return self.num_packs

    @property
    def num_packs(self) -> int:
        return int(self._first_pack[-1])

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Description of the data, as JSON: files with their sizes, documents, tokens and hashes, in order."""
        return make_manifest(self.report, self.types)

    def with_config(self, config: DataConfig) -> Corpus:
        """Return the same packs in the order, and the batches, of another section."""
        warnings = list(self.warnings)
        if config.dataset_weights and config is not self.config:
            for warning in _unmatched(self.report, config.dataset_weights):
                if warning not in warnings:
                    warnings.append(warning)
        return Corpus(config, self.plans, self.types, self.report, warnings)

    def read(self, pack: int) -> Pack:
        """Read a pack by its number in the corpus; any thread may call this."""
        plan, number = self.locate(pack)
        return plan.read(number)

    def locate(self, pack: int) -> tuple[PackPlan, int]:
        """Return the stream that a pack of the corpus belongs to, and its number there."""
        number = int(np.searchsorted(self._first_pack, pack, side="right")) - 1
        return self.plans[number], pack - int(self._first_pack[number])

    def first_pack(self, plan: int) -> int:
        """Return the number in the corpus of the first pack of ``self.plans[plan]``."""
        return int(self._first_pack[plan])

    def sampler(self, dp_size: int) -> StepSampler:
        """Return what decides which packs make up each step of ``dp_size`` data-parallel ranks.

        Raises:
            UserError: there is less data than one step needs.
        """
        # Sizes count packs of all ranks together, so that the order of packs does not
        # depend on the layout.
        config = self.config
        global_batch = config.micro_num * dp_size
        rampup = (
            config.rampup_batch_size.times(dp_size)
            if config.rampup_batch_size
            else None
        )
        first_step = rampup.start if rampup else global_batch
        if self.num_packs < first_step:
            raise UserError(
                f"the data has {counted(self.num_packs, 'pack', '')} of {config.packed_length} tokens, "
                f"one step needs {first_step}",
                where="data.train_folder",
                expected=f"micro_num {config.micro_num} x {counted(dp_size, 'data-parallel rank')} = "
                f"{counted(global_batch, 'pack', '')}",
                fix="add data, or lower data.micro_num, data.micro_bsz or data.seq_len",
                code="EVO-DATA-017",
            )
        if config.dataset_weights:
            sources, _ = group_packs(self.report, config.dataset_weights)
            return MixedSampler(sources, config.seed, global_batch, rampup)
        return PackSampler(
            self.num_packs,
            config.seed,
            global_batch,
            rampup,
            config.order,
            unit=dp_size if config.order == "xtuner" else 1,
        )

    def stream(
        self, dp_rank: int = 0, dp_size: int = 1, state: dict[str, Any] | None = None
    ) -> PackStream:
        """Return the batches of one rank, from the first step or from where ``state`` was taken.

        Raises:
            UserError: there is less data than one step needs, or the state belongs to other data.
        """
        sampler = self.sampler(dp_size)
        start = SamplerPosition()
        if state is not None:
            check_manifest(state.get("manifest"), self.manifest)
            start = _resume_position(sampler, state, self.config.micro_num * dp_size)
        return PackStream(
            self,
            sampler,
            dp_rank=dp_rank,
            dp_size=dp_size,
            start=start,
            workers=self.config.num_worker,
            extra_state={"manifest": self.manifest["hash"]},
        )

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return one state for all ranks: each of theirs holds the global position."""
        return states[0]

    def table(self) -> str:
        """Return the report as text, with a line of totals."""
        return report_table(self.report)


def _resume_position(
    sampler: StepSampler, state: dict[str, Any], global_batch: int
) -> SamplerPosition:
    """Return the position to resume from: that of our state, or of InternEvo's, which has the same packs and order.

    XTuner's state has the number of steps alone.
    """
    if "xtuner" in state:
        return sampler.seek(int(state["xtuner"]["step"]))
    if "stages" in state:
        raise UserError(
            "the checkpoint was trained with data.stages, and this config has none",
            where="resuming the data position",
            fix=f"restore data.stages, or load only the weights: {start_anew()}",
            code="EVO-DATA-020",
        )
    theirs = state.get("internevo")
    if theirs is None:
        return sampler.resume(state)
    position = sampler.seek(int(theirs["step"]))
    ours = {
        "seed": sampler.seed if isinstance(sampler, PackSampler) else None,
        "global_batch": global_batch,
        "offset": position.offset,
    }
    different = [
        f"{name} {theirs[name]}, here {value}"
        for name, value in ours.items()
        if theirs[name] != value
    ]
    if different:
        raise UserError(
            f"InternEvo was at another position of the data after {theirs['step']} steps: {'; '.join(different)}",
            where="resuming the data position",
            expected="InternEvo's data, data.seed, micro_num x data-parallel size and rampup_batch_size",
            fix="set them to InternEvo's values, or do not load the position: "
            f"{start_anew(content=WITHOUT_POSITION)}",
            code="EVO-DATA-020",
        )
    return position


def open_corpus(config: DataConfig, vocab_size: int | None) -> Corpus:
    """Open every file of ``data.train_folder`` and plan its packs; synthetic data when there is no folder.

    Raises:
        UserError: no usable file, a broken one, or not one pack in all of them.
    """
    if config.train_folder is None:
        return _synthetic_corpus(config, vocab_size)

    # 1. Find the files and open them.
    shared = _shared_folder(config)
    sources, types = open_sources(config, vocab_size, shared)
    check_filtered(config, sources)

    # 2. Plan the packs: each file is a separate stream, or all files are one stream.
    streams = [[source] for source in sources]
    if config.remainder == "carry":
        streams = [sources]
    plans = [make_plan(stream, config, shared) for stream in streams]
    has_packs = any(map(len, plans))
    if not has_packs:
        refuse_empty(config, sources)

    # 3. Report what each file contributes.
    report = []
    for plan, stream in zip(plans, streams, strict=True):
        for source in stream:
            row = file_row(source, types, plan)
            report.append(row)
    warnings = find_warnings(report, sources, config)
    if config.dataset_weights:
        warnings += _unmatched(report, config.dataset_weights)
    return Corpus(config, plans, types, report, warnings)


def _unmatched(
    report: Sequence[dict[str, Any]], weights: dict[str, float]
) -> list[str]:
    """Return a warning for each file that no weight is for."""
    _, unmatched = group_packs(report, weights)
    return [
        f"{name} matches no key of data.dataset_weights and is not trained on"
        for name in unmatched
    ]


def _shared_folder(config: DataConfig) -> Path | None:
    """Return the folder of the arrays that the node's processes share, after removing those no run uses."""
    if not config.use_shm:
        return None
    folder = expand_home(config.shm_path)
    remove_stale(folder)
    return folder


def _synthetic_corpus(config: DataConfig, vocab_size: int | None) -> Corpus:
    documents = SyntheticDocuments(
        TRAIN_DOCUMENTS,
        config.seq_len,
        fixed_length=config.fixed_random_dataset_seqlen,
        vocab_size=vocab_size or 2**31,
    )
    # Nobody misses the end of synthetic data.
    plan = make_plan([documents], config.model_copy(update={"remainder": "drop"}))
    row = source_row(
        documents,
        TYPES[0],
        documents=TRAIN_DOCUMENTS,
        tokens=int(documents.lengths.sum()),
        plan=plan,
    )
    warning = "data.train_folder is None: training on synthetic counting sequences"
    return Corpus(config, [plan], TYPES, [row], [warning])


def open_sources(
    config: DataConfig, vocab_size: int | None = None, shared: Path | None = None
) -> tuple[list[BinDataset], list[str]]:
    """Open every file of ``data.train_folder``, without the documents that are too short for it.

    Returns:
        The files in their order, and the names of the types that they number.

    Raises:
        UserError: no usable file, or a broken one.
    """
    folder, files = training_files(config)
    types = assign_types(files, folder)
    if vocab_size is not None:
        check_vocabulary(files, vocab_size)
    last_long = LongLineCache()
    sources = []
    for file in files:
        key = match_key(file.name, config.min_length_dict, "data.min_length_dict")
        source = BinDataset(
            file.path,
            name=file.name,
            type_id=types.index(file.type),
            min_length=config.min_length
            if key is None
            else config.min_length_dict[key],
            vocab_size=vocab_size,
            last_long=last_long,
            shared=shared,
        )
        sources.append(source)
    return sources, types
