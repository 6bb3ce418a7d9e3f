from __future__ import annotations

import math
import threading
from typing import Any, Literal

import pytest
import torch
from torch import nn

from evomesh.layers import init
from evomesh.layers.init import InitialWeight, fill_parameter
from evomesh.parallel.grid import Axis
from evomesh.parallel.spec import ShardSpec
from tests.support.covers import covers

SHAPE = (300, 520)  # neither dim a whole number of tiles
NORMAL = InitialWeight("normal", 1.0)


def drawn(
    name: str = "layers.0.w",
    seed: int = 1,
    spec: ShardSpec | None = None,
    initial: InitialWeight = NORMAL,
    **axes: Axis,
) -> torch.Tensor:
    spec = spec or ShardSpec(SHAPE)
    shape = [len(held) for held in spec.local_ranges(axes)]
    parameter = nn.Parameter(torch.full(shape, torch.nan))
    fill_parameter(name, parameter, spec, axes, initial, seed)
    return parameter.detach()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_are_slices_of_the_whole(dim: int, size: int) -> None:
    whole = drawn()
    parts = [
        drawn(spec=ShardSpec(SHAPE, (("tp", dim),)), tp=Axis("tp", size, rank))
        for rank in range(size)
    ]
    assert torch.equal(torch.cat(parts, dim), whole)


def test_nested_cuts_outer_to_inner() -> None:
    spec = ShardSpec(SHAPE, (("wp", 0), ("zero", 0), ("tp", 1)))
    part = drawn(
        spec=spec, wp=Axis("wp", 2, 1), zero=Axis("zero", 3, 2), tp=Axis("tp", 2, 1)
    )
    assert torch.equal(part, drawn()[250:300, 260:])


def test_vectors_and_stacked_matrices_can_be_cut() -> None:
    for shape in ((600,), (4, 300, 5)):
        whole = drawn(spec=ShardSpec(shape))
        spec = ShardSpec(shape, (("tp", len(shape) // 3),))
        parts = [drawn(spec=spec, tp=Axis("tp", 2, rank)) for rank in range(2)]
        assert torch.equal(torch.cat(parts, len(shape) // 3), whole)


@covers("seed")
def test_seed_and_name_select_the_stream() -> None:
    same, other_seed, other_name = drawn(), drawn(seed=2), drawn(name="layers.1.w")
    assert torch.equal(same, drawn())
    for other in (other_seed, other_name):
        correlation = torch.corrcoef(torch.stack([same.flatten(), other.flatten()]))[
            0, 1
        ]
        assert abs(correlation) < 5 / math.sqrt(same.numel())


def test_no_two_tiles_are_alike() -> None:
    values = drawn(spec=ShardSpec((512, 512)))
    tiles = [
        values[i : i + 256, j : j + 256].flatten() for i in (0, 256) for j in (0, 256)
    ]
    assert torch.corrcoef(torch.stack(tiles)).triu(1).abs().max() < 5 / 256


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_scale_is_the_standard_deviation(kind: str) -> None:
    values = drawn(spec=ShardSpec((1000, 1000)), initial=InitialWeight(kind, 0.02))  # type: ignore[arg-type]
    assert values.std().item() == pytest.approx(0.02, rel=5e-3)
    assert abs(values.mean().item()) < 5 * 0.02 / 1000
    if kind == "uniform":
        assert values.abs().max().item() <= math.sqrt(3) * 0.02 * 1.0001


def test_numbers_are_pinned() -> None:
    """Saved runs rely on them: a change here changes every start."""
    assert drawn()[0, :3].tolist() == pytest.approx(PINNED, rel=1e-6)


PINNED = [-0.3281902074813843, 0.4971446394920349, 1.5129783153533936]


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_the_number_of_threads_changes_no_bit(
    kind: Literal["normal", "uniform"], threads: int
) -> None:
    initial = InitialWeight(kind, 0.02)
    axes = {"tp": Axis("tp", 2, 1)}
    for shards in ((), (("tp", 0),)):
        spec = ShardSpec((1500, 300), shards)
        shape = [len(held) for held in spec.local_ranges(axes)]
        one, many = torch.zeros(2, *shape)
        fill_parameter("w", one, spec, axes, initial, 5, threads=1)
        fill_parameter("w", many, spec, axes, initial, 5, threads=threads)
        assert one.any(1).all() and torch.equal(one, many)


def test_bands_are_drawn_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four bands waits until all four have begun, which one thread after the other never would."""
    together = threading.Barrier(4, timeout=20)
    draw_band = init._draw_band

    def waiting(*arguments: Any) -> torch.Tensor:
        together.wait()
        return draw_band(*arguments)

    monkeypatch.setattr(init, "_draw_band", waiting)
    weight = nn.Parameter(torch.zeros(1024, 8))
    fill_parameter("w", weight, ShardSpec((1024, 8)), {}, NORMAL, 0, threads=4)
    assert weight.any(1).all() and weight.grad_fn is None


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "_draw_band", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        fill_parameter(
            "w", torch.zeros(1024, 8), ShardSpec((1024, 8)), {}, NORMAL, 0, threads=2
        )
