"""Compute a step again that is a spike, and find the micro-batches, layers and documents that cause it.

Nothing is updated. One forward pass of the whole step gives the loss of each micro-batch
and the size of the activations that each layer returns. Then one backward pass for each
micro-batch, in which all others have no target, gives its part of the gradient: in all
layers together and in each of them. What a micro-batch or layer has is compared with
the median of the other micro-batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from evomesh.config.grad_profiling import GradProfilingConfig, layer_of
from evomesh.config.schema import IGNORE, Config
from evomesh.data.batch import Batch
from evomesh.data.build import TrainData
from evomesh.data.packing.corpus import Corpus
from evomesh.data.packing.ledger import LedgerEntry, StepLedger
from evomesh.data.packing.staged import StagedCorpus
from evomesh.data.tokenizer import Tokenizer, load_tokenizer
from evomesh.errors import UserError
from evomesh.layers.block_softmax import LossTerms
from evomesh.layers.loss import LossOutput
from evomesh.optim.gradient_profile import GradientProfile
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.collectives import all_gather_objects
from evomesh.parallel.grid import Axis, Grid
from evomesh.train.build import TrainingRun
from evomesh.train.court_text import SHOWN_MICRO_BATCHES, describe_court
from evomesh.train.stages import ModelStages
from evomesh.train.step import micro_batch_weights
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import Place

logger = logging.getLogger(__name__)

MOST_GRADIENTS = 64  # micro-batches of a step whose gradients are computed; of more, those with the highest losses
SHOWN_IDS = 64  # of a document
LAYER_NORM = "layer_grad_norm/"

BatchPlace = tuple[int, int]  # data-parallel rank, micro-batch


@dataclass
class ActivationSize:
    """Size of what a layer returned for one micro-batch, over the ranks that share it."""

    largest: float = 0.0
    squares: float = 0.0
    elements: int = 0
    not_finite: int = 0

    def add(self, other: ActivationSize) -> None:
        self.largest = max(self.largest, other.largest)
        self.squares += other.squares
        self.elements += other.elements
        self.not_finite += other.not_finite

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.elements) if self.elements else 0.0

    @classmethod
    def of(cls, output: Tensor) -> ActivationSize:
        wide = output.detach().double()
        is_finite = wide.isfinite()
        finite = torch.where(is_finite, wide, torch.zeros_like(wide))
        elements = finite.numel()
        if elements == 0:
            return cls()
        largest = finite.abs().max()
        squares = finite.square().sum()
        not_finite = elements - is_finite.sum()
        return cls(
            largest=float(largest),
            squares=float(squares),
            elements=elements,
            not_finite=int(not_finite),
        )


@dataclass
class MicroBatchFacts:
    """Facts of one micro-batch in the step."""

    loss: float = math.nan
    targets: int = 0
    grad_norm: float | None = None
    layer_norms: dict[str, float] = field(default_factory=dict)
    activations: dict[str, ActivationSize] = field(default_factory=dict)

    def add_loss(self, output: LossOutput, labels: Tensor) -> None:
        """Take the mean loss of the targets."""
        is_target = labels != IGNORE
        self.targets = int(is_target.sum())
        total = float(output.nll.double().sum())
        self.loss = total / max(self.targets, 1)

    def merge(self, other: MicroBatchFacts) -> None:
        """Take what another rank knows of the same micro-batch."""
        if other.targets:
            self.loss = other.loss
            self.targets = other.targets
        for name, size in other.activations.items():
            own = self.activations.setdefault(name, ActivationSize())
            own.add(size)


class StepCourt:
    """Examines a step; every rank of the run makes one, and calls it for the same step."""

    def __init__(
        self,
        config: Config,
        stages: ModelStages,
        optimizer: ZeroOptimizer,
        grid: Grid,
        train_data: TrainData,
    ) -> None:
        self.config = config
        self.stages = stages
        self.optimizer = optimizer
        self.grid = grid
        self.train_data = train_data
        profile = GradProfilingConfig(grad_norm_profiling=True)
        tied = config.model.tie_word_embeddings
        self.profile = GradientProfile(profile, optimizer.slots, grid, tied)

    def examine(self, step: int, batch: Batch) -> dict[str, Any]:
        """Return the facts of the step as a line for ``spikes.jsonl``; only the main rank has texts.

        Args:
            batch: of this rank, with its numbers for dropout.
        """
        with this_process().phase(Place.FORWARD_BACKWARD):
            batch = batch.to(self.optimizer.device)
            facts = self._forward(batch)
            self._gradients(batch, facts)
        order = sorted(facts, key=lambda place: _key(suspicion(facts, place)))
        rows = [_micro_batch_row(place, facts) for place in order]
        if self.grid.is_main:
            shown = rows[:SHOWN_MICRO_BATCHES]
            self._add_documents(step, shown, batch)
        accused = order[0]
        return {
            "event": "court",
            "step": step,
            "micro_batches": rows,
            "layers": layer_rows(facts, accused),
        }

    def _forward(self, batch: Batch) -> dict[BatchPlace, MicroBatchFacts]:
        """Return losses and activations of every micro-batch of all ranks."""
        grid = self.grid
        stages = self.stages
        own = [MicroBatchFacts() for _ in batch.tokens]

        def add(index: int, output: LossOutput) -> None:
            labels = batch.labels[index]
            facts = own[index]
            facts.add_loss(output, labels)

        observed = observed_layers(stages.models, own)
        with observed:
            stages.schedule.evaluate(batch, add)
        # Stages have different layers, and the last one the losses; tensor ranks have
        # parts of the activations.
        merged = own
        for axis in (grid.tp, grid.pp):
            merged = _merged(merged, axis)
        of_ranks = all_gather_objects(merged, grid.dp)
        return _by_place(of_ranks)

    def _gradients(
        self,
        batch: Batch,
        facts: dict[BatchPlace, MicroBatchFacts],
    ) -> None:
        """Add the parts that micro-batches have in the step's gradient: of all, or of those with the highest losses."""
        grid = self.grid
        weights = micro_batch_weights(batch.labels, grid, self.config.loss)
        by_loss = sorted(facts, key=lambda place: _key(facts[place].loss))
        examined = by_loss[:MOST_GRADIENTS]
        # In the same order on all ranks, which compute each gradient together.
        examined.sort()
        for place in examined:
            rank, index = place
            is_own = rank == grid.dp.rank
            part, scales = self._alone(batch, weights, index, is_own)
            found = facts[place]
            self._measure(part, scales, found)

    def _measure(
        self,
        batch: Batch,
        scales: Sequence[Tensor],
        found: MicroBatchFacts,
    ) -> None:
        """Add the gradient norms of a batch, of all weights and of each layer."""
        optimizer = self.optimizer
        optimizer.expect_micro_batches(len(scales))
        terms = LossTerms.of(self.config.loss)
        self.stages.schedule.train(batch, scales, terms, lambda *_: None)
        norm, measured = optimizer.measure_only(self.profile)
        found.grad_norm = float(norm)
        on_host = measured.cpu()
        figures = self.profile.figures(on_host, 1.0)
        for name, value in figures.scalars.items():
            if name.startswith(LAYER_NORM):
                layer = name.removeprefix(LAYER_NORM)
                found.layer_norms[layer] = value

    def _alone(
        self,
        batch: Batch,
        weights: Tensor,
        index: int,
        is_own: bool,
    ) -> tuple[Batch, Sequence[Tensor]]:
        """Return a batch in which one micro-batch has its targets, and no other one has any.

        Torch's pipelines need all micro-batches; a single stage computes this one alone.
        """
        labels = torch.full_like(batch.labels, IGNORE)
        if is_own:
            labels[index] = batch.labels[index]
        alone = replace(batch, labels=labels)
        if self.grid.pp.size > 1:
            return alone, weights.unbind()
        rows = slice(index, index + 1)
        part = _rows_of(alone, rows)
        scales = weights[rows].unbind()
        return part, scales

    def _add_documents(
        self, step: int, rows: list[dict[str, Any]], batch: Batch
    ) -> None:
        """Add the documents of these micro-batches, as the ledger has them."""
        corpus = self.train_data
        if not isinstance(corpus, Corpus | StagedCorpus):
            return
        ledger = StepLedger(corpus, self.grid.dp.size)
        tokenizer = _tokenizer(self.config)
        for row in rows:
            index = row["micro_batch"]
            entries = [
                entry
                for entry in ledger.step(step, row["rank"])
                if entry.micro_batch == index
            ]
            pack = corpus.read(entries[0].pack).tokens
            own = batch.tokens[index].cpu().numpy()
            is_own = row["rank"] == self.grid.dp.rank
            if is_own and not (own == pack).all():
                logger.warning("the ledger has another pack than step %d read", step)
                return
            row["pack"] = entries[0].pack
            row["documents"] = [_document(entry, pack, tokenizer) for entry in entries]


def _document(
    entry: LedgerEntry, pack: Any, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return a part of a document with its first ids, and its text if a tokenizer is known."""
    length = min(entry.stop - entry.start, SHOWN_IDS)
    ids = pack[entry.offset : entry.offset + length].tolist()
    shown: dict[str, Any] = {
        "file": entry.file,
        "row": entry.row,
        "start": entry.start,
        "stop": entry.stop,
        "ids": ids,
    }
    if tokenizer is not None:
        shown["text"] = tokenizer.decode(ids)
    return shown


def _tokenizer(config: Config) -> Tokenizer | None:
    path = config.data.tokenizer_path
    if path is None:
        return None
    try:
        return load_tokenizer(path, "data.tokenizer_path")
    except (UserError, OSError) as error:
        logger.warning("documents are shown as ids: %s", error)
        return None


def _by_place(
    of_ranks: Sequence[Sequence[MicroBatchFacts]],
) -> dict[BatchPlace, MicroBatchFacts]:
    """Return the facts of all data-parallel ranks by rank and micro-batch."""
    everything: dict[BatchPlace, MicroBatchFacts] = {}
    for rank, gathered in enumerate(of_ranks):
        for index, facts in enumerate(gathered):
            place = (rank, index)
            everything[place] = facts
    return everything


def _rows_of(batch: Batch, rows: slice) -> Batch:
    numbers = batch.numbers
    if numbers is not None:
        numbers = replace(numbers, tokens=numbers.tokens[rows])
    bounds = batch.host_bounds
    return replace(
        batch,
        tokens=batch.tokens[rows],
        labels=batch.labels[rows],
        position_ids=batch.position_ids[rows],
        type_ids=batch.type_ids[rows],
        cu_seqlens=batch.cu_seqlens[rows],
        host_bounds=None if bounds is None else bounds[rows],
        numbers=numbers,
    )


def _merged(own: list[MicroBatchFacts], axis: Axis) -> list[MicroBatchFacts]:
    """Return the facts of the same micro-batches, put together from the ranks of an axis."""
    if axis.size == 1:
        return own
    merged: list[MicroBatchFacts]
    merged, *others = all_gather_objects(own, axis)
    for gathered in others:
        for facts, added in zip(merged, gathered, strict=True):
            facts.merge(added)
    return merged


def examine_step(run: TrainingRun, step: int, batch: Batch, *, quietly: bool) -> None:
    """Log and record which micro-batches, documents and layers of a step stand out, with the present weights."""
    court = StepCourt(run.config, run.stages, run.optimizer, run.grid, run.train_data)
    row = court.examine(step, batch)
    run.spikes.log.write(row)
    if run.reporter.main:
        level = logging.INFO if quietly else logging.WARNING
        logger.log(level, "%s", "\n".join(describe_court(row)))


@contextmanager
def observed_layers(
    models: Sequence[nn.Module], facts: list[MicroBatchFacts]
) -> Iterator[None]:
    """Measure what each layer returns, in passes that run every micro-batch once, in ascending order."""

    def measure(
        name: str, counted: Iterator[int], _: nn.Module, __: Any, output: Any
    ) -> None:
        micro_batch = facts[next(counted)]
        if isinstance(output, Tensor):  # the head returns a loss
            micro_batch.activations[name] = ActivationSize.of(output)

    with ExitStack() as hooks:
        for model in models:
            for name, module in model.named_modules():
                if name and name == layer_of(f"{name}.weight"):
                    counted = iter(range(len(facts)))
                    hook = partial(measure, name, counted)
                    handle = module.register_forward_hook(hook)
                    hooks.callback(handle.remove)
        yield


def _key(value: float) -> float:
    """Return what sorts the largest value first, and one that is not finite before it."""
    return -value if math.isfinite(value) else -math.inf


def ratio(value: float | None, others: Sequence[float | None]) -> float:
    """Return a value over the median of others that are finite; infinity if it is not finite itself."""
    if value is None:
        return 0.0
    if not math.isfinite(value):
        return math.inf
    usual = [other for other in others if other is not None and math.isfinite(other)]
    if not usual or not median(usual):
        return 1.0
    return value / median(usual)


def suspicion(facts: Mapping[BatchPlace, MicroBatchFacts], place: BatchPlace) -> float:
    """Return how much larger loss or gradient of a micro-batch is than the median of the others."""
    found = facts[place]
    others = [other for key, other in facts.items() if key != place]
    by_loss = ratio(found.loss, [other.loss for other in others])
    by_norm = ratio(found.grad_norm, [other.grad_norm for other in others])
    return max(by_loss, by_norm)


def _micro_batch_row(
    place: BatchPlace, facts: Mapping[BatchPlace, MicroBatchFacts]
) -> dict[str, Any]:
    rank, index = place
    found = facts[place]
    return {
        "rank": rank,
        "micro_batch": index,
        "suspicion": suspicion(facts, place),
        "loss": found.loss,
        "targets": found.targets,
        "grad_norm": found.grad_norm,
    }


def layer_rows(
    facts: Mapping[BatchPlace, MicroBatchFacts], accused: BatchPlace
) -> list[dict[str, Any]]:
    """Return what each layer has for one micro-batch beside the median of the others, most suspicious first.

    Layers whose activations are not finite come first, in the order of the forward pass:
    the first of them is where it began.
    """
    found = facts[accused]
    others = [other for place, other in facts.items() if place != accused]
    rows = []
    for name in dict.fromkeys([*found.activations, *found.layer_norms]):
        size = found.activations.get(name, ActivationSize())
        sizes = [other.activations.get(name, ActivationSize()) for other in others]
        norm = found.layer_norms.get(name)
        norms = [other.layer_norms.get(name) for other in others]
        by_norm = ratio(norm, norms)
        by_activation = ratio(size.largest, [other.largest for other in sizes])
        rows.append(
            {
                "layer": name,
                "grad_norm": norm,
                "grad_norm_ratio": by_norm,
                "activation_max": size.largest,
                "activation_rms": size.rms,
                "activation_ratio": by_activation,
                "not_finite": size.not_finite,
            }
        )
    return sorted(rows, key=_layer_key)  # stable: the order of the forward pass


def _layer_key(row: Mapping[str, Any]) -> tuple[bool, float]:
    if row["not_finite"]:
        return False, 0.0
    return True, _key(max(row["grad_norm_ratio"], row["activation_ratio"]))
