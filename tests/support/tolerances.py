"""Every tolerance of the suite, with its reason. They only tighten."""

from __future__ import annotations

import torch
from torch import Tensor

# Float64, max|a-b| / max|b| per tensor: another layout sums in another order.
LAYOUT = 1e-10
FIRST_LOSS = 1e-14  # float64, relative: data, ZeRO and pipeline splits change no sum inside a token's loss
ACCUMULATION = 1e-12  # float64: micro-batches added up against one large batch
FLOAT32_RUN = 2e-5  # relative, losses of a few AdamW steps in another layout: Adam amplifies the order of sums
FLOAT32_LAYOUT = 1e-5  # as LAYOUT, of a float32 model
# Float64, logits and gradients against transformers with its upcasts patched.
TRANSFORMERS = 1e-9
TRANSFORMERS_FLOAT32 = 1e-5  # the same unpatched: it drops to float32 inside


def distance(a: Tensor, b: Tensor) -> float:
    """``max|a - b| / max|b|`` (0 where both are zero), the distance that the tolerances above are about."""
    if a.shape != b.shape:
        raise AssertionError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    if b.numel() == 0:
        return 0.0
    difference, size = (
        (a.double() - b.double()).abs().max().item(),
        b.double().abs().max().item(),
    )
    return difference / size if size else difference


def assert_close(a: Tensor, b: Tensor, tolerance: float, what: str = "") -> None:
    """``distance(a, b) <= tolerance``; NaN fails."""
    found = distance(a, b)
    assert found <= tolerance, f"{what}: {found:.3e} > {tolerance:.0e}"


def assert_equal_bits(a: Tensor, b: Tensor, what: str = "") -> None:
    assert a.dtype == b.dtype and torch.equal(a, b), (
        f"{what}: {distance(a, b):.3e} apart, expected equal bits"
    )
