"""Losses and gradients of a block of logits, of a vocabulary that the ranks of the tensor axis may share.

Shapes: B rows of a block, V vocabulary columns of this rank's shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evomesh.config.schema import IGNORE, LossConfig
from evomesh.layers.dtype import promote
from evomesh.parallel.collectives import MAX, all_reduce_no_grad
from evomesh.parallel.grid import Axis


@dataclass(frozen=True)
class LossTerms:
    """Terms of the loss of a target besides its negative log-likelihood.

    Attributes:
        label_smoothing: share of the target spread evenly over the vocabulary.
        z_loss_coeff: c of the z-loss c log(Z)^2, where Z is the sum of the exponentials of all logits. It keeps
            the logits from drifting: adding a constant to all of them changes no probability (PaLM, 2204.02311).
    """

    label_smoothing: float = 0.0
    z_loss_coeff: float = 0.0

    @property
    def smooths(self) -> bool:
        return self.label_smoothing > 0

    @classmethod
    def of(cls, config: LossConfig) -> LossTerms:
        return cls(config.label_smoothing, config.z_loss_coeff)


PLAIN = LossTerms()


@dataclass(frozen=True)
class BlockLoss:
    """Loss of one block of B rows, the same on all ranks.

    Attributes:
        is_target: [B] whether the row has a label.
        exp_sum: [B, 1] sum over the vocabulary of the shifted exponentials.
        log_sum: [B] logarithm of the sum of the exponentials of all logits.
        nll: [B] negative log-likelihood of the label.
        mean_nll: [B] mean of -log p over the vocabulary; meaningless unless requested.
        correct: [B] whether no logit is larger than the label's.
    """

    is_target: Tensor
    exp_sum: Tensor
    log_sum: Tensor
    nll: Tensor
    mean_nll: Tensor
    correct: Tensor

    def cross_entropy(self, smoothing: float) -> Tensor:
        """Return [B], the cross entropy with the smoothed target."""
        if not smoothing:
            return self.nll
        return (1 - smoothing) * self.nll + smoothing * self.mean_nll

    def z_loss(self, terms: LossTerms) -> Tensor:
        return terms.z_loss_coeff * self.log_sum.square()


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's columns of the logits: ``columns`` from ``first`` on, of which ``unpadded`` are in the vocabulary."""

    first: int
    columns: int
    unpadded: int
    vocab_size: int
    axis: Axis

    @classmethod
    def of_rank(cls, columns: int, vocab_size: int, axis: Axis) -> VocabularyShard:
        first = axis.rank * columns
        unpadded = min(max(vocab_size - first, 0), columns)
        return cls(first, columns, unpadded, vocab_size, axis)

    def exponentiate_(
        self,
        logits: Tensor,
        labels: Tensor,
        is_target: Tensor,
        *,
        with_mean: bool,
    ) -> BlockLoss:
        """Replace ``logits`` [B, V] by exp(logit - largest logit) and return the loss; ``labels`` [B] are global.

        A label counts as correct if no logit is larger, so that ties count the same in
        every layout.
        """
        # exp(-inf) = 0: padding columns take no part in any sum.
        logits[:, self.unpadded :] = -torch.inf

        # 1. The largest logit of the whole vocabulary, so that no exponential overflows.
        local_top = logits.amax(dim=-1, keepdim=True)
        top = all_reduce_no_grad(local_top, self.axis, op=MAX)

        # 2. What has to be read before the logits are overwritten: the label's logit, and the sum for smoothing.
        column, is_here = self._local_column(labels)
        found = logits.gather(1, column)
        label_logit = found.masked_fill(~is_here, 0.0)
        logit_sum = torch.zeros_like(label_logit)
        if with_mean:
            in_vocabulary = logits[:, : self.unpadded]
            logit_sum = in_vocabulary.sum(dim=-1, keepdim=True)

        # 3. One all-reduce for all three sums over the vocabulary. The label's logit is one too: the rank that holds
        # its column adds it, all others add 0.
        logits.sub_(top)
        logits.exp_()
        local_exp_sum = logits.sum(dim=-1, keepdim=True)
        local_sums = torch.cat([local_exp_sum, label_logit, logit_sum], dim=1)  # [B, 3]
        sums = all_reduce_no_grad(local_sums, self.axis)
        exp_sum, label_logit, logit_sum = sums.chunk(3, dim=1)

        # 4. -log p = log(sum of exp(z)) - z, for the label and on average over the vocabulary; all [B, 1].
        log_sum = top + exp_sum.log()
        nll = log_sum - label_logit
        mean_nll = log_sum - logit_sum / self.vocab_size
        correct = label_logit == top
        return BlockLoss(
            is_target,
            exp_sum,
            log_sum.squeeze(1),
            nll.squeeze(1),
            mean_nll.squeeze(1),
            correct.squeeze(1),
        )

    def subtract_target_(
        self,
        exponentials: Tensor,
        labels: Tensor,
        loss: BlockLoss,
        terms: LossTerms,
    ) -> None:
        """Replace ``exponentials`` [B, V] by ``exp_sum`` times d(token loss) / d(logit).

        That is the probability minus the smoothed target; z-loss adds 2 c log_sum times the probability.
        """
        exp_sum = loss.exp_sum
        smoothing = terms.label_smoothing
        if terms.z_loss_coeff:
            factor = 1 + 2 * terms.z_loss_coeff * loss.log_sum
            exponentials.mul_(factor[:, None])

        # The smoothed target: 1 - s at the label, and s / vocabulary size in every column.
        column, is_here = self._local_column(labels)
        minus_target = is_here * exp_sum * (smoothing - 1)
        exponentials.scatter_add_(1, column, minus_target)
        if smoothing:
            in_vocabulary = exponentials[:, : self.unpadded]
            in_vocabulary -= exp_sum * (smoothing / self.vocab_size)

    def _local_column(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return each label's local column (0 if another rank has it), and whether this rank has it; both [B, 1]."""
        column = labels.clamp(min=0).unsqueeze(1) - self.first
        is_here = (column >= 0) & (column < self.columns)
        return column.masked_fill(~is_here, 0), is_here


@dataclass(frozen=True)
class BlockSoftmax:
    """Turns the logits of a block of B rows into their losses and gradients.

    Attributes:
        shard: this rank's part of the vocabulary.
        scale: scalar, the factor of the gradients; None: no gradients.
    """

    shard: VocabularyShard
    terms: LossTerms
    softcap: float | None
    scale: Tensor | None

    def apply_(self, logits: Tensor, labels: Tensor) -> BlockLoss:
        """Return the loss of ``logits`` [B, V], and replace them by its gradient times ``scale``; ``labels`` [B].

        Everything is computed in at least float32, and the gradient is rounded once.
        """
        # 1. From here on `wide` holds exp(logit - top).
        is_target = labels != IGNORE
        wide, slope = _wide_and_slope(logits, self.softcap)
        with_mean = self.terms.smooths
        result = self.shard.exponentiate_(wide, labels, is_target, with_mean=with_mean)
        if self.scale is None:
            return result

        # 2. From here on it holds exp_sum * d(token loss) / d(logit), and then the gradient.
        self.shard.subtract_target_(wide, labels, result, self.terms)
        if slope is not None:
            wide.mul_(slope)
        token_scale = self.scale * is_target
        factor = token_scale.unsqueeze(1) / result.exp_sum  # [B, 1]
        wide.mul_(factor)
        if wide is not logits:
            logits.copy_(wide)
        return result


def _wide_and_slope(logits: Tensor, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return [B, V] logits in at least float32, and with a soft cap its derivative, 1 - tanh(logits / cap)^2."""
    wide = logits.to(promote(logits.dtype))
    if cap is None:
        return wide, None
    tanh = wide.div_(cap).tanh_()
    slope = 1 - tanh.square()
    return tanh.mul_(cap), slope
