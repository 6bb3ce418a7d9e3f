"""Draw packs from several sources in fixed shares (``data.dataset_weights``).

After n packs, a source of weight w has given ``count`` of them with ``|count - w n| < 1``, for every source and every n
(Tijdeman, "The chairman assignment problem", 1980). Each source walks through its own permutations and starts its next
pass when it is exhausted. Pack n of the mixture is a function of (packs, weights, seed, n).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evomesh.config.step_values import BatchSizeRampup
from evomesh.data.packing.sampler import PackSampler, SamplerPosition, step_size
from evomesh.data.token_files.folders import match_key
from evomesh.errors import UserError

WHERE = "data.dataset_weights"


class MixtureSchedule:
    """The order in which sources give packs, in exact integer arithmetic: it never drifts.

    Args:
        weights: positive, of any sum.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = _shares(weights)
        # Packs after which it repeats: the weights 1/2, 1/3 and 1/6 give 3, 2 and 1 of
        # every 6.
        denominators = [weight.denominator for weight in self.weights]
        self.period = math.lcm(*denominators)
        self._packs_in_period = [int(weight * self.period) for weight in self.weights]
        self._n = 0  # packs so far
        self._counts = [0] * len(weights)  # of them, packs of each source

    def counts(self, n: int) -> list[int]:
        """Return how many of the first n packs each source gives."""
        self._seek(n)
        return list(self._counts)

    def restore(self, n: int, counts: list[int]) -> None:
        """Jump to pack n; ``counts`` is what ``counts(n)`` returned."""
        self._n = n
        self._counts = list(counts)

    def take(self, n: int, size: int) -> list[int]:
        """Return the sources of packs ``[n, n + size)``."""
        self._seek(n)
        return [self._next_source() for _ in range(size)]

    def _seek(self, n: int) -> None:
        periods = n // self.period
        if n < self._n or periods > self._n // self.period:
            # After whole periods the counts are exact: start from there.
            self._n = periods * self.period
            self._counts = [periods * packs for packs in self._packs_in_period]
        while self._n < n:
            self._next_source()

    def _next_source(self) -> int:
        """Return the eligible source with the earliest deadline, and count its pack.

        With k sources and slack 1 / (2k - 2), a source of weight w that gave ``count``
        packs is eligible for pack n when ``w n - count >= slack``; its deadline is
        ``(count + 1 - slack) / w``.
        """
        self._n += 1
        inverse_slack = max(1, 2 * len(self.weights) - 2)
        deadlines = {}  # of the eligible sources
        for source, packs_in_period in enumerate(self._packs_in_period):
            # Both conditions are multiplied by period / slack, so that they compare
            # integers.
            count = self._counts[source]
            lag = packs_in_period * self._n - count * self.period
            if inverse_slack * lag >= self.period:
                deadlines[source] = Fraction(
                    inverse_slack * (count + 1) - 1, packs_in_period
                )
        source = min(deadlines, key=lambda eligible: deadlines[eligible])
        self._counts[source] += 1
        return source


def _shares(weights: Sequence[float]) -> list[Fraction]:
    """Return weights divided by their sum."""
    # The weight as a person writes it: Fraction("0.1") is 1 / 10, while Fraction(0.1)
    # is 3602879701896397 / 2**55, which would make the period astronomical.
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    return [weight / total for weight in exact]


class WeightedSource(NamedTuple):
    """A source of ``dataset_weights``: its name, its weight and the numbers of its packs in the corpus."""

    name: str
    weight: float
    packs: NDArray[np.int64]


class MixedSampler:
    """A ``PackSampler`` over weighted sources, with the same methods.

    Args:
        sources: the weighted sources.
        seed: seed of the permutations; each source has a separate generator with this seed.
        global_batch: packs in a step of full size.
        rampup: batch-size ramp-up.
    """

    def __init__(
        self,
        sources: Sequence[WeightedSource],
        seed: int,
        global_batch: int,
        rampup: BatchSizeRampup | None = None,
    ) -> None:
        self.names = [source.name for source in sources]
        self.packs = [source.packs for source in sources]
        self.schedule = MixtureSchedule([source.weight for source in sources])
        self.seed = seed
        self.global_batch = global_batch
        self.rampup = rampup
        self._samplers = [PackSampler(len(packs), seed, 1) for packs in self.packs]

    def size(self, step: int) -> int:
        """Return the global batch of step ``step``, in packs."""
        return step_size(step, self.global_batch, self.rampup)

    def take(
        self, position: SamplerPosition
    ) -> tuple[NDArray[np.int64], SamplerPosition]:
        """Return the packs of the step at ``position``, and the position after it."""
        size = self.size(position.step)
        counts = self.schedule.counts(position.consumed)
        packs, _ = self.draw(position.consumed, counts, size)
        after = self._position(
            position.step + 1,
            position.consumed + size,
        )
        return packs, after

    def draw(
        self,
        drawn: int,
        counts: Sequence[int],
        size: int,
    ) -> tuple[NDArray[np.int64], list[int]]:
        """Return packs ``[drawn, drawn + size)`` of the mixture, and the counts after them.

        Args:
            counts: packs that each source has given, in this mixture or before it.
        """
        # The schedule depends on the packs drawn so far alone: it names the source of
        # each of the next ones.
        counts_after = list(counts)
        packs = []
        for source in self.schedule.take(drawn, size):
            given = counts_after[source]
            pack = self._pack(source, given)
            packs.append(pack)
            counts_after[source] = given + 1
        return np.array(packs, np.int64), counts_after

    def _pack(self, source: int, number: int) -> int:
        """Return pack ``number`` of the endless passes over a source."""
        packs = self.packs[source]
        epoch, offset = divmod(number, len(packs))
        permutation = self._samplers[source].permutation(epoch)
        return int(packs[permutation[offset]])

    def seek(self, step: int) -> SamplerPosition:
        """Return the position before step ``step`` of a run that began at step 0."""
        consumed = step * self.global_batch
        if self.rampup is not None:
            consumed = sum(map(self.size, range(step)))
        return self._position(step, consumed)

    def state(self, position: SamplerPosition) -> dict[str, Any]:
        """Return one small JSON object that ``resume`` takes."""
        # Weights are fractions, which JSON does not have.
        weights = map(str, self.schedule.weights)
        num_packs = map(len, self.packs)
        counts = self.schedule.counts(position.consumed)
        rampup = None
        if self.rampup:
            rampup = asdict(self.rampup)
        return {
            "position": position.to_json(),
            "seed": self.seed,
            "rampup": rampup,
            "weights": self._by_name(weights),
            "num_packs": self._by_name(num_packs),
            "counts": self._by_name(counts),
        }

    def _by_name(self, values: Iterable[Any]) -> dict[str, Any]:
        return dict(zip(self.names, values, strict=True))

    def resume(self, state: dict[str, Any]) -> SamplerPosition:
        """Return the position of a saved state, after checking that it belongs to these sources.

        Raises:
            UserError: other sources, weights or seed.
        """
        current = self.state(SamplerPosition())
        for key in ("weights", "num_packs", "seed"):
            if state.get(key) != current[key]:
                raise UserError(
                    f"the checkpoint's data has {key} {state.get(key)}, this run has {current[key]}",
                    where=WHERE,
                    expected="the sources and weights that the checkpoint was trained with",
                    code="EVO-DATA-020",
                )
        if self.rampup is not None and state["rampup"] is not None:
            self.rampup = BatchSizeRampup(**state["rampup"])
        position = SamplerPosition(**state["position"])
        counts = [state["counts"][name] for name in self.names]
        self.schedule.restore(position.consumed, counts)
        return position

    def _position(self, step: int, consumed: int) -> SamplerPosition:
        """Return a position whose epoch is the smallest number of passes that any source has finished."""
        counts = self.schedule.counts(consumed)
        passes = [
            count // len(packs) for count, packs in zip(counts, self.packs, strict=True)
        ]
        return SamplerPosition(step, epoch=min(passes), offset=0, consumed=consumed)


def group_packs(
    report: Sequence[dict[str, Any]], weights: dict[str, float]
) -> tuple[list[WeightedSource], list[str]]:
    """Group the packs of a corpus into the sources of ``dataset_weights``.

    Args:
        report: one row per file, in order; its ``file`` is relative to the data folder.
        weights: weight by part of a file's name, such as ``"en/"`` or ``"code/github"``.

    Returns:
        the sources, and the files that belong to none.

    Raises:
        UserError: a weight is not positive, a key matches nothing, or a file matches two keys.
    """
    # 1. Packs are numbered through all files: those of a file are one range, which goes
    #    to the source whose key its name has.
    packs_of_key = {key: [np.empty(0, np.int64)] for key in weights}
    unmatched = []
    first_pack = 0
    for row in report:
        next_pack = first_pack + row["packs"]
        key = match_key(row["file"], weights, WHERE)
        if key is None:
            unmatched.append(row["file"])
        else:
            packs_of_key[key].append(np.arange(first_pack, next_pack))
        first_pack = next_pack

    # 2. One source for each weight; what could never be drawn is refused.
    sources = []
    for key, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise UserError(
                f"{key!r} has weight {weight}",
                where=WHERE,
                expected="a positive number",
                code="EVO-DATA-022",
            )
        packs = np.concatenate(packs_of_key[key])
        if not len(packs):
            names = ", ".join(row["file"] for row in report[:8])
            raise UserError(
                f"{key!r} matches no file that yields a pack (files: {names})",
                where=WHERE,
                expected="a part of a path below data.train_folder",
                code="EVO-DATA-022",
            )
        sources.append(WeightedSource(key, weight, packs))
    return sources, unmatched
