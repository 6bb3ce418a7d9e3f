"""Gradients of the fused output projection and loss, added up over chunks of tokens.

Shapes: T packed tokens, C tokens of one chunk, D model, V vocabulary rows of this rank's weight shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evomesh.layers.dtype import promote
from evomesh.layers.products import (
    add_product_,
    adds_wide_products,
    matmul_nt,
    uses_onednn,
)


class LossGradients:
    """Gradients of the hidden rows and of the weight, added chunk by chunk; the weight's in at least float32.

    With oneDNN the weight's gradient is accumulated transposed, [D, V]: oneDNN then
    copies the hidden rows of a chunk and not its logits.
    """

    def __init__(self, hidden_rows: Tensor, weight: Tensor) -> None:
        self._hidden_rows = hidden_rows
        self._weight = weight
        self.hidden = torch.empty_like(hidden_rows)
        self._transposed = uses_onednn(hidden_rows, weight)
        self._weight_sum: Tensor | None = None

    def add(self, part: slice, logit_grad: Tensor) -> None:
        """Add one chunk, whose d(loss) / d(logits) is ``logit_grad`` [C, V], in the weight's dtype."""
        self.hidden[part] = matmul_nt(logit_grad, self._weight.T)
        self._add_to_weight(logit_grad, self._hidden_rows[part])

    def _add_to_weight(self, logit_grad: Tensor, hidden_chunk: Tensor) -> None:
        # left right^T is the chunk's gradient: [V, D], or transposed [D, V].
        if self._transposed:
            left = hidden_chunk.T
            right = logit_grad.T
        else:
            left = logit_grad.T
            right = hidden_chunk.T
        wide = promote(self._weight.dtype)
        if self._transposed:
            self._weight_sum = matmul_nt(left, right, accumulate=self._weight_sum)
        elif self._weight_sum is not None:
            add_product_(self._weight_sum, left, right.T)
        elif adds_wide_products(left.device, left.dtype, wide):
            self._weight_sum = torch.zeros_like(self._weight, dtype=wide)
            add_product_(self._weight_sum, left, right.T)
        else:
            self._weight_sum = matmul_nt(left, right).to(wide)

    def weight_gradient(self) -> Tensor:
        """Return the sum over all chunks [V, D], in the weight's dtype."""
        if self._weight_sum is None:  # no row has a target
            return torch.zeros_like(self._weight)
        total = self._weight_sum.T if self._transposed else self._weight_sum
        return total.to(self._weight.dtype)
