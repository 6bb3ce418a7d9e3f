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

from evomesh.config.schema import IGNORE, LossConfig
from evomesh.layers.dtype import promote
from evomesh.layers.loss_gradients import LossGradients
from evomesh.layers.products import matmul_nt
from evomesh.monitor.profile import region
from evomesh.parallel.collectives import MAX, all_reduce_no_grad
from evomesh.parallel.grid import Axis

MIN_CHUNK_TOKENS = 512  # tokens per chunk, at least
CUDA_CHUNK_TOKENS = 4096
CUDA_CHUNK_LOGITS = 2**29  # logits of one chunk on CUDA, at most: 2 GiB in float32


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
    chunk = chunk or tokens_per_chunk(weight.shape[0], not hidden.is_cpu)
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


def _logits_and_slope(
    hidden: Tensor, weight: Tensor, cap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return the logits of a chunk [C, V], and with a soft cap its derivative, 1 - tanh(logits / cap)^2."""
    logits = matmul_nt(hidden, weight)
    logits = logits.to(promote(hidden.dtype))
    if cap is None:
        return logits, None
    tanh = logits.div_(cap).tanh_()
    slope = 1 - tanh.square()
    return tanh.mul_(cap), slope


def tokens_per_chunk(rows: int, on_cuda: bool) -> int:
    """Choose the tokens of a chunk for a weight of ``rows`` rows.

    Each chunk adds one gradient of the whole weight to a float32 sum. On CUDA that sum
    is memory bound and the products are not: it takes as long as the products of some
    400 tokens, whatever the vocabulary. With 4096 tokens it is a tenth of them; only a
    vocabulary above 131,072 rows gets smaller chunks, for the sake of memory.
    """
    if not on_cuda:
        return MIN_CHUNK_TOKENS
    multiples_that_fit = CUDA_CHUNK_LOGITS // rows // MIN_CHUNK_TOKENS
    tokens_that_fit = max(multiples_that_fit, 1) * MIN_CHUNK_TOKENS
    return min(tokens_that_fit, CUDA_CHUNK_TOKENS)


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
        shard = _VocabularyShard.of_rank(weight.shape[0], vocab_size, axis)
        gradients = None
        if with_grad:
            gradients = LossGradients(kept_hidden, weight)

        for start in range(0, len(kept_labels), chunk):
            part = slice(start, start + chunk)
            chunk_labels = kept_labels[part]
            is_target = chunk_labels != IGNORE
            label = chunk_labels.clamp(min=0).unsqueeze(1)  # [C, 1]

            # 2. Logits of the chunk, then its loss. From here on `logits` holds exp(logit - top).
            logits, slope = _logits_and_slope(kept_hidden[part], weight, softcap)
            result = shard.exponentiate_(logits, label, with_mean=terms.smooths)
            losses.add(part, is_target, result, terms)

            # 3. Gradients of the chunk. From here on `logits` holds e_sum * d(token loss) / d(logit).
            if gradients is not None:
                shard.subtract_target_(logits, label, result, terms)
                if slope is not None:
                    logits.mul_(slope)
                token_scale = scale * is_target
                factor = token_scale.unsqueeze(1) / result.exp_sum  # [C, 1]
                gradients.add(part, logits, factor)
            del logits, slope  # or the logits of two chunks would exist at one time

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
        part: slice,
        is_target: Tensor,
        result: _ChunkLoss,
        terms: LossTerms,
    ) -> None:
        """Add the chunk of the rows ``part``, of which only those with a target count."""
        self.correct[part] = result.correct & is_target
        self.nll[part] = result.nll.where(is_target, 0.0)

        cross_entropy = result.cross_entropy(terms.label_smoothing)
        counted = cross_entropy.where(is_target, 0.0)
        self.cross_entropy.add_(counted.sum())

        if terms.z_loss_coeff:
            z_loss = result.z_loss(terms)
            counted = z_loss.where(is_target, 0.0)
            self.z_loss.add_(counted.sum())


@dataclass(frozen=True)
class _ChunkLoss:
    """Loss of one chunk, the same on all ranks.

    Attributes:
        exp_sum: [C, 1] sum over the vocabulary of the shifted exponentials.
        log_sum: [C] logarithm of the sum of the exponentials of all logits.
        nll: [C] negative log-likelihood of the label.
        mean_nll: [C] mean of -log p over the vocabulary; meaningless unless requested.
        correct: [C] whether no logit is larger than the label's.
    """

    exp_sum: Tensor
    log_sum: Tensor
    nll: Tensor
    mean_nll: Tensor
    correct: Tensor

    def cross_entropy(self, smoothing: float) -> Tensor:
        """Return [C], the cross entropy with the smoothed target."""
        if not smoothing:
            return self.nll
        return (1 - smoothing) * self.nll + smoothing * self.mean_nll

    def z_loss(self, terms: LossTerms) -> Tensor:
        return terms.z_loss_coeff * self.log_sum.square()


@dataclass(frozen=True)
class _VocabularyShard:
    """This rank's columns of the logits: ``columns`` from ``first`` on, of which ``unpadded`` are in the vocabulary."""

    first: int
    columns: int
    unpadded: int
    vocab_size: int
    axis: Axis

    @classmethod
    def of_rank(cls, columns: int, vocab_size: int, axis: Axis) -> _VocabularyShard:
        first = axis.rank * columns
        unpadded = min(max(vocab_size - first, 0), columns)
        return cls(first, columns, unpadded, vocab_size, axis)

    def exponentiate_(
        self,
        logits: Tensor,
        label: Tensor,
        *,
        with_mean: bool,
    ) -> _ChunkLoss:
        """Replace ``logits`` [C, V] by exp(logit - largest logit) and return the loss; ``label`` [C, 1] is global.

        A label counts as correct if no logit is larger, so that ties count the same in
        every layout.
        """
        # exp(-inf) = 0: padding columns take no part in any sum.
        logits[:, self.unpadded :] = -torch.inf

        # 1. The largest logit of the whole vocabulary, so that no exponential overflows.
        local_top = logits.amax(dim=-1, keepdim=True)
        top = all_reduce_no_grad(local_top, self.axis, op=MAX)

        # 2. What has to be read before the logits are overwritten: the label's logit, and the sum for smoothing.
        column, is_here = self._local_column(label)
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
        local_sums = torch.cat([local_exp_sum, label_logit, logit_sum], dim=1)  # [C, 3]
        sums = all_reduce_no_grad(local_sums, self.axis)
        exp_sum, label_logit, logit_sum = sums.chunk(3, dim=1)

        # 4. -log p = log(sum of exp(z)) - z, for the label and on average over the vocabulary; all [C, 1].
        log_sum = top + exp_sum.log()
        nll = log_sum - label_logit
        mean_nll = log_sum - logit_sum / self.vocab_size
        correct = label_logit == top
        return _ChunkLoss(
            exp_sum,
            log_sum.squeeze(1),
            nll.squeeze(1),
            mean_nll.squeeze(1),
            correct.squeeze(1),
        )

    def subtract_target_(
        self,
        exponentials: Tensor,
        label: Tensor,
        loss: _ChunkLoss,
        terms: LossTerms,
    ) -> None:
        """Replace ``exponentials`` [C, V] by ``exp_sum`` times d(token loss) / d(logit).

        That is the probability minus the smoothed target; z-loss adds 2 c log_sum times the probability.
        """
        exp_sum = loss.exp_sum
        smoothing = terms.label_smoothing
        if terms.z_loss_coeff:
            factor = 1 + 2 * terms.z_loss_coeff * loss.log_sum
            exponentials.mul_(factor[:, None])

        # The smoothed target: 1 - s at the label, and s / vocabulary size in every column.
        column, is_here = self._local_column(label)
        minus_target = is_here * exp_sum * (smoothing - 1)
        exponentials.scatter_add_(1, column, minus_target)
        if smoothing:
            in_vocabulary = exponentials[:, : self.unpadded]
            in_vocabulary -= exp_sum * (smoothing / self.vocab_size)

    def _local_column(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return each label's local column (0 if another rank has it), and whether this rank has it."""
        column = label - self.first
        is_here = (column >= 0) & (column < self.columns)
        return column.masked_fill(~is_here, 0), is_here


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
