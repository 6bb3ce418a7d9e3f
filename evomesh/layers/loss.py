"""Output projection and cross entropy in one, over chunks of tokens: the logits never exist whole.

Shapes: T packed tokens, C tokens of one chunk, D model, V vocabulary rows of the weight held here.

The gradient is made in forward, while a chunk's probabilities are at hand; backward only hands it on. Where the tensor
axis cuts the vocabulary, two small all-reduces a chunk (a maximum; four sums a token) join the ranks' parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomesh.layers.dtype import promote
from evomesh.parallel.collectives import MAX, gathered, own_range, sum_over
from evomesh.parallel.grid import Axis

IGNORE = -100
CHUNK = 512  # tokens whose logits exist at one time


@dataclass(frozen=True)
class LossOutput:
    """Attributes:
    scaled_sum: scalar, ``grad_scale`` times the sum of the token losses (smoothed, if asked for); call backward on it.
    nll: [T] negative log-likelihood of each label (never smoothed), at least float32, 0 where ignored; no gradient.
    correct: [T] bool, the label has the largest logit.
    """

    scaled_sum: Tensor
    nll: Tensor
    correct: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    grad_scale: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    chunk: int = CHUNK,
    axis: Axis = Axis("tp"),  # noqa: B008  # frozen
    parallel_output: bool = True,
) -> LossOutput:
    """Cross entropy of ``hidden @ weight.T`` [T, V] against ``labels``.

    Args:
        hidden: [T, D], whole on every rank of ``axis``; its gradient is a partial sum there.
        weight: [V, D], the rank's range of rows; rows at and behind ``vocab_size`` are padding, outside loss and
            gradient.
        labels: [T] int64, ``IGNORE`` where there is no target.
        grad_scale: factor of the loss; applied before gradients are cast to the weight's dtype, so that float16
            gradients can be lifted out of its underflow.
        label_smoothing: share of the target spread evenly over the vocabulary.
        chunk: C.
        axis: the tensor axis; each of its ranks gets the whole result.
        parallel_output: keep the logits cut; False gathers each chunk's logits to every rank first.
    """
    scale = torch.as_tensor(grad_scale, dtype=promote(hidden.dtype), device=hidden.device)
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    scaled_sum, nll, correct = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, scale, vocab_size, label_smoothing, chunk, with_grad, axis, parallel_output
    )
    return LossOutput(scaled_sum, nll, correct)


class _LinearCrossEntropy(torch.autograd.Function):
    """z = h W^T;  p = softmax(z);  g = scale (p - target);  dgrad = g W;  wgrad = g^T h."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: Tensor,
        vocab_size: int,
        smoothing: float,
        chunk: int,
        with_grad: bool,
        axis: Axis,
        parallel_output: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = promote(hidden.dtype)
        kept = _kept(labels)
        rows, targets = hidden[kept], labels[kept]
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        nll_rows = torch.zeros(len(targets), dtype=wide, device=hidden.device)
        correct_rows = torch.zeros(len(targets), dtype=torch.bool, device=hidden.device)
        grad_rows = torch.zeros_like(rows) if with_grad else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if with_grad else None
        for part in (slice(i, i + chunk) for i in range(0, len(targets), chunk)):
            used = targets[part] != IGNORE
            target = targets[part].clamp(min=0)[:, None]
            logits = (rows[part] @ weight.T).to(wide)
            if not parallel_output:
                logits = gathered(logits, axis, dim=1).contiguous()
            view = _Vocabulary.of(logits, vocab_size, axis if parallel_output else Axis("tp"))
            nll, correct_rows[part], mean = view.normalise(logits, target, smoothing > 0)
            correct_rows[part] &= used
            nll_rows[part] = nll.where(used, 0.0)
            if mean is not None:
                nll = (1 - smoothing) * nll + smoothing * mean
            loss += nll.where(used, 0.0).sum()
            if grad_rows is not None and grad_weight is not None:
                grad = view.minus_target(logits, target, smoothing)
                if not parallel_output:
                    grad = own_range(grad, axis, 1)
                grad = grad.mul_((scale * used)[:, None]).to(weight.dtype)
                torch.mm(grad, weight, out=grad_rows[part])
                if weight.dtype == wide:
                    grad_weight.addmm_(grad.T, rows[part])
                else:
                    grad_weight += grad.T @ rows[part]
        nll_all = torch.zeros(labels.shape, dtype=wide, device=hidden.device)
        correct = torch.zeros(labels.shape, dtype=torch.bool, device=hidden.device)
        nll_all[kept], correct[kept] = nll_rows, correct_rows
        if grad_rows is not None and grad_weight is not None:
            grad_hidden = torch.zeros_like(hidden)
            grad_hidden[kept] = grad_rows
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(nll_all, correct)
        return loss * scale, nll_all, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], *[None] * 8


@dataclass(frozen=True)
class _Vocabulary:
    """The columns of the logits at hand: ``first`` .. ``first + columns``, of which ``real`` are no padding."""

    first: int
    columns: int
    real: int
    size: int
    axis: Axis

    @classmethod
    def of(cls, logits: Tensor, size: int, axis: Axis) -> _Vocabulary:
        columns = logits.shape[1]
        first = axis.rank * columns
        return cls(first, columns, min(max(size - first, 0), columns), size, axis)

    def normalise(self, logits: Tensor, target: Tensor, with_mean: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Turns ``logits`` [C, V] into probabilities in place.

        Args:
            target: [C, 1] global column.
        Returns:
            negative log-likelihood [C], whether the target has the largest logit [C], mean of -log p [C] if asked for.
        """
        logits[:, self.real :] = -torch.inf
        best, argmax = logits.max(dim=-1, keepdim=True)
        if self.axis.size > 1:
            return self._normalise_cut(logits, target, best, argmax, with_mean)
        picked = logits.gather(1, target)
        mean = logits[:, : self.real].mean(dim=-1) if with_mean else None
        torch.softmax(logits, dim=-1, out=logits)
        # The largest probability is at least 1/V, so its logarithm loses nothing.
        log_sum = best - logits.gather(1, argmax).log()
        smoothed = None if mean is None else log_sum.squeeze(1) - mean
        return (log_sum - picked).squeeze(1), (argmax == target).squeeze(1), smoothed

    def _normalise_cut(
        self, logits: Tensor, target: Tensor, best: Tensor, argmax: Tensor, with_mean: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        column, here = self._own(target)
        top = sum_over(best, self.axis, op=MAX)
        # Of equal largest logits the first column counts, as on one rank: a rank before the target's vetoes it.
        ties = best == top
        hit = (ties & here & (argmax == column)).long() - (ties & (target >= self.first + self.columns)).long()
        picked = logits.gather(1, column).masked_fill(~here, 0.0)
        total = logits[:, : self.real].sum(dim=-1, keepdim=True) if with_mean else torch.zeros_like(picked)
        logits.sub_(top).exp_()
        sums = sum_over(torch.cat([logits.sum(-1, keepdim=True), picked, hit.to(picked), total], dim=1), self.axis)
        exp_sum, picked, hits, total = sums.chunk(4, dim=1)
        logits.div_(exp_sum)
        log_sum = top + exp_sum.log()
        smoothed = (log_sum - total / self.size).squeeze(1) if with_mean else None
        return (log_sum - picked).squeeze(1), (hits == 1).squeeze(1), smoothed

    def _own(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Local column of each target (any, where it lies elsewhere), and whether it lies here."""
        column = target - self.first
        here = (column >= 0) & (column < self.columns)
        return column.masked_fill(~here, 0), here

    def minus_target(self, probability: Tensor, target: Tensor, smoothing: float) -> Tensor:
        """d loss / d logits: probability minus the (smoothed) target, in place."""
        column, here = self._own(target)
        probability.scatter_add_(1, column, here.to(probability) * (smoothing - 1))
        if smoothing:
            probability[:, : self.real] -= smoothing / self.size
        return probability


def _kept(labels: Tensor) -> Tensor | slice:
    """Rows worth a product: on the CPU those with a target; elsewhere all, rather than wait for the device's count."""
    if labels.device.type != "cpu":
        return slice(None)
    kept = (labels != IGNORE).nonzero().squeeze(1)
    return slice(None) if len(kept) == len(labels) else kept
