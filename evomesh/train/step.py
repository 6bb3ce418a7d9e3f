"""One optimizer step: forward and backward over the micro-batches, then one update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from evomesh.config.schema import IGNORE, LossConfig
from evomesh.data.batch import Batch
from evomesh.layers.loss import LossOutput
from evomesh.monitor.profile import region
from evomesh.optim.scaler import LossScaler
from evomesh.optim.zero import StepResult, ZeroOptimizer
from evomesh.parallel.collectives import all_reduce_no_grad
from evomesh.parallel.grid import Grid
from evomesh.pipeline.schedule import Schedule
from evomesh.train.stopwatch import Stopwatch
from evomesh.train.tally import LossTally


class StepInterruptedError(Exception):
    """A step ended between two micro-batches: its gradients are dropped, nothing else had changed."""


@dataclass(frozen=True)
class StepOutput:
    """All figures are on the host.

    Attributes:
    loss: the training objective, label smoothing included, per target token of the global batch.
    tally: sums over the global batch, by data type.
    update: gradient norm, and whether the update took place.
    fwd_bwd_time: seconds in forward and backward.
    """

    loss: float
    tally: LossTally
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

    The host waits for the device once, behind the optimizer, to read the step's figures: targets are counted before
    the batch goes to the device, and whether the step is skipped is decided there.

    Args:
        batch: on the host; pinned, if there is a device to copy it to.

    Raises:
        StepBrokenOff: ``broken_off``, asked between micro-batches with the number of those done, said so. It is not
            asked in a pipeline, whose stages are never between the same two.
    """
    device = optimizer.device
    watch = Stopwatch(device)
    weights = micro_batch_weights(batch.labels, grid, loss)
    batch = batch.to(device)
    tally = LossTally(types, device)
    objective = torch.zeros((), dtype=torch.float64, device=device)
    optimizer.expect_micro_batches(len(weights))

    def count(index: int, output: LossOutput) -> None:
        objective.add_(output.scaled_sum.detach().double() / scaler.scale)
        tally.add(output, batch.labels[index], batch.type_ids[index])
        if grid.pp.size == 1 and index + 1 < len(weights) and broken_off(index + 1):
            optimizer.zero_grad()
            raise StepInterruptedError

    schedule.train(batch, [weight * scaler.scale for weight in weights], loss.label_smoothing, count)
    watch.stop()
    with region("optimizer"):
        norm = optimizer.step(lr, beta2, 1.0 / scaler.scale).norm
    optimizer.zero_grad()
    objective = all_reduce_no_grad(
        objective, grid.dp, grid.pp
    )  # every rank of the last stage counted, no other
    sums = tally.reduce(grid.dp, grid.pp).sums
    figures = on_host(torch.cat([norm[None], objective[None], sums.flatten()]))
    update = StepResult(figures[0])
    scaler.update(update.check)
    counted = LossTally(types, figures.device, figures[2:].view_as(sums))
    return StepOutput(float(figures[1]), counted, update, watch.seconds())


def on_host(figures: Tensor) -> Tensor:
    """The one host synchronisation of a step."""
    return figures.cpu()


def micro_batch_weights(labels: Tensor, grid: Grid, loss: LossConfig) -> list[float]:
    """What each micro-batch's sum of token losses is multiplied with; ``labels`` is [M, T] of this rank.

    They are counted, and summed over the ranks, where they lie: on the host no device has to wait for that.
    """
    targets = (labels != IGNORE).sum(1)
    if loss.reduction == "micro_batch":
        count = len(targets) * grid.dp.size
        return [1.0 / (max(n, 1) * count) for n in targets.tolist()]
    total = int(all_reduce_no_grad(targets.sum(), grid.dp))
    return [1.0 / max(total, 1)] * len(targets)
