"""Output projection and cross entropy in one, over chunks of tokens: the full logits are never materialized.

Shapes: T packed tokens, C tokens of one chunk, D model, V vocabulary rows of this rank's weight shard.

Each chunk's gradient is computed in forward, while its probabilities are available;
backward only scales it. Where the tensor axis shards the vocabulary, two small
all-reduces per chunk (a maximum; three sums per token) combine the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evomesh.config.schema import IGNORE
from evomesh.layers.block_softmax import (
    BlockLoss,
    BlockSoftmax,
    LossTerms,
    VocabularyShard,
)
from evomesh.layers.dtype import promote
from evomesh.layers.loss_gradients import LossGradients
from evomesh.layers.products import matmul_nt
from evomesh.monitor.profile import region
from evomesh.parallel.grid import Axis

MIN_CHUNK_TOKENS = 512  # tokens per chunk, at least
CPU_CHUNK_TOKENS_16_BIT = 2048
CUDA_CHUNK_TOKENS = 4096
CUDA_CHUNK_LOGITS = 2**29  # logits of one chunk on CUDA, at most: 2 GiB in float32
# Logits of one block on the CPU: 16 MiB in float32, which most processors hold in their caches.
CPU_BLOCK_LOGITS = 2**22


class LossOutput(NamedTuple):
    """Loss of one packed sequence; a tuple, so that torch finds the tensors in it where a module returns one.

    Attributes:
        scaled_sum: scalar, ``grad_scale`` times the sum of the token losses (all ``LossTerms``); call backward on it.
        nll: [T] negative log-likelihood of each label (never smoothed), at least float32, 0 where ignored; no gradient.
        correct: [T] bool, no logit is larger than the label's.
        scaled_z_loss: scalar, the part of ``scaled_sum`` that is z-loss; None without it; no gradient.
    """

    scaled_sum: Tensor
    nll: Tensor
    correct: Tensor
    scaled_z_loss: Tensor | None = None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    grad_scale: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    z_loss_coeff: float = 0.0,
    softcap: float | None = None,
    chunk: int = 0,
    axis: Axis = Axis("tp"),  # noqa: B008  # frozen
) -> LossOutput:
    """Compute the cross entropy of ``hidden @ weight.T`` [T, V] against ``labels``.

    Args:
        hidden: [T, D], replicated over ``axis``; its gradient is a partial sum there.
        weight: [V, D], this rank's vocabulary rows; rows from ``vocab_size`` on are padding, outside loss and gradient.
        labels: [T] int64, ``IGNORE`` where there is no target.
        grad_scale: factor of the loss, applied before gradients are cast to the weight's dtype, so that float16
            gradients can be lifted out of its underflow.
        label_smoothing, z_loss_coeff: see ``LossTerms``.
        softcap: soft cap of the logits (``soft_cap``); None: none.
        chunk: C; 0 means ``tokens_per_chunk``.
        axis: the tensor axis; every rank of it gets the whole result.
    """
    in_16_bits = weight.dtype != promote(weight.dtype)
    chunk = chunk or tokens_per_chunk(weight.shape[0], not hidden.is_cpu, in_16_bits)
    scale = _scalar_on_device(grad_scale, promote(hidden.dtype), hidden.device)
    with_grad = torch.is_grad_enabled() and (
        hidden.requires_grad or weight.requires_grad
    )
    with region("loss"):
        scaled_sum, nll, correct, scaled_z_loss = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden,
            weight,
            labels,
            scale,
            vocab_size,
            LossTerms(label_smoothing, z_loss_coeff),
            softcap,
            chunk,
            with_grad,
            axis,
        )
    return LossOutput(
        scaled_sum,
        nll,
        correct,
        scaled_z_loss if z_loss_coeff else None,
    )


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Return cap tanh(logits / cap), which is within (-cap, cap) (``final_logit_softcapping``)."""
    return torch.tanh(logits / cap) * cap


def tokens_per_chunk(rows: int, on_cuda: bool, in_16_bits: bool = True) -> int:
    """Choose the tokens of a chunk for a weight of ``rows`` rows.

    Each chunk adds one gradient of the whole weight to a float32 sum. On CUDA that sum
    is memory bound and the products are not: it takes as long as the products of some
    400 tokens, whatever the vocabulary. With 4096 tokens it is a tenth of them; only a
    vocabulary above 131,072 rows gets smaller chunks, for the sake of memory. On a CPU
    only 16-bit products are so fast that the sum counts.
    """
    if not on_cuda:
        return CPU_CHUNK_TOKENS_16_BIT if in_16_bits else MIN_CHUNK_TOKENS
    multiples_that_fit = CUDA_CHUNK_LOGITS // rows // MIN_CHUNK_TOKENS
    tokens_that_fit = max(multiples_that_fit, 1) * MIN_CHUNK_TOKENS
    return min(tokens_that_fit, CUDA_CHUNK_TOKENS)


def _tokens_per_block(chunk: int, weight: Tensor, axis: Axis) -> int:
    """Choose how many tokens of a chunk go through the softmax together.

    Its dozen passes over the logits are bound by memory on a CPU, unless a block stays
    in the caches. A block has two messages where ranks share the vocabulary.
    """
    if not weight.is_cpu or axis.size > 1:
        return chunk
    return max(CPU_BLOCK_LOGITS // weight.shape[0], 1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients of one chunk after the other; shapes are local, every rank of the axis sees all tokens.

    h_chunk [C, D] is replicated (R), w_shard [V, D] holds this rank's vocabulary rows
    (S(0)); y is the one-hot target.

        forward   z_shard = h_chunk w_shard^T                    [C, V]
                  top     = max of z over the vocabulary         [C, 1]   all-reduce MAX
                  e_shard = exp(z_shard - top)                   [C, V]   overwrites z_shard
                  e_sum   = sum of e over the vocabulary         [C, 1]   all-reduce SUM, with z[label]
                  log_sum = top + log(e_sum)                     [C, 1]
        loss    = log_sum - z[label] + c log_sum^2     [C, 1]   c: z_loss_coeff
        logits    g_shard = scale ((1 + 2 c log_sum) e_shard / e_sum - y_shard)  [C, V]   overwrites e_shard
        dgrad     dh_chunk = g_shard w_shard                     [C, D]   P: the dual of whatever replicated h sums it
        wgrad     dw_shard = sum over chunks of g_shard^T h_chunk  [V, D]   complete: every rank has all tokens

    Why the gradients are computed in forward: g needs all of e. Keeping e until
    backward would cost [T, V], computing it again a third product with the weight. This
    way backward keeps dh [T, D] and dw [V, D] and multiplies them by the gradient of
    the loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: Tensor,
        vocab_size: int,
        terms: LossTerms,
        softcap: float | None,
        chunk: int,
        with_grad: bool,
        axis: Axis,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # 1. Keep the rows that need a product, and make room for their results.
        kept = _rows_with_target(labels)
        kept_hidden = hidden[kept]
        kept_labels = labels[kept]
        losses = _KeptLosses.zeros(len(kept_labels), hidden)
        gradients = LossGradients(kept_hidden, weight) if with_grad else None
        shard = VocabularyShard.of_rank(weight.shape[0], vocab_size, axis)
        grad_scale = scale if with_grad else None
        softmax = BlockSoftmax(shard, terms, softcap, grad_scale)
        block = _tokens_per_block(chunk, weight, axis)

        for start in range(0, len(kept_labels), chunk):
            # 2. Logits of the chunk, which its losses overwrite with their gradients, block by block.
            part = slice(start, start + chunk)
            logits = matmul_nt(kept_hidden[part], weight)
            chunk_labels = kept_labels[part]
            for first in range(0, len(logits), block):
                rows = slice(first, first + block)
                result = softmax.apply_(logits[rows], chunk_labels[rows])
                losses.add(start + first, result, terms)

            # 3. Gradients of the chunk's hidden rows and of the weight.
            if gradients is not None:
                gradients.add(part, logits)
            del logits  # or the logits of two chunks would exist at one time

        # 4. Scatter the kept rows back to all T tokens.
        num_tokens = len(labels)
        nll = _spread(losses.nll, kept, num_tokens)
        correct = _spread(losses.correct, kept, num_tokens)
        if gradients is not None:
            grad_hidden = gradients.hidden
            if isinstance(kept, Tensor):
                grad_hidden = _spread(grad_hidden, kept, num_tokens)
            grad_weight = gradients.weight_gradient()
            ctx.save_for_backward(grad_hidden, grad_weight)
        scaled_z_loss = losses.z_loss * scale
        ctx.mark_non_differentiable(nll, correct, scaled_z_loss)
        scaled_sum = (losses.cross_entropy + losses.z_loss) * scale
        return scaled_sum, nll, correct, scaled_z_loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grads[0]
        # On the CPU, where reading it costs nothing, the usual factor of one saves a
        # pass over the weight.
        if factor.device.type != "cpu" or factor.item() != 1.0:
            grad_hidden = grad_hidden * factor
            grad_weight = grad_weight * factor
        return grad_hidden, grad_weight, *[None] * 8


@dataclass(frozen=True)
class _KeptLosses:
    """Losses of the K kept rows, filled in place chunk by chunk.

    Attributes:
        cross_entropy, z_loss: scalars, sums over the targets.
        nll, correct: [K], as in ``LossOutput``.
    """

    cross_entropy: Tensor
    z_loss: Tensor
    nll: Tensor
    correct: Tensor

    @classmethod
    def zeros(cls, rows: int, hidden: Tensor) -> _KeptLosses:
        wide = promote(hidden.dtype)
        cross_entropy = hidden.new_zeros((), dtype=wide)
        z_loss = hidden.new_zeros((), dtype=wide)
        nll = hidden.new_zeros(rows, dtype=wide)
        correct = hidden.new_zeros(rows, dtype=torch.bool)
        return cls(cross_entropy, z_loss, nll, correct)

    def add(
        self,
        start: int,
        result: BlockLoss,
        terms: LossTerms,
    ) -> None:
        """Add the block of the rows from ``start`` on, of which only those with a target count."""
        is_target = result.is_target
        stop = start + len(is_target)
        part = slice(start, stop)
        self.correct[part] = result.correct & is_target
        self.nll[part] = result.nll.where(is_target, 0.0)

        smoothing = terms.label_smoothing
        cross_entropy = result.cross_entropy(smoothing)
        counted = cross_entropy.where(is_target, 0.0)
        total = counted.sum()
        self.cross_entropy.add_(total)

        if terms.z_loss_coeff:
            z_loss = result.z_loss(terms)
            counted = z_loss.where(is_target, 0.0)
            total = counted.sum()
            self.z_loss.add_(total)


def _scalar_on_device(
    value: float | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return ``value`` as a scalar tensor; the device fills in a float, since copying it would block the host."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def _spread(kept_rows: Tensor, kept: Tensor | slice, rows: int) -> Tensor:
    """Return [rows, ...] with ``kept_rows`` where ``kept`` selects, and zeros elsewhere."""
    out = kept_rows.new_zeros(rows, *kept_rows.shape[1:])
    out[kept] = kept_rows
    return out


def _rows_with_target(labels: Tensor) -> Tensor | slice:
    """Select the rows worth a product: on the CPU those with a target; elsewhere all: counting blocks the host."""
    if labels.device.type != "cpu":
        return slice(None)
    kept = (labels != IGNORE).nonzero().squeeze(1)
    return slice(None) if len(kept) == len(labels) else kept
