"""``dataset_weights``: packs drawn from several sources in fixed shares.

Source i of weight w_i has given ``count_i`` packs after n of them, with ``|count_i - w_i n| < 1`` for every i and n
(Tijdeman, "The chairman assignment problem", 1980). Each source walks its own permutations and starts its next pass
when it is spent. Which pack stands at place n is a function of (packs, weights, seed, n).
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


class MixtureSchedule:
    """The order of sources: exact integer arithmetic, so it never drifts.

    Args:
        weights: positive, of any sum.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        fractions = [Fraction(str(weight)) for weight in weights]
        total = sum(fractions)
        self.weights = [fraction / total for fraction in fractions]
        self.period = int(np.lcm.reduce([weight.denominator for weight in self.weights]))
        self._parts = [int(weight * self.period) for weight in self.weights]
        self._n = 0
        self._counts = [0] * len(weights)

    def counts(self, n: int) -> list[int]:
        """Packs that each source has given after n in all."""
        self._seek(n)
        return list(self._counts)

    def restore(self, n: int, counts: list[int]) -> None:
        """Stand at place n at once: ``counts`` as ``counts(n)`` gave them."""
        self._n, self._counts = n, list(counts)

    def take(self, n: int, size: int) -> list[int]:
        """Sources of places ``[n, n + size)``."""
        self._seek(n)
        return [self._next() for _ in range(size)]

    def _seek(self, n: int) -> None:
        if n < self._n or n // self.period > self._n // self.period:
            whole = n // self.period  # after a whole period the counts are exact
            self._n, self._counts = whole * self.period, [whole * part for part in self._parts]
        while self._n < n:
            self._next()

    def _next(self) -> int:
        """Of the sources that may give a pack now, the one that must give it soonest."""
        self._n += 1
        slack = max(1, 2 * len(self._parts) - 2)
        best, deadline = -1, Fraction(0)
        for source, (part, count) in enumerate(zip(self._parts, self._counts, strict=True)):
            # eligible: w n - count >= 1 / (2k - 2); deadline: (count + 1 - 1 / (2k - 2)) / w
            if slack * (part * self._n - count * self.period) >= self.period:
                due = Fraction(slack * (count + 1) - 1, part)
                if best < 0 or due < deadline:
                    best, deadline = source, due
        self._counts[best] += 1
        return best


class MixedSampler:
    """A ``PackSampler`` over weighted sources, with the same methods.

    Args:
        sources: name, weight and global packs of each.
        seed: of the permutations; each source has its own generator of this seed.
        global_batch: packs in a step of full size.
        rampup: batch-size warm-up.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, float, NDArray[np.int64]]],
        seed: int,
        global_batch: int,
        rampup: BatchSizeRampup | None = None,
    ) -> None:
        self.names = [name for name, _, _ in sources]
        self.packs = [packs for _, _, packs in sources]
        self.shares = MixtureSchedule([weight for _, weight, _ in sources])
        self.seed, self.global_batch, self.rampup = seed, global_batch, rampup
        self._walks = [PackSampler(len(packs), seed, 1) for packs in self.packs]

    def size(self, step: int) -> int:
        """Global packs of step ``step``."""
        return self.global_batch if self.rampup is None else self.rampup.size(step, self.global_batch)

    def take(self, position: SamplerPosition) -> tuple[NDArray[np.int64], SamplerPosition]:
        """Global packs of the step at ``position``, and the position behind it (its epoch: the fewest passes)."""
        size = self.size(position.step)
        counts = self.shares.counts(position.consumed)
        packs = np.empty(size, np.int64)
        for place, source in enumerate(self.shares.take(position.consumed, size)):
            epoch, offset = divmod(counts[source], len(self.packs[source]))
            packs[place] = self.packs[source][self._walks[source].permutation(epoch)[offset]]
            counts[source] += 1
        return packs, self._at(position.step + 1, position.consumed + size)

    def seek(self, step: int) -> SamplerPosition:
        """Position before step ``step`` of a run that began at step 0."""
        return self._at(step, sum(map(self.size, range(step))) if self.rampup else step * self.global_batch)

    def state(self, position: SamplerPosition) -> dict[str, Any]:
        """One small JSON object, from which ``resume`` goes on."""
        counts = self.shares.counts(position.consumed)
        return {
            "position": position.to_json(),
            "seed": self.seed,
            "rampup": vars(self.rampup) if self.rampup else None,
            "weights": {
                name: str(weight) for name, weight in zip(self.names, self.shares.weights, strict=True)
            },
            "num_packs": {name: len(packs) for name, packs in zip(self.names, self.packs, strict=True)},
            "counts": dict(zip(self.names, counts, strict=True)),
        }

    def resume(self, state: dict[str, Any]) -> SamplerPosition:
        """Position of a saved state, after checking that it belongs to these sources.

        Raises:
            UserError: other sources, weights or seed.
        """
        own = self.state(SamplerPosition())
        for key in ("weights", "num_packs", "seed"):
            if state.get(key) != own[key]:
                raise UserError(
                    f"the checkpoint's data has {key} {state.get(key)}, this run has {own[key]}",
                    where="data.dataset_weights",
                    expected="the sources and weights that the checkpoint was trained with",
                )
        if self.rampup is not None and state["rampup"] is not None:
            self.rampup = BatchSizeRampup(**state["rampup"])
        position = SamplerPosition(**state["position"])
        self.shares.restore(position.consumed, [state["counts"][name] for name in self.names])
        return position

    def _at(self, step: int, consumed: int) -> SamplerPosition:
        counts = self.shares.counts(consumed)
        epoch = min(count // len(packs) for count, packs in zip(counts, self.packs, strict=True))
        return SamplerPosition(step, epoch, 0, consumed)


def group_packs(
    files: Sequence[str], packs: Sequence[int], weights: dict[str, float]
) -> tuple[list[tuple[str, float, NDArray[np.int64]]], list[str]]:
    """Sources of ``dataset_weights``: the packs of all files whose path below the data folder holds the key.

    Args:
        files: names in order.
        packs: number of packs of each.
        weights: by part of a path, such as ``"en/"`` or ``"code/github"``.

    Returns:
        the sources, and the files that belong to none.

    Raises:
        UserError: a weight is not positive, a key matches nothing, or a file matches two keys.
    """
    where = "data.dataset_weights"
    found: dict[str, list[NDArray[np.int64]]] = {key: [] for key in weights}
    starts = np.cumsum([0, *packs])
    alone = []
    for name, start, count in zip(files, starts, packs, strict=False):
        keys = [key for key in weights if key in name]
        if len(keys) > 1:
            raise UserError(
                f"{name} matches several keys: {', '.join(keys)}", where=where, expected="one key in a path"
            )
        if keys:
            found[keys[0]].append(np.arange(start, start + count))
        else:
            alone.append(name)
    for key, weight in weights.items():
        if not weight > 0 or weight == float("inf"):
            raise UserError(f"{key!r} has weight {weight}", where=where, expected="a positive number")
        if not sum(map(len, found[key])):
            raise UserError(
                f"{key!r} matches no file that gives a pack (files: {', '.join(files[:8])})",
                where=where,
                expected="a part of a path below data.train_folder",
            )
    return [(key, weight, np.concatenate(found[key])) for key, weight in weights.items()], alone
