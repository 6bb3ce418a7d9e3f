"""Output projection and cross entropy in one, over chunks of tokens: the logits never exist whole.

Shapes: T packed tokens, C tokens of one chunk, D model, V vocabulary rows of the weight.

The gradient is made in forward, while a chunk's probabilities are at hand; backward only hands it on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomesh.layers.dtype import promote

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
) -> LossOutput:
    """Cross entropy of ``hidden @ weight.T`` [T, V] against ``labels``.

    Args:
        hidden: [T, D].
        weight: [V, D]; rows at and behind ``vocab_size`` are padding, outside loss and gradient.
        labels: [T] int64, ``IGNORE`` where there is no target.
        grad_scale: factor of the loss; applied before gradients are cast to the weight's dtype, so that float16
            gradients can be lifted out of its underflow.
        label_smoothing: share of the target spread evenly over the vocabulary.
        chunk: C.
    """
    scale = torch.as_tensor(grad_scale, dtype=promote(hidden.dtype), device=hidden.device)
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    scaled_sum, nll, correct = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, scale, vocab_size, label_smoothing, chunk, with_grad
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
            logits[:, vocab_size:] = -torch.inf
            best, argmax = logits.max(dim=-1, keepdim=True)
            picked = logits.gather(1, target)
            mean = logits[:, :vocab_size].mean(dim=-1) if smoothing else None
            probability = torch.softmax(logits, dim=-1, out=logits)
            # The largest probability is at least 1/V, so its logarithm loses nothing.
            log_sum = best - probability.gather(1, argmax).log()
            nll = (log_sum - picked).squeeze(1)
            nll_rows[part] = nll.where(used, 0.0)
            correct_rows[part] = (argmax == target).squeeze(1) & used
            if mean is not None:
                nll = (1 - smoothing) * nll + smoothing * (log_sum.squeeze(1) - mean)
            loss += nll.where(used, 0.0).sum()
            if grad_rows is not None and grad_weight is not None:
                grad = probability
                grad.scatter_add_(1, target, torch.full_like(picked, smoothing - 1))
                if smoothing:
                    grad[:, :vocab_size] -= smoothing / vocab_size
                grad = (grad.mul_((scale * used)[:, None])).to(weight.dtype)
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
        return grad_hidden * grads[0], grad_weight * grads[0], None, None, None, None, None, None


def _kept(labels: Tensor) -> Tensor | slice:
    """Rows worth a product: on the CPU those with a target; elsewhere all, rather than wait for the device's count."""
    if labels.device.type != "cpu":
        return slice(None)
    kept = (labels != IGNORE).nonzero().squeeze(1)
    return slice(None) if len(kept) == len(labels) else kept
