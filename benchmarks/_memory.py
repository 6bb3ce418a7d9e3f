"""How many bytes a training step should need, by arithmetic on shapes.

Shapes: T packed tokens, D model, F feed-forward hidden, V vocabulary, N heads, L layers, C tokens of a loss chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

HALF, WIDE = 2, 4  # bytes of a 16-bit and of a float32 number


@dataclass(frozen=True)
class Sizes:
    """A Llama: every number that the bytes depend on."""

    layers: int
    hidden: int
    heads: int
    mlp: int
    vocab: int
    tokens: int
    chunk: int
    kv_heads: int | None = None  # None: as many as heads

    @property
    def kv_width(self) -> int:
        return self.hidden * (self.kv_heads or self.heads) // self.heads

    @property
    def parameters(self) -> int:
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.kv_width
        block = attention + 3 * self.hidden * self.mlp + 2 * self.hidden
        return self.layers * block + 2 * self.vocab * self.hidden + self.hidden


def bytes_in_16_bits(of: Sizes, recompute: float = 0.0) -> int:
    """Most bytes at one time of a step with 16-bit weights on CUDA, blocks not compiled: in the loss, or where the last
    of the recomputed layers is back whole."""
    in_the_loss = activations_in_16_bits(of, recompute) + loss_in_16_bits(of)
    return state_in_16_bits(of) + max(in_the_loss, backward_in_16_bits(of, recompute))


def state_in_16_bits(of: Sizes) -> int:
    """Weights, and in float32 masters, two moments and the gradient."""
    return of.parameters * (HALF + 4 * WIDE)


def activations_in_16_bits(of: Sizes, recompute: float = 0.0) -> int:
    """Kept for backward: of a recomputed layer its input, of every other what ``layer_in_16_bits`` says."""
    recomputed = int(of.layers * recompute)
    return (of.layers - recomputed) * layer_in_16_bits(
        of
    ) + recomputed * HALF * of.tokens * of.hidden


def layer_in_16_bits(of: Sizes) -> int:
    """The float32 input of both norms, and what comes out; q, k, v, what attention gives and its log sums; gate, up and
    their product."""
    norms = 2 * (WIDE + HALF) * of.hidden
    attention = 2 * HALF * (of.hidden + of.kv_width) + WIDE * of.heads
    return of.tokens * (norms + attention + 3 * HALF * of.mlp)


def backward_in_16_bits(of: Sizes, recompute: float) -> int:
    """Inputs of the recomputed layers, one of them computed again, and the gradients of its output, gate and up."""
    recomputed = int(of.layers * recompute)
    if not recomputed:
        return 0
    return layer_in_16_bits(of) + HALF * of.tokens * (
        (recomputed + 1) * of.hidden + 2 * of.mlp
    )


def loss_in_16_bits(of: Sizes) -> int:
    """The last norm's input and output, and the gradient of the latter, beside the most of three: the logits of a chunk
    twice, and from the second chunk on the gradient of the head as it is summed up; that sum beside the gradients of a
    chunk's logits; and in the end the sum itself, rounded."""
    rows = (WIDE + 2 * HALF) * of.tokens * of.hidden
    head = of.vocab * of.hidden
    logits = of.chunk * of.vocab
    sum_of_earlier_chunks = WIDE * head if of.tokens > of.chunk else 0
    in_softmax = (WIDE + HALF) * logits + sum_of_earlier_chunks
    in_products = HALF * logits + WIDE * head
    at_the_end = (WIDE + HALF) * head
    return rows + max(in_softmax, in_products, at_the_end)
