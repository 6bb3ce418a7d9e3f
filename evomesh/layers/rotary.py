"""Rotary position embedding (Su et al., 2021), its two pairings, dynamic NTK and the scalings of its frequencies.

Shapes: T packed tokens, G key/value heads, R query heads per key/value head, H head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from evomesh.config.rope import RopeScaling
from evomesh.layers.dtype import promote
from evomesh.layers.sequence_bounds import SequenceBounds

Value = TypeVar("Value")
QueriesKeysValues: TypeAlias = tuple[Tensor, Tensor, Tensor]


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
        columns = torch.arange(self.head_dim, dtype=torch.float64, device=device)
        even_columns = columns[::2]  # 2i, [H/2]
        exponent = even_columns / self.head_dim
        base = columns.new_full((1, 1), self.base)
        if not self.dynamic_ntk:
            return base**-exponent
        # Each token has its own base, [T, 1].
        factor = self._ntk_factor(bounds)
        factor = factor.unsqueeze(1)
        base = base * factor
        return base**-exponent

    def _ntk_factor(self, bounds: SequenceBounds) -> Tensor:
        """Return what dynamic NTK multiplies the base by for each token, [T] float64: 1 up to ``max_position``."""
        length = bounds.span().to(torch.float64).clamp(min=self.max_position)
        stretch = self.factor * length / self.max_position - (self.factor - 1)
        stretch = torch.where(length > self.max_position, stretch, 1.0)
        factor: Tensor = stretch ** (self.head_dim / (self.head_dim - 2))
        return factor

    def _scaled(
        self,
        frequencies: Tensor,
        bounds: SequenceBounds,
        scaling: RopeScaling,
    ) -> Tensor:
        """Return the frequencies [1, H/2] as a model with ``scaling`` has them, [1 or T, H/2]."""
        if scaling.type == "linear":
            return frequencies / _given(scaling.factor)
        if scaling.type == "llama3":
            return _llama3_frequencies(frequencies, scaling)
        if scaling.type == "yarn":
            return _yarn_frequencies(frequencies, scaling, self.head_dim, self.base)
        # longrope: one divisor a frequency, another one in segments beyond the original length.
        original_length = _given(scaling.original_max_position_embeddings)
        is_long = bounds.span() > original_length  # [T]
        long_divisors = frequencies.new_tensor(_given(scaling.long_factor))
        short_divisors = frequencies.new_tensor(_given(scaling.short_factor))
        divisors = torch.where(is_long[:, None], long_divisors, short_divisors)
        return frequencies / divisors

    def _attention_factor(self) -> float:
        """Return what multiplies the tables: 1 but for yarn (Peng et al., 2023) and longrope (Ding et al., 2024)."""
        scaling = self.scaling
        if scaling is None or scaling.type not in ("yarn", "longrope"):
            return 1.0
        if scaling.attention_factor is not None:
            return scaling.attention_factor
        original_length = _given(scaling.original_max_position_embeddings)
        factor = scaling.factor or self.max_position / original_length
        if scaling.type == "longrope":
            if factor <= 1:
                return 1.0
            return math.sqrt(1 + math.log(factor) / math.log(original_length))
        if scaling.mscale and scaling.mscale_all_dim:
            # DeepSeek's two scales: where they are equal, the tables stay as they are.
            magnitude = _yarn_magnitude(factor, scaling.mscale)
            return magnitude / _yarn_magnitude(factor, scaling.mscale_all_dim)
        return _yarn_magnitude(factor, 1.0)


def _given(value: Value | None) -> Value:
    """Return a setting that the rules of the config require for this type of scaling."""
    assert value is not None
    return value


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide slow frequencies by ``factor``, keep fast ones, and interpolate between them by turns (Llama 3.1)."""
    factor = _given(scaling.factor)
    slow = frequencies / factor
    kept = _llama3_kept_share(frequencies, scaling)
    return frequencies * kept + slow * (1 - kept)


def _llama3_kept_share(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Return how much of each frequency stays as it is: 0 for slow ones, 1 for fast ones."""
    low = _given(scaling.low_freq_factor)
    high = _given(scaling.high_freq_factor)
    original_length = _given(scaling.original_max_position_embeddings)
    # An angle of f per position makes L f / (2 pi) turns within L positions.
    turns_per_radian = original_length / (2 * math.pi)
    turns = frequencies * turns_per_radian
    # Linear in the turns between the two bounds, and constant outside.
    turns_above_low = turns - low
    width = high - low
    position_in_range = turns_above_low / width
    return position_in_range.clamp(0, 1)


def _yarn_frequencies(
    frequencies: Tensor, scaling: RopeScaling, head_dim: int, base: float
) -> Tensor:
    """Divide slow frequencies by ``factor``, keep fast ones, and interpolate between them by index (YaRN)."""
    first, last = _yarn_ramp(scaling, head_dim, base)
    width = last - first
    if width == 0:
        width = 0.001  # as transformers has it: a step instead of a ramp
    indices = torch.arange(
        head_dim // 2,
        dtype=frequencies.dtype,
        device=frequencies.device,
    )
    position_in_ramp = (indices - first) / width
    divided = position_in_ramp.clamp(0, 1)  # 0: as it is, 1: divided
    slow = frequencies / _given(scaling.factor)
    return slow * divided + frequencies * (1 - divided)


def _yarn_ramp(scaling: RopeScaling, head_dim: int, base: float) -> tuple[float, float]:
    """Return the indices of the last frequency that is kept and of the first that is divided."""
    original_length = _given(scaling.original_max_position_embeddings)

    def index_of(turns: float) -> float:
        """Return the index, a real number, of the frequency with so many turns within the original length."""
        # L base^(-2i/H) = 2 pi turns, solved for i.
        radians = turns * 2 * math.pi
        positions_per_radian = original_length / radians
        numerator = head_dim * math.log(positions_per_radian)
        denominator = 2 * math.log(base)
        return numerator / denominator

    fast_turns = scaling.beta_fast or 32.0
    slow_turns = scaling.beta_slow or 1.0
    first = index_of(fast_turns)
    last = index_of(slow_turns)
    if scaling.truncate is not False:
        first = math.floor(first)
        last = math.ceil(last)
    # As transformers has it: the upper bound is H - 1, although there are H / 2
    # frequencies.
    first = max(first, 0)
    last = min(last, head_dim - 1)
    return first, last


def _yarn_magnitude(factor: float, scale: float) -> float:
    """Return what makes up for the flatter attention of a longer context: 0.1 scale ln(factor) + 1."""
    if factor <= 1:
        return 1.0
    return 0.1 * scale * math.log(factor) + 1.0


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


def parts_of_groups(qkv: Tensor, kv_heads: int, head_dim: int) -> QueriesKeysValues:
    """Return views of the fused projection [T, G (R + 2) H]: queries [T, G, R, H], keys and values [T, G, 1, H]."""
    groups = qkv.view(qkv.shape[0], kv_heads, -1, head_dim)  # [T, G, R + 2, H]
    queries = groups[:, :, :-2]
    keys = groups[:, :, -2:-1]
    values = groups[:, :, -1:]
    return queries, keys, values


class _SplitRotate(torch.autograd.Function):
    """Split and rotate qkv in one pass, and its gradient in another; slices and concatenations would take one per part.

        forward    for each pair (a, b) of a query or key:
                   out_a = a cos - b sin,  out_b = b cos + a sin
        backward   the transpose of a rotation, which is the rotation by the negative angle

    Values are copied.
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
    ) -> QueriesKeysValues:
        cos = cos[:, None, None]
        sin = sin[:, None, None]
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved

        q_in, k_in, v_in = parts_of_groups(qkv, kv_heads, head_dim)
        q = torch.empty_like(q_in)
        k = torch.empty_like(k_in)
        _rotate(q_in, cos, sin, q, interleaved)
        _rotate(k_in, cos, sin, k, interleaved)
        return q.flatten(1, 2), k.squeeze(2), v_in.squeeze(2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        minus_sin = -sin  # negates the angle
        interleaved = ctx.interleaved
        dq, dk, dv = grads

        # Each part is written to its place in the fused gradient.
        tokens, query_heads, head_dim = dq.shape
        kv_heads = dk.shape[1]
        heads = query_heads + 2 * kv_heads
        width = heads * head_dim
        dqkv = dq.new_empty(tokens, width)
        dq_place, dk_place, dv_place = parts_of_groups(dqkv, kv_heads, head_dim)

        dq = dq.reshape(dq_place.shape)  # [T, G, R, H]
        _rotate(dq, cos, minus_sin, dq_place, interleaved)
        dk = dk.unsqueeze(2)  # [T, G, 1, H]
        _rotate(dk, cos, minus_sin, dk_place, interleaved)
        dv = dv.unsqueeze(2)
        dv_place.copy_(dv)
        for_tables_and_settings = [None] * 5
        return dqkv, *for_tables_and_settings


def split_heads(qkv: Tensor, *, kv_heads: int, head_dim: int) -> QueriesKeysValues:
    """Split a fused projection like ``split_and_rotate``, for a layer without rotary positions."""
    q, k, v = parts_of_groups(qkv, kv_heads, head_dim)
    q = q.flatten(1, 2)
    k = k.squeeze(2).contiguous()
    v = v.squeeze(2).contiguous()
    return q, k, v


def split_and_rotate(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    kv_heads: int,
    head_dim: int,
    interleaved: bool,
) -> QueriesKeysValues:
    """Split a fused projection [T, G (R + 2) H] into q [T, G R, H], k and v [T, G, H], and rotate q and k.

    ``qkv`` is group-major: for each key/value head its R query heads, the key head, the value head.
    """
    if qkv.is_cpu and not torch.is_grad_enabled():
        return _rotate_together(qkv, cos, sin, kv_heads, head_dim, interleaved)
    q, k, v = _SplitRotate.apply(qkv, cos, sin, kv_heads, head_dim, interleaved)  # type: ignore[no-untyped-call]
    return q, k, v


def _rotate_together(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_heads: int,
    head_dim: int,
    interleaved: bool,
) -> QueriesKeysValues:
    """Rotate q and k in one pass, without a gradient; v stays a view of ``qkv``."""
    groups = qkv.view(qkv.shape[0], kv_heads, -1, head_dim)  # [T, G, R + 2, H]
    q_and_k = groups[:, :, :-1]
    v = groups[:, :, -1]
    cos = cos[:, None, None]
    sin = sin[:, None, None]
    rotated = torch.empty_like(q_and_k)
    _rotate(q_and_k, cos, sin, rotated, interleaved)
    q = rotated[:, :, :-1].flatten(1, 2)
    k = rotated[:, :, -1]
    return q, k, v
