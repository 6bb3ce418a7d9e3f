"""Which packs make up step s: a function of the number of packs, the seed, s and the global batch, of nothing else.

The documents' rule is: rank ``r`` of ``dp`` takes every dp-th index of one global permutation and ``micro_num`` of
those a step. All ranks together then consume contiguous slices of the permutation, ``G = micro_num * dp`` packs a
step, and rank ``r`` holds ``slice[r::dp]``. Slices of G depend on G alone, so a run can resume with another split of
the same G and see the same packs in the same steps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomesh.config.step_values import BatchSizeRampup
from evomesh.data.packing.packs import PackOrder
from evomesh.errors import UserError


@dataclass(frozen=True)
class SamplerPosition:
    """Where the data stands before a step; small enough for any checkpoint.

    Attributes:
        step: batches taken so far (also skipped ones).
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


class PackSampler:
    """Walks the permutations. Random access needs one index shuffle per finished pass, never a batch.

    Args:
        num_packs: packs in one pass.
        seed: of the permutations.
        global_batch: G, packs in a step of full size.
        rampup: batch-size warm-up; it counts steps over the whole run, not in each pass.
        order: "internevo": one generator goes on from pass to pass, a pass ends where no whole step fits;
            "xtuner": pass ``e`` is shuffled by ``seed + e``, steps go on across passes.
        unit: "xtuner" cuts a pass to a multiple of this many packs (the data-parallel size).
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
        self.num_packs, self.seed, self.global_batch = num_packs, seed, global_batch
        self.rampup, self.order, self.unit = rampup, order, unit
        self._epoch = -1
        self._rng = np.random.RandomState(seed)
        self._permutation: NDArray[np.int64] = np.empty(0, np.int64)
        self.pass_packs = num_packs // unit * unit if order == "xtuner" else num_packs
        if self.pass_packs < (1 if order == "xtuner" else self.size(0)):
            raise ValueError(f"{num_packs} packs do not fill one step of {self.size(0)}")

    def size(self, step: int) -> int:
        """Global packs of step ``step``."""
        return self.global_batch if self.rampup is None else self.rampup.size(step, self.global_batch)

    def take(self, position: SamplerPosition) -> tuple[NDArray[np.int64], SamplerPosition]:
        """Global packs of the step at ``position``, and the position behind it."""
        size = self.size(position.step)
        epoch, offset = position.epoch, position.offset
        if self.order == "internevo":
            if offset + size > self.pass_packs:
                epoch, offset = epoch + 1, 0
            if size > self.pass_packs:
                raise UserError(
                    f"step {position.step} needs {size} packs, the data has {self.pass_packs}",
                    where="data.rampup_batch_size",
                    fix="add data, or lower data.micro_num",
                )
            packs = self.permutation(epoch)[offset : offset + size]
            offset += size
        else:
            parts = []
            missing = size
            while missing:
                part = self.permutation(epoch)[offset : min(offset + missing, self.pass_packs)]
                parts.append(part)
                missing -= len(part)
                offset += len(part)
                if offset == self.pass_packs and missing:
                    epoch, offset = epoch + 1, 0
            packs = np.concatenate(parts)
        return packs, SamplerPosition(position.step + 1, epoch, offset, position.consumed + size)

    def seek(self, step: int) -> SamplerPosition:
        """Position before step ``step`` of a run that began at step 0."""
        position = SamplerPosition()
        if self.rampup is None and self.order == "internevo":
            epoch, inside = divmod(step, self.pass_packs // self.global_batch)
            return SamplerPosition(step, epoch, inside * self.global_batch, step * self.global_batch)
        while position.step < step:
            size, epoch, offset = self.size(position.step), position.epoch, position.offset
            if self.order == "xtuner":
                end = position.consumed + size
                epoch, offset = divmod(end, self.pass_packs)
                position = SamplerPosition(position.step + 1, epoch, offset, end)
            else:
                if offset + size > self.pass_packs:
                    epoch, offset = epoch + 1, 0
                position = SamplerPosition(position.step + 1, epoch, offset + size, position.consumed + size)
        return position

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Order of all packs in pass ``epoch``."""
        if self.order == "xtuner":
            if epoch != self._epoch:
                self._permutation = np.arange(self.num_packs)
                np.random.RandomState(self.seed + epoch).shuffle(self._permutation)
                self._epoch = epoch
            return self._permutation
        if epoch < self._epoch:
            self._epoch, self._rng = -1, np.random.RandomState(self.seed)
        while self._epoch < epoch:
            self._permutation = np.arange(self.num_packs)
            self._rng.shuffle(self._permutation)
            self._epoch += 1
        return self._permutation

    def state(self, position: SamplerPosition) -> dict[str, Any]:
        """One small JSON object, from which ``resume`` goes on."""
        return {
            "position": position.to_json(),
            "num_packs": self.num_packs,
            "seed": self.seed,
            "order": self.order,
            "unit": self.unit,
            "rampup": asdict(self.rampup) if self.rampup else None,
        }

    def resume(self, state: dict[str, Any]) -> SamplerPosition:
        """Position of a saved state, after checking that it belongs to this data.

        Raises:
            UserError: other data, seed or order: the remaining packs would not be the untrained ones.
        """
        own = self.state(SamplerPosition())
        for key in ("num_packs", "seed", "order"):
            if state[key] != own[key]:
                raise UserError(
                    f"the checkpoint's data has {key} {state[key]}, this run has {own[key]}",
                    where="resuming the data position",
                    expected="the data that the checkpoint was trained on",
                    fix='restore it, or take the weights only: ckpt.load_ckpt_info=dict(path=..., content=("model",))',
                )
        if self.rampup is not None and state["rampup"] is not None:
            self.rampup = BatchSizeRampup(
                **state["rampup"]
            )  # it is kept in global packs: another layout keeps the sizes
        self.unit = int(state["unit"])
        if self.order == "xtuner":
            self.pass_packs = self.num_packs // self.unit * self.unit
        return replace(SamplerPosition(), **state["position"])
