"""The packs of a run with data stages: those of every stage's data, in one numbering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from evomesh.config.data import DataConfig
from evomesh.config.data_stages import check_data_stages
from evomesh.config.start_anew import WITHOUT_POSITION, start_anew
from evomesh.data.packing.corpus import Corpus, open_corpus
from evomesh.data.packing.loader import PackStream
from evomesh.data.packing.mixture import MixedSampler
from evomesh.data.packing.packs import Pack, PackPlan
from evomesh.data.packing.report import check_manifest, make_manifest, report_table
from evomesh.data.packing.sampler import PackSampler, SamplerPosition
from evomesh.data.packing.staged_sampler import StagedSampler, StageSampler
from evomesh.errors import UserError


class StagedCorpus:
    """The corpora of all data stages; stages with the same folder and lengths share one.

    Args:
        config: the ``data`` section, with stages.
        corpora: different ones, in the order of the stages that first use them.
        of_stage: for each stage, its corpus with the stage's section, and the number of that corpus.
    """

    def __init__(
        self,
        config: DataConfig,
        corpora: Sequence[Corpus],
        of_stage: Sequence[tuple[Corpus, int]],
    ) -> None:
        self.config = config
        self.corpora = list(corpora)
        self.of_stage = list(of_stage)
        self.plans: list[PackPlan] = []
        type_names: dict[str, None] = {}  # a set that keeps the order
        for corpus in corpora:
            self.plans += corpus.plans
            type_names |= dict.fromkeys(corpus.types)
        self.types = list(type_names)
        self._first_of_plan = np.cumsum([0, *map(len, self.plans)])
        self._first_of_corpus = np.cumsum([0, *map(len, corpora)])
        # Types of each corpus, as numbers in the types of all.
        self._type_ids = [
            np.array([self.types.index(name) for name in corpus.types], np.int64)
            for corpus in corpora
        ]

    def __len__(self) -> int:
        return self.num_packs

    @property
    def num_packs(self) -> int:
        return int(self._first_of_corpus[-1])

    @cached_property
    def parts(self) -> list[Corpus]:
        """One corpus of each folder, in order: stages that only differ in lengths have the same files."""
        by_folder: dict[str | None, Corpus] = {}
        for corpus in self.corpora:
            by_folder.setdefault(corpus.config.train_folder, corpus)
        return list(by_folder.values())

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Description of the files of all folders; with one folder, that of a run without stages."""
        if len(self.parts) == 1:
            return self.parts[0].manifest
        rows: list[dict[str, Any]] = []
        hashes = []
        for number, corpus in enumerate(self.parts, 1):
            part_hash = corpus.manifest["hash"]
            hashes.append(part_hash)
            for row in corpus.report:
                numbered = dict(row)
                # Two folders may have files of one name.
                numbered["file"] = f"{number}:{row['file']}"
                rows.append(numbered)
        manifest = make_manifest(rows, self.types)
        joined = " ".join(hashes)
        manifest["hash"] = xxhash.xxh3_64_hexdigest(joined.encode())
        manifest["parts"] = hashes
        return manifest

    @property
    def report(self) -> list[dict[str, Any]]:
        return [row for corpus in self.corpora for row in corpus.report]

    @property
    def warnings(self) -> list[str]:
        """Each warning of a stage once."""
        found: dict[str, None] = {}
        for corpus, _ in self.of_stage:
            found |= dict.fromkeys(corpus.warnings)
        return list(found)

    def read(self, pack: int) -> Pack:
        """Read a pack by its number; any thread may call this."""
        number = self._corpus_of(pack)
        corpus = self.corpora[number]
        found = corpus.read(pack - int(self._first_of_corpus[number]))
        if corpus.types == self.types:
            return found
        return replace(found, type_ids=self._type_ids[number][found.type_ids])

    def locate(self, pack: int) -> tuple[PackPlan, int]:
        """Return the stream that a pack belongs to, and its number there."""
        number = self._corpus_of(pack)
        return self.corpora[number].locate(pack - int(self._first_of_corpus[number]))

    def first_pack(self, plan: int) -> int:
        """Return the number of the first pack of ``self.plans[plan]``."""
        return int(self._first_of_plan[plan])

    def _corpus_of(self, pack: int) -> int:
        return int(np.searchsorted(self._first_of_corpus, pack, side="right")) - 1

    def sampler(self, dp_size: int) -> StagedSampler:
        """Return what decides which packs make up each step of ``dp_size`` data-parallel ranks.

        Raises:
            UserError: a stage has less data than one step needs, or the stages do not fit the run.
        """
        check_data_stages(self.config, dp_size)
        sources: dict[str, int] = {}  # name -> packs
        stages = []
        for index, (corpus, number) in enumerate(self.of_stage):
            sampler = self._sampler_of(index, corpus, dp_size)
            drawn = _sources(sampler, number)
            for name, packs in drawn.items():
                sources.setdefault(name, packs)
            names = list(sources)
            stage = StageSampler(
                setting=self.config.stages[index],
                sampler=sampler,
                sources=tuple(names.index(name) for name in drawn),
                first_pack=int(self._first_of_corpus[number]),
                global_batch=corpus.config.micro_num * dp_size,
                pack_tokens=corpus.config.packed_length,
            )
            stages.append(stage)
        unit = dp_size if self.config.order == "xtuner" else 1
        return StagedSampler(
            stages,
            list(sources.items()),
            self.config.seed,
            self.config.order,
            unit,
        )

    def _sampler_of(
        self, index: int, corpus: Corpus, dp_size: int
    ) -> PackSampler | MixedSampler:
        try:
            sampler = corpus.sampler(dp_size)
        except UserError as error:
            raise UserError(
                f"data stage {index + 1}: {error.found}",
                where=error.where,
                expected=error.expected,
                fix=error.fix,
                code=error.code,
            ) from None
        assert isinstance(sampler, PackSampler | MixedSampler)
        return sampler

    def stream(
        self, dp_rank: int = 0, dp_size: int = 1, state: dict[str, Any] | None = None
    ) -> PackStream:
        """Return the batches of one rank, from the first step or from where ``state`` was taken.

        Raises:
            UserError: there is less data than one step needs, or the state belongs to other data or stages.
        """
        sampler = self.sampler(dp_size)
        start: SamplerPosition = sampler.start()
        manifest = self.manifest
        if state is not None:
            check_manifest(state.get("manifest"), manifest)
            start = _resume_position(sampler, state)
        return PackStream(
            self,
            sampler,
            dp_rank=dp_rank,
            dp_size=dp_size,
            start=start,
            workers=self.config.num_worker,
            extra_state={"manifest": manifest["hash"]},
        )

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return one state for all ranks: each of theirs holds the global position."""
        return states[0]

    def table(self) -> str:
        """Return the report of each different corpus as text, below the stages that use it."""
        parts = []
        for number, corpus in enumerate(self.corpora):
            users = [
                str(stage)
                for stage, (_, used) in enumerate(self.of_stage, 1)
                if used == number
            ]
            plural = "s" if len(users) > 1 else ""
            head = f"data stage{plural} {', '.join(users)}:"
            parts.append(f"{head}\n{report_table(corpus.report)}")
        return "\n".join(parts)


def _sources(sampler: PackSampler | MixedSampler, corpus: int) -> dict[str, int]:
    """Return the packs of each source of a stage, by a name that tells it from all others of the run."""
    if isinstance(sampler, PackSampler):
        return {str(corpus): sampler.num_packs}
    named = zip(sampler.names, sampler.packs, strict=True)
    return {f"{corpus}/{name}": len(packs) for name, packs in named}


def _resume_position(sampler: StagedSampler, state: dict[str, Any]) -> SamplerPosition:
    for system in ("xtuner", "internevo"):
        if system in state:
            raise UserError(
                f"the checkpoint is {system}'s, which has no data stages",
                where="data.stages",
                fix=f"do not load the position: {start_anew(content=WITHOUT_POSITION)}",
                code="EVO-DATA-020",
            )
    return sampler.resume(state)


def open_training_corpus(
    config: DataConfig, vocab_size: int | None
) -> Corpus | StagedCorpus:
    """Open the token files of a run, of all its data stages.

    Raises:
        UserError: no usable file, a broken one, or not one pack in all of them.
    """
    if not config.stages:
        return open_corpus(config, vocab_size)
    numbers: dict[tuple[Any, ...], int] = {}
    corpora: list[Corpus] = []
    of_stage = []
    for item in config.stages:
        section = item.section(config)
        key = (section.train_folder, section.seq_len, section.micro_bsz)
        if key not in numbers:
            numbers[key] = len(corpora)
            corpora.append(open_corpus(section, vocab_size))
        number = numbers[key]
        of_stage.append((corpora[number].with_config(section), number))
    staged = StagedCorpus(config, corpora, of_stage)
    if len(staged.parts) > 1:
        _name_by_folder(corpora)
    return staged


def _name_by_folder(corpora: Sequence[Corpus]) -> None:
    """Put the folder in front of the files' names: two folders may have files of the same name."""
    for corpus in corpora:
        folder = corpus.config.train_folder
        for plan in corpus.plans:
            for source in plan.sources:
                source.name = f"{folder}/{source.name}"
