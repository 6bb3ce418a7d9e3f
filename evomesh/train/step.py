"""One optimizer step: forward and backward over the micro-batches, then one update."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evomesh.config.schema import LossConfig
from evomesh.data.batch import IGNORE, Batch
from evomesh.layers.loss import LossOutput
from evomesh.monitor.profile import region
from evomesh.optim.scaler import LossScaler
from evomesh.optim.zero import StepResult, ZeroOptimizer
from evomesh.parallel.collectives import sum_over
from evomesh.parallel.grid import Grid
from evomesh.pipeline.schedule import Schedule
from evomesh.train.tally import Tally


class StepBrokenOff(Exception):
    """A step ended between two micro-batches: its gradients are dropped, nothing else had changed."""


@dataclass(frozen=True)
class StepOutput:
    """Attributes:
    loss: the training objective, label smoothing included, per target token of the global batch.
    tally: sums over the global batch, by data type.
    update: gradient norm, and whether the update took place.
    fwd_bwd_time: seconds in forward and backward.
    """

    loss: float
    tally: Tally
    update: StepResult
    fwd_bwd_time: float


def seed_step(seed: int, step: int, dp_rank: int) -> None:
    """Random draws of a step (a user's own dropout, say) depend on nothing before it, so a resume needs no state."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_000_003 + dp_rank)


def train_step(
    schedule: Schedule,
    optimizer: ZeroOptimizer,
    scaler: LossScaler,
    batch: Batch,
    grid: Grid,
    loss: LossConfig,
    types: list[str],
    lr: float,
    beta2: float,
    broken_off: Callable[[int], bool] = lambda done: False,
) -> StepOutput:
    """Accumulates the gradient of the mean loss over all target tokens of the global batch, and applies it.

    The one division is by the global count of targets (invariant 4); with ``loss.reduction="micro_batch"`` each
    micro-batch is first averaged on its own, which weighs tokens of sparse micro-batches more.

    Raises:
        StepBrokenOff: ``broken_off``, asked between micro-batches with the number of those done, said so. It is not
            asked in a pipeline, whose stages are never between the same two.
    """
    started = time.perf_counter()
    tally = Tally(types, batch.input_ids.device)
    weights = micro_batch_weights(batch.labels, grid, loss)
    objective = torch.zeros((), dtype=torch.float64, device=batch.input_ids.device)
    optimizer.expect(len(weights))

    def count(index: int, output: LossOutput) -> None:
        objective.add_(output.scaled_sum.detach().double() / scaler.scale)
        tally.add(output, batch.labels[index], batch.type_ids[index])
        if grid.pp.size == 1 and index + 1 < len(weights) and broken_off(index + 1):
            optimizer.zero_grad()
            raise StepBrokenOff

    schedule.train(batch, [weight * scaler.scale for weight in weights], loss.label_smoothing, count)
    fwd_bwd_time = time.perf_counter() - started
    with region("optimizer"):
        update = optimizer.step(lr, beta2, 1.0 / scaler.scale)
    scaler.update(update.found)
    optimizer.zero_grad()
    objective = sum_over(objective, grid.dp, grid.pp)  # every rank of the last stage counted, no other
    return StepOutput(float(objective), tally.reduce(grid.dp, grid.pp), update, fwd_bwd_time)


def micro_batch_weights(labels: Tensor, grid: Grid, loss: LossConfig) -> list[float]:
    """What each micro-batch's sum of token losses is multiplied with; ``labels`` is [M, T] of this rank."""
    targets = (labels != IGNORE).sum(1)
    if loss.reduction == "micro_batch":
        count = len(targets) * grid.dp.size
        return [1.0 / (max(n, 1) * count) for n in targets.tolist()]
    total = int(sum_over(targets.sum(), grid.dp))
    return [1.0 / max(total, 1)] * len(targets)
