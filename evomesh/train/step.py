"""One optimizer step: forward and backward over the micro-batches, then one update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evomesh.config.schema import IGNORE, LossConfig
from evomesh.data.batch import Batch
from evomesh.layers.block_softmax import LossTerms
from evomesh.layers.loss import LossOutput
from evomesh.monitor.profile import region
from evomesh.optim.clip import UpdateLimits
from evomesh.optim.gradient_profile import GradientFigures, GradientObserver
from evomesh.optim.scaler import LossScaler
from evomesh.optim.zero import StepResult, ZeroOptimizer
from evomesh.parallel.collectives import all_reduce_no_grad
from evomesh.parallel.grid import Grid
from evomesh.pipeline.schedule import Schedule
from evomesh.train.stopwatch import Stopwatch
from evomesh.train.tally import LossTally
from evomesh.watchdog.activity import this_process
from evomesh.watchdog.ring import Place


@dataclass(frozen=True)
class StepOutput:
    """The results of one step; every value is on the host.

    Attributes:
        loss: the training objective, label smoothing and z-loss included, per target token of the global batch.
        tally: sums over the global batch, by data type.
        update: gradient norm, and whether the update was applied.
        fwd_bwd_time: seconds in forward and backward.
        z_loss: the part of ``loss`` that is z-loss.
        gradients: figures of single layers; None in steps that are not profiled.
        left_out: the step was beyond its limits: no update, and not counted by the loss scale.
    """

    loss: float
    tally: LossTally
    update: StepResult
    fwd_bwd_time: float = 0.0
    z_loss: float = 0.0
    gradients: GradientFigures | None = None
    left_out: bool = False


def seed_step(seed: int, step: int, dp_rank: int) -> None:
    """Seed torch's generator for one step, so that random draws (a custom model's dropout) resume without state."""
    # Distinct for all steps and ranks below a million: no two of them draw the same
    # numbers.
    mixed = (seed * 1_000_003 + step) * 1_000_003 + dp_rank
    number = mixed % 2**63  # torch refuses numbers of more than 64 bits
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.manual_seed(number)
    else:
        # For GPUs that nobody uses, torch.manual_seed would write down the call stack,
        # which takes as long as a small model's forward.
        torch.default_generator.manual_seed(number)


def train_step(
    batch: Batch,
    *,
    schedule: Schedule,
    optimizer: ZeroOptimizer,
    scaler: LossScaler,
    grid: Grid,
    loss_config: LossConfig,
    data_types: list[str],
    lr: float,
    beta2: float,
    should_stop: Callable[[int], bool] | None = None,
    profile: GradientObserver | None = None,
    limits: UpdateLimits | None = None,
) -> StepOutput | None:
    """Accumulate the gradient of the mean loss over all target tokens of the global batch, and apply it.

    The one division is by the global count of targets (invariant 4 in docs/architecture.md);
    ``loss.reduction="micro_batch"`` averages each micro-batch first, which favors tokens of sparse micro-batches.
    The host waits for the device once, to read the results.

    Args:
        batch: on the host; pinned, if there is a device to copy it to.
        should_stop: called between micro-batches, not in a pipeline, with how many are finished; True interrupts it.
        profile: measures the gradients of this step.
        limits: of loss and gradient norm, beyond which the step changes nothing.

    Returns:
        None when ``should_stop`` interrupted the step: its gradients are dropped and nothing else has changed.
    """
    watch = Stopwatch(optimizer.device)

    # 1. Weights of the micro-batches, which never leave the device.
    batch = batch.to(optimizer.device)
    weights = micro_batch_weights(batch.labels, grid, loss_config)
    scales = (weights * scaler.scale).unbind()

    # 2. Forward and backward. The sums stay on the device.
    sums = _LossSums(batch, data_types, scaler.scale)
    optimizer.expect_micro_batches(len(scales))
    terms = LossTerms.of(loss_config)
    with this_process().phase(Place.FORWARD_BACKWARD):
        done = schedule.train(batch, scales, terms, sums.add, should_stop)
    if not done:
        optimizer.zero_grad()
        return None
    watch.stop()

    # 3. Update: clips, skips what is not finite, applies AdamW; sums norm and losses.
    own_sums = sums.of_this_rank(grid)
    rates = (lr, beta2, 1.0 / scaler.scale)
    with region("optimizer"), this_process().phase(Place.OPTIMIZER):
        update = optimizer.step(*rates, profile, own_sums, limits)
    optimizer.zero_grad()

    # 4. Results: one copy to the host.
    results, measured = _read_results(update, sums)
    results = _with_gradients(results, profile, measured, scaler.scale)
    results = _counted(results, limits, optimizer, scaler)
    return replace(results, fwd_bwd_time=watch.seconds())


def _is_left_out(results: StepOutput, limits: UpdateLimits | None) -> bool:
    """Return what the device has decided: it compared the same numbers."""
    if limits is None:
        return False
    loss = torch.tensor(results.loss, dtype=torch.float64)
    return bool(limits.are_exceeded(results.update.norm, loss))


def _counted(
    results: StepOutput,
    limits: UpdateLimits | None,
    optimizer: ZeroOptimizer,
    scaler: LossScaler,
) -> StepOutput:
    """Let the loss scale count the step; one that is left out counts as none."""
    left_out = _is_left_out(results, limits)
    if left_out:
        optimizer.forget_step()
    else:
        scaler.update(results.update.check)
    return replace(results, left_out=left_out)


def _with_gradients(
    results: StepOutput,
    profile: GradientObserver | None,
    measured: Tensor,
    scale: float,
) -> StepOutput:
    """Add what a profile measured, without the loss scale."""
    if profile is None:
        return results
    return replace(results, gradients=profile.figures(measured, 1.0 / scale))


class _LossSums:
    """Sums of a step's losses on this rank, on the device.

    Attributes:
        objectives: [2] float64, the objective and the part of it that is z-loss, without the loss scale.
        tally: sums by data type.
    """

    def __init__(self, batch: Batch, data_types: list[str], scale: float) -> None:
        device = batch.labels.device
        self.batch = batch
        self.scale = scale
        self.objectives = torch.zeros(2, dtype=torch.float64, device=device)
        self.tally = LossTally(data_types, device)

    def add(
        self,
        index: int,
        output: LossOutput,
    ) -> None:
        """Add the losses of micro-batch ``index``, which is then done."""
        this_process().begin_micro_batch(index + 1)
        loss = output.scaled_sum.detach().double()
        self.objectives[0].add_(loss / self.scale)
        if output.scaled_z_loss is not None:
            z_loss = output.scaled_z_loss.double()
            self.objectives[1].add_(z_loss / self.scale)
        labels = self.batch.labels[index]
        types = self.batch.type_ids[index]
        self.tally.add(output, labels, types)

    def of_this_rank(self, grid: Grid) -> Tensor:
        """Return objectives [2] and tally, flat: this rank's summands of the sums over the world.

        Only ranks of the last pipeline stage have added losses. The ranks of a tensor
        axis all have the same losses, of which the first adds them.
        """
        sums = torch.cat([self.objectives, self.tally.sums.flatten()])
        # Not a product with 0: the loss of an overflow may be inf.
        return sums if grid.tp.rank == 0 else torch.zeros_like(sums)


def _read_results(update: StepResult, sums: _LossSums) -> tuple[StepOutput, Tensor]:
    """Bring what the update returned to the host, with it the sums of all ranks.

    Returns:
        the results, and what a profile measured; empty without one.
    """
    # One tensor, so that the host waits once: norm, the two objectives, the sums of the
    # tally, then what a profile measured.
    tally = sums.tally
    on_device = [update.norm.unsqueeze(0), update.sums]
    if update.profile is not None:
        on_device.append(update.profile)
    joined = torch.cat(on_device)
    results = copy_to_host(joined)

    # The same parts, back in their shapes.
    norm, loss, z_loss = results[:3]
    tally_end = 3 + tally.sums.numel()
    tally_sums = results[3:tally_end].view_as(tally.sums)
    profile = results[tally_end:]
    output = StepOutput(
        loss=float(loss),
        tally=LossTally(tally.types, results.device, tally_sums),
        update=StepResult(norm),
        z_loss=float(z_loss),
    )
    return output, profile


def copy_to_host(results: Tensor) -> Tensor:
    """Copy to the host: the one place where a step waits for the device."""
    with this_process().phase(Place.RESULTS):
        return results.cpu()


def micro_batch_weights(labels: Tensor, grid: Grid, loss_config: LossConfig) -> Tensor:
    """Return the factor of each micro-batch's summed token losses, [M] float64.

    Targets are counted, and summed over the data-parallel ranks, on the device: hosts
    that had to wait for each other would leave a thousand devices idle.

    Args:
        labels: [M, T] of this rank.
    """
    # A micro-batch without a target has a loss of 0 whatever its factor: any divisor
    # but 0 will do.
    is_target = labels != IGNORE
    targets = is_target.sum(1)  # [M]
    if loss_config.reduction == "micro_batch":
        # The mean of all micro-batches' means.
        micro_batches = len(targets) * grid.dp.size
        divisors = targets.clamp(min=1) * micro_batches
    else:
        # One mean over all targets. Two ranks with 30 and 10 of them divide by 40 both:
        # a mean of the ranks' means would weigh the 10 three times.
        own_total = targets.sum()
        total = all_reduce_no_grad(own_total, grid.dp)
        divisor = total.clamp(min=1)
        divisors = divisor.expand_as(targets)
    exact = divisors.double()
    return 1.0 / exact
