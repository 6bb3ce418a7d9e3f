"""Decide which packs make up step s: a function of the number of packs, the seed, s and the global batch only.

InternEvo's rule: rank r of dp takes every dp-th index of one global permutation,
``micro_num`` of them per step. All ranks together then consume contiguous slices of the
permutation, ``G = micro_num * dp`` packs per step, and rank r takes ``slice[r::dp]``.
The slices depend on G alone, so a run can resume in another layout with the same G and
see the same packs in the same steps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomesh.config.start_anew import start_anew
from evomesh.config.step_values import BatchSizeRampup
from evomesh.data.packing.packs import PackOrder
from evomesh.errors import UserError


@dataclass(frozen=True)
class SamplerPosition:
    """Position in the data before a step; small enough for any checkpoint.

    Attributes:
        step: batches taken so far, skipped ones included.
        epoch: passes finished.
        offset: packs taken from the current pass.
        consumed: packs taken in all.
    """

    step: int = 0
    epoch: int = 0
    offset: int = 0
    consumed: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def step_size(step: int, global_batch: int, rampup: BatchSizeRampup | None) -> int:
    """Return the number of packs in step ``step``, of all ranks together."""
    return global_batch if rampup is None else rampup.size(step, global_batch)


class PackSampler:
    """Go through all packs in passes, each in the order of one permutation.

    Random access costs one shuffle of indices per finished pass and never reads a
    batch.

    Args:
        num_packs: packs in one pass.
        seed: of the permutations.
        global_batch: G, packs in a step of full size.
        rampup: batch-size ramp-up; it counts steps over the whole run, not in each pass.
        order: "internevo": one generator is used for all passes, and a pass ends where no whole step is left;
            "xtuner": pass e is shuffled by ``seed + e``, and steps cross the end of a pass.
        unit: "xtuner" shortens a pass to a multiple of this many packs (the data-parallel size).
    """

    def __init__(
        self,
        num_packs: int,
        seed: int,
        global_batch: int,
        rampup: BatchSizeRampup | None = None,
        order: PackOrder = "internevo",
        unit: int = 1,
    ) -> None:
        self.num_packs = num_packs
        self.seed = seed
        self.global_batch = global_batch
        self.rampup = rampup
        self.order = order
        self.unit = unit
        self._rng = np.random.RandomState(seed)
        self._permutation: NDArray[np.int64] = np.empty(0, np.int64)
        self._epoch = -1  # the pass that the permutation belongs to
        fewest = 1 if order == "xtuner" else self.size(0)
        if self.pass_packs < fewest:
            raise ValueError(
                f"{num_packs} packs do not fill one step of {self.size(0)}"
            )

    @property
    def pass_packs(self) -> int:
        """Number of packs in one pass."""
        if self.order == "xtuner":
            return self.num_packs // self.unit * self.unit
        return self.num_packs

    def size(self, step: int) -> int:
        """Return the global batch of step ``step``, in packs."""
        return step_size(step, self.global_batch, self.rampup)

    def take(
        self, position: SamplerPosition
    ) -> tuple[NDArray[np.int64], SamplerPosition]:
        """Return the packs of all ranks for the step at ``position``, and the position after it."""
        size = self.size(position.step)
        if self.order == "xtuner":
            packs, epoch, offset = self._take_across_passes(position, size)
        else:
            packs, epoch, offset = self._take_within_pass(position, size)
        return packs, SamplerPosition(
            position.step + 1, epoch, offset, position.consumed + size
        )

    def _take_within_pass(
        self, position: SamplerPosition, size: int
    ) -> tuple[NDArray[np.int64], int, int]:
        """Return packs, epoch and offset after a step that is in one pass ("internevo")."""
        if size > self.pass_packs:
            raise UserError(
                f"step {position.step} needs {size} packs, the data has {self.pass_packs}",
                where="data.rampup_batch_size",
                fix="add data, or lower data.micro_num",
                code="EVO-DATA-017",
            )
        epoch, offset = self._start_of_step(position, size)
        return self.permutation(epoch)[offset : offset + size], epoch, offset + size

    def _take_across_passes(
        self, position: SamplerPosition, size: int
    ) -> tuple[NDArray[np.int64], int, int]:
        """Return packs, epoch and offset after a step that may cross into the next passes ("xtuner")."""
        epoch = position.epoch
        offset = position.offset
        parts = []
        missing = size
        while missing:
            stop = min(offset + missing, self.pass_packs)
            part = self.permutation(epoch)[offset:stop]
            parts.append(part)
            missing -= len(part)
            offset = stop
            if missing:
                epoch += 1
                offset = 0
        return np.concatenate(parts), epoch, offset

    def _start_of_step(self, position: SamplerPosition, size: int) -> tuple[int, int]:
        """Return epoch and offset of a step: the next pass starts where this one has fewer than ``size`` packs left."""
        if position.offset + size > self.pass_packs:
            return position.epoch + 1, 0
        return position.epoch, position.offset

    def seek(self, step: int) -> SamplerPosition:
        """Return the position before step ``step`` of a run that began at step 0."""
        if self.rampup is None and self.order == "internevo":
            steps_in_pass = self.pass_packs // self.global_batch
            epoch, steps_taken = divmod(step, steps_in_pass)
            offset = steps_taken * self.global_batch
            return SamplerPosition(
                step, epoch, offset, consumed=step * self.global_batch
            )
        # The size of steps changes, or steps cross passes: count step by step, without
        # looking at packs.
        position = SamplerPosition()
        while position.step < step:
            position = self.after(position)
        return position

    def after(self, position: SamplerPosition) -> SamplerPosition:
        """Return the position after the step at ``position``, without looking at packs."""
        size = self.size(position.step)
        consumed = position.consumed + size
        if self.order == "xtuner":
            epoch, offset = divmod(consumed, self.pass_packs)
        else:
            epoch, start = self._start_of_step(position, size)
            offset = start + size
        next_step = position.step + 1
        return SamplerPosition(next_step, epoch, offset, consumed)

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of all packs in pass ``epoch``."""
        if epoch == self._epoch:
            return self._permutation
        # XTuner seeds each pass, so any of them can be computed directly.
        if self.order == "xtuner":
            self._shuffle(np.random.RandomState((self.seed + epoch) % 2**32))
            self._epoch = epoch
            return self._permutation
        # InternEvo draws all passes from one generator: an earlier pass means starting
        # over.
        if epoch < self._epoch:
            self._rng = np.random.RandomState(self.seed)
            self._epoch = -1
        while self._epoch < epoch:
            self._shuffle(self._rng)
            self._epoch += 1
        return self._permutation

    def _shuffle(self, rng: np.random.RandomState) -> None:
        self._permutation = np.arange(self.num_packs)
        rng.shuffle(self._permutation)

    def state(self, position: SamplerPosition) -> dict[str, Any]:
        """Return one small JSON object that ``resume`` takes."""
        return {
            "position": position.to_json(),
            "num_packs": self.num_packs,
            "seed": self.seed,
            "order": self.order,
            "unit": self.unit,
            "rampup": asdict(self.rampup) if self.rampup else None,
        }

    def resume(self, state: dict[str, Any]) -> SamplerPosition:
        """Return the position of a saved state, after checking that it belongs to this data.

        Raises:
            UserError: other data, seed or order: the remaining packs would not be the untrained ones.
        """
        current = self.state(SamplerPosition())
        for key in ("num_packs", "seed", "order"):
            if state[key] != current[key]:
                raise UserError(
                    f"the checkpoint's data has {key} {state[key]}, this run has {current[key]}",
                    where="resuming the data position",
                    expected="the data that the checkpoint was trained on",
                    fix=f"restore it, or load only the weights: {start_anew()}",
                    code="EVO-DATA-020",
                )
        # Ramp-up and unit count packs of the global batch: those of the checkpoint keep
        # the steps in another layout.
        if self.rampup is not None and state["rampup"] is not None:
            self.rampup = BatchSizeRampup(**state["rampup"])
        self.unit = int(state["unit"])
        return SamplerPosition(**state["position"])
