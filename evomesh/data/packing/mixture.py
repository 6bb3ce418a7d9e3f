"""``dataset_weights``: draw packs from several sources in fixed shares.

After n packs, a source of weight w has given ``count`` of them with ``|count - w n| < 1``, for every source and every n
(Tijdeman, "The chairman assignment problem", 1980). Each source walks through its own permutations and starts its next
pass when it is exhausted. Pack n of the mixture is a function of (packs, weights, seed, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomesh.config.step_values import BatchSizeRampup
from evomesh.data.packing.sampler import PackSampler, SamplerPosition
from evomesh.errors import UserError

WHERE = "data.dataset_weights"


class MixtureSchedule:
    """The order in which sources give packs, in exact integer arithmetic: it never drifts.

    Args:
        weights: positive, of any sum.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        fractions = [Fraction(str(weight)) for weight in weights]
        total = sum(fractions)
        self.weights = [fraction / total for fraction in fractions]
        denominators = [weight.denominator for weight in self.weights]
        self.period = int(np.lcm.reduce(denominators))
        self._packs_in_period = [int(weight * self.period) for weight in self.weights]
        self._n = 0
        self._counts = [0] * len(weights)

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

        With k sources and slack 1 / (2k - 2), a source of weight w that gave ``count`` packs is eligible for pack n
        when ``w n - count >= slack``; its deadline is ``(count + 1 - slack) / w``.
        """
        self._n += 1
        inverse_slack = max(1, 2 * len(self.weights) - 2)
        best = -1
        earliest = Fraction(0)
        for source, (packs_in_period, count) in enumerate(
            zip(self._packs_in_period, self._counts, strict=True)
        ):
            # Both conditions are multiplied by period / slack, so that they compare integers.
            lead = packs_in_period * self._n - count * self.period
            if inverse_slack * lead < self.period:
                continue
            deadline = Fraction(inverse_slack * (count + 1) - 1, packs_in_period)
            if best < 0 or deadline < earliest:
                best = source
                earliest = deadline
        self._counts[best] += 1
        return best


class MixedSampler:
    """A ``PackSampler`` over weighted sources, with the same methods.

    Args:
        sources: name, weight and packs of the corpus for each source.
        seed: of the permutations; each source has its own generator with this seed.
        global_batch: packs in a step of full size.
        rampup: batch-size ramp-up.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, float, NDArray[np.int64]]],
        seed: int,
        global_batch: int,
        rampup: BatchSizeRampup | None = None,
    ) -> None:
        self.names = [name for name, _, _ in sources]
        self.schedule = MixtureSchedule([weight for _, weight, _ in sources])
        self.packs = [packs for _, _, packs in sources]
        self.seed = seed
        self.global_batch = global_batch
        self.rampup = rampup
        self._samplers = [PackSampler(len(packs), seed, 1) for packs in self.packs]

    def size(self, step: int) -> int:
        """Return the global batch of step ``step``, in packs."""
        return self.global_batch if self.rampup is None else self.rampup.size(step, self.global_batch)

    def take(self, position: SamplerPosition) -> tuple[NDArray[np.int64], SamplerPosition]:
        """Return the packs of the step at ``position``, and the position after it."""
        size = self.size(position.step)
        counts = self.schedule.counts(position.consumed)
        packs = np.empty(size, np.int64)
        for index, source in enumerate(self.schedule.take(position.consumed, size)):
            source_packs = self.packs[source]
            epoch, offset = divmod(counts[source], len(source_packs))
            permutation = self._samplers[source].permutation(epoch)
            packs[index] = source_packs[permutation[offset]]
            counts[source] += 1
        return packs, self._position(position.step + 1, position.consumed + size)

    def seek(self, step: int) -> SamplerPosition:
        """Return the position before step ``step`` of a run that began at step 0."""
        if self.rampup is None:
            return self._position(step, step * self.global_batch)
        return self._position(step, sum(map(self.size, range(step))))

    def state(self, position: SamplerPosition) -> dict[str, Any]:
        """Return one small JSON object that ``resume`` takes."""
        weights = [str(weight) for weight in self.schedule.weights]
        num_packs = [len(packs) for packs in self.packs]
        counts = self.schedule.counts(position.consumed)
        return {
            "position": position.to_json(),
            "seed": self.seed,
            "rampup": vars(self.rampup) if self.rampup else None,
            "weights": dict(zip(self.names, weights, strict=True)),
            "num_packs": dict(zip(self.names, num_packs, strict=True)),
            "counts": dict(zip(self.names, counts, strict=True)),
        }

    def resume(self, state: dict[str, Any]) -> SamplerPosition:
        """Return the position of a saved state, after checking that it belongs to these sources.

        Raises:
            UserError: other sources, weights or seed.
        """
        own = self.state(SamplerPosition())
        for key in ("weights", "num_packs", "seed"):
            if state.get(key) != own[key]:
                raise UserError(
                    f"the checkpoint's data has {key} {state.get(key)}, this run has {own[key]}",
                    where=WHERE,
                    expected="the sources and weights that the checkpoint was trained with",
                )
        if self.rampup is not None and state["rampup"] is not None:
            self.rampup = BatchSizeRampup(**state["rampup"])
        position = SamplerPosition(**state["position"])
        self.schedule.restore(position.consumed, [state["counts"][name] for name in self.names])
        return position

    def _position(self, step: int, consumed: int) -> SamplerPosition:
        """Return a position whose epoch is the smallest number of passes that any source has finished."""
        counts = self.schedule.counts(consumed)
        passes = [count // len(packs) for count, packs in zip(counts, self.packs, strict=True)]
        return SamplerPosition(step, min(passes), 0, consumed)


def group_packs(
    files: Sequence[str], num_packs: Sequence[int], weights: dict[str, float]
) -> tuple[list[tuple[str, float, NDArray[np.int64]]], list[str]]:
    """Group the packs of a corpus into the sources of ``dataset_weights``.

    Args:
        files: names in order, relative to the data folder.
        num_packs: number of packs of each.
        weights: by part of a name, such as ``"en/"`` or ``"code/github"``.

    Returns:
        name, weight and packs of each source, and the files that belong to none.

    Raises:
        UserError: a weight is not positive, a key matches nothing, or a file matches two keys.
    """
    packs_of_key: dict[str, list[NDArray[np.int64]]] = {key: [] for key in weights}
    unmatched = []
    first_packs = np.cumsum([0, *num_packs])[:-1]
    for name, first, count in zip(files, first_packs, num_packs, strict=True):
        keys = [key for key in weights if key in name]
        if len(keys) > 1:
            raise UserError(
                f"{name} matches several keys: {', '.join(keys)}",
                where=WHERE,
                expected="at most one key that is part of the path",
            )
        if keys:
            packs_of_key[keys[0]].append(np.arange(first, first + count))
        else:
            unmatched.append(name)
    sources = []
    for key, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise UserError(f"{key!r} has weight {weight}", where=WHERE, expected="a positive number")
        packs = np.concatenate([np.empty(0, np.int64), *packs_of_key[key]])
        if not len(packs):
            raise UserError(
                f"{key!r} matches no file that gives a pack (files: {', '.join(files[:8])})",
                where=WHERE,
                expected="a part of a path below data.train_folder",
            )
        sources.append((key, weight, packs))
    return sources, unmatched
