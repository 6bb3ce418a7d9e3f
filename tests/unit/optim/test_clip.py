from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from evomesh.optim.clip import check_norm, clip_factor, counts_in_norm, global_norm
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.spec import ShardSpec
from tests.support.covers import covers

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_is_torchs(dtype: torch.dtype) -> None:
    grads = [
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for shape in ((7, 3), (5,), ())
    ]
    expected = float(nn.utils.get_total_norm([grad.double() for grad in grads]))
    assert float(global_norm(grads, Grid(), CPU)) == pytest.approx(
        expected, rel=1e-12 if dtype == torch.float64 else 1e-6
    )
    assert global_norm([], Grid(), CPU) == 0


def test_squares_of_several_tensors_may_leave_float32() -> None:
    grads = [torch.full((4,), 0.7e19) for _ in range(9)]
    assert float(global_norm(grads, Grid(), CPU)) == pytest.approx(6 * 0.7e19, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "found"),
    [([1.0], "ok"), ([math.inf, 1.0], "inf"), ([-math.inf, math.nan], "nan")],
)
def test_what_is_found(values: list[float], found: str) -> None:
    assert (
        check_norm(
            float(global_norm([torch.ones(3), torch.tensor(values)], Grid(), CPU))
        )
        == found
    )


@covers("hybrid_zero_optimizer.clip_grad_norm")
def test_clip_factor_is_torchs() -> None:
    for norm, most in ((0.5, 1.0), (2.0, 1.0), (0.0, 1.0), (1e-3, 1e-4)):
        gradient = torch.tensor([norm], dtype=torch.float64)
        parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        parameter.grad = gradient.clone()
        nn.utils.clip_grad_norm_([parameter], most)
        factor = clip_factor(torch.tensor(norm, dtype=torch.float64), most)
        assert norm * float(factor) == pytest.approx(
            float(parameter.grad), rel=1e-12, abs=1e-300
        )
    assert clip_factor(torch.tensor(100.0), 0.0) == 1.0


def test_each_element_is_counted_by_exactly_one_rank() -> None:
    spec = ShardSpec((8, 8), (("tp", 1), ("zero", 0)))
    counted = [
        (zero, replica, tp)
        for zero in range(2)
        for replica in range(2)
        for tp in range(2)
        if counts_in_norm(
            spec,
            (Axis("zero", 2, zero), Axis("replica", 2, replica), Axis("tp", 2, tp)),
        )
    ]
    assert counted == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]
