"""Output projection and cross entropy in one, over chunks of tokens: the logits never exist whole.

Shapes: T packed tokens, C tokens of one chunk, D model, V vocabulary rows of the weight held here.

The gradient is made in forward, while a chunk's probabilities are at hand; backward only hands it on. Where the tensor
axis cuts the vocabulary, two small all-reduces a chunk (a maximum; three sums a token) join the ranks' parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evomesh.config.schema import IGNORE
from evomesh.layers.dtype import promote
from evomesh.layers.products import matmul_nt, uses_onednn
from evomesh.monitor.profile import region
from evomesh.parallel.collectives import MAX, all_gather_no_grad, all_reduce_no_grad, local_range
from evomesh.parallel.grid import Axis

MIN_CHUNK_TOKENS = 512  # tokens whose logits exist at one time, at least
CUDA_CHUNK_LOGITS = 2**26  # numbers in the logits of a chunk on CUDA: 256 MiB in float32


class LossOutput(NamedTuple):
    """A tuple, so that torch sees the tensors in it where a module returns one.

    Attributes:
    scaled_sum: scalar, ``grad_scale`` times the sum of the token losses (smoothed, if asked for); call backward on it.
    nll: [T] negative log-likelihood of each label (never smoothed), at least float32, 0 where ignored; no gradient.
    correct: [T] bool, no logit is larger than the label's.
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
    chunk: int = 0,
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
        chunk: C; 0: ``tokens_per_chunk``.
        axis: the tensor axis; each of its ranks gets the whole result.
        parallel_output: keep the logits cut; False gathers each chunk's logits to every rank first.
    """
    chunk = chunk or tokens_per_chunk(weight.shape[0], hidden.is_cuda)
    scale = _scalar(grad_scale, promote(hidden.dtype), hidden.device)
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with region("loss"):
        scaled_sum, nll, correct = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden,
            weight,
            labels,
            scale,
            vocab_size,
            label_smoothing,
            chunk,
            with_grad,
            axis,
            parallel_output,
        )
    return LossOutput(scaled_sum, nll, correct)


def tokens_per_chunk(rows: int, on_cuda: bool) -> int:
    """Tokens of a chunk. Each adds one gradient of the whole weight to the sum, in float32: on CUDA, where that is
    bound by memory and the products are not, fewer and larger chunks of a small vocabulary cost less."""
    return (
        max(CUDA_CHUNK_LOGITS // rows // MIN_CHUNK_TOKENS, 1) * MIN_CHUNK_TOKENS
        if on_cuda
        else MIN_CHUNK_TOKENS
    )


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
        grads = _GradientAccumulator(rows, weight) if with_grad else None
        for part in (slice(i, i + chunk) for i in range(0, len(targets), chunk)):
            used = targets[part] != IGNORE
            target = targets[part].clamp(min=0)[:, None]
            logits = matmul_nt(rows[part], weight).to(wide)
            if not parallel_output:
                logits = all_gather_no_grad(logits, axis, dim=1).contiguous()
            view = _VocabularyShard.of(logits, vocab_size, axis if parallel_output else Axis("tp"))
            found = view.exponentials(logits, target, smoothing > 0)
            correct_rows[part] = found.correct & used
            nll_rows[part] = found.nll.where(used, 0.0)
            token_loss = (1 - smoothing) * found.nll + smoothing * found.mean if smoothing else found.nll
            loss += token_loss.where(used, 0.0).sum()
            if grads is not None:
                logits = view.minus_target(logits, target, found.exp_sum, smoothing)  # now their gradient
                if not parallel_output:
                    logits = local_range(logits, axis, 1)
                grads.add(part, logits, (scale * used)[:, None] / found.exp_sum)
            del logits  # or those of two chunks would live at one time
        nll_all = torch.zeros(labels.shape, dtype=wide, device=hidden.device)
        correct = torch.zeros(labels.shape, dtype=torch.bool, device=hidden.device)
        nll_all[kept], correct[kept] = nll_rows, correct_rows
        if grads is not None:
            grad_hidden = grads.rows
            if isinstance(kept, Tensor):
                grad_hidden = torch.zeros_like(hidden)
                grad_hidden[kept] = grads.rows
            ctx.save_for_backward(grad_hidden, grads.of_weight())
        ctx.mark_non_differentiable(nll_all, correct)
        return loss * scale, nll_all, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grads[0]
        # On the CPU, where it costs nothing to look, the usual factor of one saves a pass over the weight.
        if factor.device.type != "cpu" or factor.item() != 1.0:
            grad_hidden, grad_weight = grad_hidden * factor, grad_weight * factor
        return grad_hidden, grad_weight, *[None] * 8


class _GradientAccumulator:
    """Gradients of hidden rows and weight, growing chunk by chunk: the weight's in at least float32.

    oneDNN makes the weight's transposed, [D, V]: it then copies the hidden rows of a chunk and not its logits.
    """

    def __init__(self, rows: Tensor, weight: Tensor) -> None:
        self.inputs, self.head = rows, weight
        self.rows = torch.empty_like(rows)
        self.transposed = uses_onednn(rows, weight)
        self.weight: Tensor | None = None

    def add(self, part: slice, grad: Tensor, factor: Tensor) -> None:
        """Adds those of one chunk, whose d loss / d logits is ``grad`` [C, V] times ``factor`` [C, 1].

        The factor has the loss scale in it. For wide weights it is moved to the [C, D] side of both products, which
        saves a pass over the logits; a narrow ``grad`` must have it before it is rounded.
        """
        inputs = self.inputs[part]
        if self.head.dtype == grad.dtype:
            self.rows[part] = matmul_nt(grad, self.head.T).mul_(factor)
            inputs = inputs * factor
        else:
            grad = grad.mul_(factor).to(self.head.dtype)
            self.rows[part] = matmul_nt(grad, self.head.T)
        a, b = (inputs.T, grad.T) if self.transposed else (grad.T, inputs.T)
        if self.weight is None:
            self.weight = matmul_nt(a, b).to(promote(self.head.dtype))
        elif self.transposed:
            self.weight = matmul_nt(a, b, plus=self.weight)
        elif self.weight.dtype == grad.dtype:
            self.weight.addmm_(a, b.T)
        else:
            self.weight += a @ b.T

    def of_weight(self) -> Tensor:
        if self.weight is None:  # no row has a target
            return torch.zeros_like(self.head)
        return (self.weight.T if self.transposed else self.weight).to(self.head.dtype)


@dataclass(frozen=True)
class _ChunkLoss:
    """Of one chunk, the same on all ranks: ``exp_sum`` [C, 1] of the shifted exponentials; the rest [C].

    ``mean`` is that of -log p over the vocabulary (0 unless asked for).
    """

    exp_sum: Tensor
    nll: Tensor
    mean: Tensor
    correct: Tensor


@dataclass(frozen=True)
class _VocabularyShard:
    """The columns of the logits at hand: ``first`` .. ``first + columns``, of which ``real`` are no padding."""

    first: int
    columns: int
    real: int
    size: int
    axis: Axis

    @classmethod
    def of(cls, logits: Tensor, size: int, axis: Axis) -> _VocabularyShard:
        columns = logits.shape[1]
        first = axis.rank * columns
        return cls(first, columns, min(max(size - first, 0), columns), size, axis)

    def exponentials(self, logits: Tensor, target: Tensor, with_mean: bool) -> _ChunkLoss:
        """Turns ``logits`` [C, V] into exp(logit - largest logit) in place; ``target`` [C, 1] are global columns.

        A target counts as correct if no logit is larger, so that equal ones count the same on every layout.
        """
        column, here = self._own(target)
        logits[:, self.real :] = -torch.inf
        top = all_reduce_no_grad(logits.amax(dim=-1, keepdim=True), self.axis, op=MAX)
        picked = logits.gather(1, column).masked_fill(~here, 0.0)
        total = logits[:, : self.real].sum(dim=-1, keepdim=True) if with_mean else torch.zeros_like(picked)
        logits.sub_(top).exp_()
        sums = all_reduce_no_grad(torch.cat([logits.sum(-1, keepdim=True), picked, total], dim=1), self.axis)
        exp_sum, picked, total = sums.chunk(3, dim=1)
        log_sum = top + exp_sum.log()
        mean = (log_sum - total / self.size).squeeze(1)
        return _ChunkLoss(exp_sum, (log_sum - picked).squeeze(1), mean, (picked == top).squeeze(1))

    def _own(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Local column of each target (any, where it lies elsewhere), and whether it lies here."""
        column = target - self.first
        here = (column >= 0) & (column < self.columns)
        return column.masked_fill(~here, 0), here

    def minus_target(self, exponentials: Tensor, target: Tensor, exp_sum: Tensor, smoothing: float) -> Tensor:
        """d loss / d logits times ``exp_sum``: probability minus the (smoothed) target, in place."""
        column, here = self._own(target)
        exponentials.scatter_add_(1, column, here * exp_sum * (smoothing - 1))
        if smoothing:
            exponentials[:, : self.real] -= exp_sum * (smoothing / self.size)
        return exponentials


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number is filled in by the device: a copy of it would make the host wait."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def _kept(labels: Tensor) -> Tensor | slice:
    """Rows worth a product: on the CPU those with a target; elsewhere all, rather than wait for the device's count."""
    if labels.device.type != "cpu":
        return slice(None)
    kept = (labels != IGNORE).nonzero().squeeze(1)
    return slice(None) if len(kept) == len(labels) else kept
