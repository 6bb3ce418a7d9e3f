"""Rotary position embedding (Su et al., 2021), its two pairings, dynamic NTK and the scalings of its frequencies.

Shapes: T packed tokens, G key/value heads, R query heads per key/value head, H head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from evomesh.config.rope import RopeScaling
from evomesh.layers.dtype import promote
from evomesh.layers.sequence_bounds import SequenceBounds

Value = TypeVar("Value")


@dataclass(frozen=True)
class RotaryEmbedding:
    """Rotation angles: position * base^(-2i/H) for pair i.

    Attributes:
        head_dim: H, even.
        base: ``rope_base``.
        dynamic_ntk: for a segment of length L, longer than ``max_position`` M, use
            base * (factor * L / M - (factor - 1))^(H / (H - 2)). L is the length of the segment, not of the pack, so
            that a document gets the same angles alone and packed with others, in every layout.
        factor: ``rope_scaling_factor``.
        scaling: ``rope_scaling``; not together with dynamic NTK.
    """

    head_dim: int
    base: float
    dynamic_ntk: bool = False
    max_position: int = 2048
    factor: float = 1.0
    scaling: RopeScaling | None = None

    def tables(
        self, bounds: SequenceBounds, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of one pack, each [T, H/2] in at least float32."""
        # In float64, because a float32 angle loses accuracy as positions grow: one near
        # 100,000 is rounded by up to 0.004.
        positions = bounds.position_ids.to(torch.float64)
        frequencies = self._frequencies(bounds)
        if self.scaling is not None:
            frequencies = self._scaled(frequencies, bounds, self.scaling)
        angles = positions[:, None] * frequencies
        cos = angles.cos()
        sin = angles.sin()
        attention_factor = self._attention_factor()
        if attention_factor != 1.0:
            # The tables multiply queries and keys, so their product is multiplied by
            # the square.
            cos = cos * attention_factor
            sin = sin * attention_factor
        wide = promote(dtype)
        return cos.to(wide), sin.to(wide)

    def _frequencies(self, bounds: SequenceBounds) -> Tensor:
        """Return the angle per position of each pair, [1, H/2] float64; [T, H/2] with dynamic NTK."""
        device = bounds.position_ids.device
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        even_columns = torch.arange(0, self.head_dim, 2, **options)  # 2i, [H/2]
        exponent = even_columns / self.head_dim
        base = torch.full((1,), self.base, **options)
        if self.dynamic_ntk:
            base = base * self._ntk_factor(bounds)
        return base[:, None] ** -exponent

    def _ntk_factor(self, bounds: SequenceBounds) -> Tensor:
        """Return what dynamic NTK multiplies the base by for each token, [T] float64: 1 up to ``max_position``."""
        length = bounds.span().to(torch.float64).clamp(min=self.max_position)
        stretch = self.factor * length / self.max_position - (self.factor - 1)
        stretch = torch.where(length > self.max_position, stretch, 1.0)
        factor: Tensor = stretch ** (self.head_dim / (self.head_dim - 2))
        return factor

    def _scaled(
        self, frequencies: Tensor, bounds: SequenceBounds, scaling: RopeScaling
    ) -> Tensor:
        """Return the frequencies [1, H/2] as a model with ``scaling`` has them, [1 or T, H/2]."""
        if scaling.type == "linear":
            return frequencies / _given(scaling.factor)
        if scaling.type == "llama3":
            return _llama3_frequencies(frequencies, scaling)
        if scaling.type == "yarn":
            return _yarn_frequencies(frequencies, scaling, self.head_dim, self.base)
        # longrope: one divisor a frequency, another one in segments beyond the original length.
        short = frequencies.new_tensor(_given(scaling.short_factor))
        long = frequencies.new_tensor(_given(scaling.long_factor))
        # [T]
        is_long = bounds.span() > _given(scaling.original_max_position_embeddings)
        divisors = torch.where(is_long[:, None], long, short)
        return frequencies / divisors

    def _attention_factor(self) -> float:
        """Return what multiplies the tables: 1 but for yarn (Peng et al., 2023) and longrope (Ding et al., 2024)."""
        scaling = self.scaling
        if scaling is None or scaling.type not in ("yarn", "longrope"):
            return 1.0
        if scaling.attention_factor is not None:
            return scaling.attention_factor
        original = _given(scaling.original_max_position_embeddings)
        factor = scaling.factor or self.max_position / original
        if scaling.type == "longrope":
            return (
                math.sqrt(1 + math.log(factor) / math.log(original))
                if factor > 1
                else 1.0
            )
        if scaling.mscale and scaling.mscale_all_dim:
            return _yarn_magnitude(factor, scaling.mscale) / _yarn_magnitude(
                factor, scaling.mscale_all_dim
            )
        return _yarn_magnitude(factor, 1.0)


def _given(value: Value | None) -> Value:
    """Return a setting that the rules of the config require for this type of scaling."""
    assert value is not None
    return value


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide slow frequencies by ``factor``, keep fast ones, and interpolate between them by turns (Llama 3.1)."""
    low = _given(scaling.low_freq_factor)
    high = _given(scaling.high_freq_factor)
    original = _given(scaling.original_max_position_embeddings)
    # Turns that the angle makes within the original length.
    turns = frequencies * (original / (2 * math.pi))
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divided, 1: as it is
    slow = frequencies / _given(scaling.factor)
    return frequencies * kept + slow * (1 - kept)


def _yarn_frequencies(
    frequencies: Tensor, scaling: RopeScaling, head_dim: int, base: float
) -> Tensor:
    """Divide slow frequencies by ``factor``, keep fast ones, and interpolate between them by index (YaRN)."""
    first, last = _yarn_ramp(scaling, head_dim, base)
    width = last - first or 0.001
    indices = torch.arange(
        head_dim // 2, dtype=frequencies.dtype, device=frequencies.device
    )
    divided = ((indices - first) / width).clamp(0, 1)  # 0: as it is, 1: divided
    slow = frequencies / _given(scaling.factor)
    return slow * divided + frequencies * (1 - divided)


def _yarn_ramp(scaling: RopeScaling, head_dim: int, base: float) -> tuple[float, float]:
    """Return the indices of the last frequency that is kept and of the first that is divided."""
    original = _given(scaling.original_max_position_embeddings)

    def index_of(turns: float) -> float:
        """Return the index, a real number, of the frequency with so many turns within the original length."""
        # original * base^(-2i/H) = 2 pi turns, solved for i.
        return (
            head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
        )

    first = index_of(scaling.beta_fast or 32.0)
    last = index_of(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        first = math.floor(first)
        last = math.ceil(last)
    # As transformers has it: the upper bound is H - 1, although there are H / 2
    # frequencies.
    return max(first, 0), min(last, head_dim - 1)


def _yarn_magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return views of the two members of every rotated pair: adjacent columns, or first and second half."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, interleaved: bool
) -> None:
    """Write ``x`` rotated by the angle into ``out``, both [T, G, heads, H]; tables [T, 1, 1, H/2]."""
    a, b = _pairs(x, interleaved)
    out_a, out_b = _pairs(out, interleaved)
    out_a.copy_(torch.addcmul(a * cos, b, sin, value=-1))
    out_b.copy_(torch.addcmul(b * cos, a, sin))


class _SplitRotate(torch.autograd.Function):
    """Split and rotate qkv in one pass, and its gradient in another; slices and concatenations would take one per part.

    The backward of a rotation is the rotation by the negative angle.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_heads: int,
        head_dim: int,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cos = cos[:, None, None]
        sin = sin[:, None, None]
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved

        # Views of qkv: R query heads, the key head and the value head of each group.
        groups = qkv.view(qkv.shape[0], kv_heads, -1, head_dim)  # [T, G, R + 2, H]
        q_in = groups[:, :, :-2]
        k_in = groups[:, :, -2:-1]
        v_in = groups[:, :, -1]
        q = torch.empty_like(q_in)
        k = torch.empty_like(k_in)
        _rotate(q_in, cos, sin, q, interleaved)
        _rotate(k_in, cos, sin, k, interleaved)
        return q.flatten(1, 2), k.squeeze(2), v_in.contiguous()

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        dq, dk, dv = grads
        tokens, kv_heads, head_dim = dk.shape
        dq = dq.reshape(tokens, kv_heads, -1, head_dim)  # [T, G, R, H]
        dk = dk.unsqueeze(2)  # [T, G, 1, H]
        queries = dq.shape[2]
        # Write each part to its place in the fused gradient; the angle is negated by
        # negating the sine.
        dqkv = dq.new_empty(tokens, kv_heads, queries + 2, head_dim)
        minus_sin = -sin
        _rotate(dq, cos, minus_sin, dqkv[:, :, :-2], ctx.interleaved)
        _rotate(dk, cos, minus_sin, dqkv[:, :, -2:-1], ctx.interleaved)
        dqkv[:, :, -1] = dv
        return dqkv.view(tokens, -1), None, None, None, None, None


def split_heads(
    qkv: Tensor, *, kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection like ``split_and_rotate``, for a layer without rotary positions."""
    tokens = qkv.shape[0]
    groups = qkv.view(tokens, kv_heads, -1, head_dim)  # [T, G, R + 2, H]
    queries = groups[:, :, :-2]
    keys = groups[:, :, -2]
    values = groups[:, :, -1]
    return queries.flatten(1, 2), keys.contiguous(), values.contiguous()


def split_and_rotate(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    kv_heads: int,
    head_dim: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection [T, G (R + 2) H] into q [T, G R, H], k and v [T, G, H], and rotate q and k.

    ``qkv`` is group-major: for each key/value head its R query heads, the key head, the value head.
    """
    if qkv.is_cpu and not torch.is_grad_enabled():
        # Without gradient q and k are rotated in one pass, and v stays a view of qkv.
        groups = qkv.view(qkv.shape[0], kv_heads, -1, head_dim)  # [T, G, R + 2, H]
        q_and_k = groups[:, :, :-1]
        v = groups[:, :, -1]
        rotated = torch.empty_like(q_and_k)
        cos = cos[:, None, None]
        sin = sin[:, None, None]
        _rotate(q_and_k, cos, sin, rotated, interleaved)
        q = rotated[:, :, :-1].flatten(1, 2)
        k = rotated[:, :, -1]
        return q, k, v
    q, k, v = _SplitRotate.apply(qkv, cos, sin, kv_heads, head_dim, interleaved)  # type: ignore[no-untyped-call]
    return q, k, v
