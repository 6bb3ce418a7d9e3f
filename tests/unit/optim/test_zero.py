"""ZeroOptimizer on one process against ``torch.optim.AdamW``."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from evomesh.config.schema import AdamConfig, ZeroConfig
from evomesh.optim.zero import StepResult, ZeroOptimizer
from evomesh.parallel.spec import ShardSpec, with_spec
from tests.support import tolerances
from tests.support.covers import covers

ADAM = AdamConfig(adam_beta1=0.9, weight_decay=0.1, adam_eps=1e-8)


def make_model(dtype: torch.dtype, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5)).to(dtype)


def make_optimizer(
    model: nn.Module, clip: float = 1.0, adam: AdamConfig = ADAM
) -> ZeroOptimizer:
    return ZeroOptimizer(
        model.named_parameters(), adam, ZeroConfig(clip_grad_norm=clip)
    )


def inputs(step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(
        16, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64
    ).to(dtype)


def rates(step: int) -> tuple[float, float]:
    return 1e-2 / (step + 1), 0.9 + 0.01 * step


def backward(
    model: nn.Module, step: int, scale: float = 1.0, micro_batches: int = 1
) -> None:
    dtype = next(model.parameters()).dtype
    for part in inputs(step, dtype).chunk(micro_batches):
        (model(part).square().sum() * scale).backward()


def run(
    model: nn.Module, optimizer: ZeroOptimizer, steps: range, scale: float = 1.0
) -> list[StepResult]:
    results = []
    for step in steps:
        backward(model, step, scale)
        results.append(optimizer.step(*rates(step), inv_scale=1 / scale))
        optimizer.zero_grad()
    return results


def reference(model: nn.Module, steps: range, clip: float) -> list[float]:
    adamw = torch.optim.AdamW(
        model.parameters(),
        weight_decay=ADAM.weight_decay,
        eps=ADAM.adam_eps,
        foreach=False,
        fused=False,
    )
    norms = []
    for step in steps:
        backward(model, step)
        norms.append(
            float(
                nn.utils.clip_grad_norm_(model.parameters(), clip if clip else math.inf)
            )
        )
        for group in adamw.param_groups:
            group["lr"], group["betas"] = rates(step)[0], (0.9, rates(step)[1])
        adamw.step()
        adamw.zero_grad()
    return norms


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(tolerances.distance(p.detach(), q.detach()) for p, q in pairs)


@covers(
    "adam.lr",
    "adam.adam_beta1",
    "adam.adam_beta2",
    "adam.adam_eps",
    "adam.weight_decay",
)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)]
)
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_equals_torch_adamw(
    dtype: torch.dtype, bound: float, clip: float, scale: float
) -> None:
    ours, theirs = make_model(dtype), make_model(dtype)
    results = run(ours, make_optimizer(ours, clip), range(5), scale)
    norms = reference(theirs, range(5), clip)
    assert [result.check for result in results] == ["ok"] * 5
    assert [result.grad_norm for result in results] == pytest.approx(norms, rel=bound)
    assert distance(make_model(dtype), ours) > 0
    assert distance(ours, theirs) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_float32_masters(dtype: torch.dtype) -> None:
    """The oracle: float32 AdamW on the sum in float32 of the micro-batches' half gradients."""
    model = make_model(dtype)
    optimizer = make_optimizer(model, clip=0.0)
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    adamw = torch.optim.AdamW(
        masters, weight_decay=ADAM.weight_decay, foreach=False, fused=False
    )
    for step in range(4):
        twin = make_model(dtype)
        twin.load_state_dict(model.state_dict())
        for part in inputs(step, dtype).chunk(4):
            gradients = torch.autograd.grad(
                twin(part).square().sum(), list(twin.parameters())
            )
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = (
                    gradient.float()
                    if master.grad is None
                    else master.grad + gradient.float()
                )
        for group in adamw.param_groups:
            group["lr"], group["betas"] = rates(step)[0], (0.9, rates(step)[1])
        adamw.step()
        adamw.zero_grad()
        backward(model, step, micro_batches=4)
        assert all(p.grad is None for p in model.parameters())
        optimizer.step(*rates(step), inv_scale=1.0)
        optimizer.zero_grad()
    tensors = optimizer.state_tensors()
    for (name, parameter), master in zip(
        model.named_parameters(), masters, strict=True
    ):
        ours = tensors[f"optim.master.{name}"]
        assert ours.dtype == torch.float32
        assert tolerances.distance(ours, master.detach()) <= 2e-5
        assert torch.equal(parameter, ours.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bad", "found"), [(math.inf, "inf"), (math.nan, "nan")])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_with_a_gradient_that_is_not_finite_touches_nothing(
    dtype: torch.dtype, bad: float, found: str, clip: float
) -> None:
    model, clean = make_model(dtype), make_model(dtype)
    optimizer, other = make_optimizer(model, clip), make_optimizer(clean, clip)
    run(model, optimizer, range(2))
    before = {
        name: tensor.clone()
        for name, tensor in (
            optimizer.state_tensors() | dict(model.named_parameters())
        ).items()
    }
    backward(model, 2)
    slot = optimizer.slots[0]
    slot.gradient_rows().view(slot.local.shape)[1, 1] = bad
    result = optimizer.step(1e-2, 0.9, inv_scale=1.0)
    optimizer.zero_grad()
    assert result.check == found
    after = optimizer.state_tensors() | dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    run(model, optimizer, range(2, 4))
    run(clean, other, range(4))
    # The skipped step left no trace in the step count either.
    assert distance(model, clean) == 0
    assert optimizer.state() == other.state()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_to_the_bit(dtype: torch.dtype) -> None:
    straight, first, second = (make_model(dtype) for _ in range(3))
    run(straight, make_optimizer(straight), range(6))
    stopped = make_optimizer(first)
    run(first, stopped, range(3))
    resumed = make_optimizer(second)
    second.load_state_dict(first.state_dict())
    saved = {name: tensor.clone() for name, tensor in stopped.state_tensors().items()}
    for name, tensor in resumed.state_tensors().items():
        tensor.copy_(saved[name])
    resumed.load_state(stopped.state())
    run(second, resumed, range(3, 6))
    assert distance(second, straight) == 0


def test_state_has_the_documented_names_and_specs() -> None:
    model = make_model(torch.bfloat16)
    names = [name for name, _ in model.named_parameters()]
    shards = make_optimizer(model).state_shards()
    assert sorted(shards) == sorted(
        f"optim.{kind}.{name}"
        for kind in ("exp_avg", "exp_avg_sq", "master")
        for name in names
    )
    assert all(
        shard.spec == ShardSpec(tuple(shard.tensor.shape)) for shard in shards.values()
    )
    assert not any(
        "master" in name
        for name in make_optimizer(make_model(torch.float32)).state_tensors()
    )


def test_state_of_a_padded_vocabulary_says_so() -> None:
    weight = with_spec(
        nn.Parameter(torch.randn(8, 4)),
        ShardSpec((8, 4), (), frozenset({"tp"}), padding=3),
    )
    optimizer = ZeroOptimizer([("embedding.weight", weight)], ADAM, ZeroConfig())
    for shard in optimizer.state_shards().values():
        assert shard.spec == ShardSpec((8, 4), padding=3)


def test_padded_rows_stay_zero() -> None:
    weight = nn.Parameter(torch.cat([torch.randn(5, 4), torch.zeros(3, 4)]))
    optimizer = ZeroOptimizer([("embedding.weight", weight)], ADAM, ZeroConfig())
    for _ in range(3):
        weight[:5].square().sum().backward()
        optimizer.step(0.1, 0.9, 1.0)
        optimizer.zero_grad()
    assert torch.equal(weight[5:], torch.zeros(3, 4))


def test_masters_can_be_taken_from_loaded_weights() -> None:
    model, loaded = make_model(torch.bfloat16), make_model(torch.bfloat16, seed=1)
    optimizer = make_optimizer(model)
    model.load_state_dict(loaded.state_dict())
    optimizer.refresh_masters()
    optimizer.step(0.0, 0.9, 1.0)
    assert distance(model, loaded) == 0


@covers("adam.no_decay")
def test_weight_decay_of_what_no_decay_names_is_zero() -> None:
    model = make_model(torch.float32)
    optimizer = make_optimizer(
        model, adam=AdamConfig(weight_decay=0.5, no_decay=("bias",))
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(0.1, 0.9, 1.0)  # no gradient: decay only
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter, before[name] * (1.0 if name.endswith("bias") else 0.95)
        )


def test_frozen_parameters_are_left_out() -> None:
    model = make_model(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = make_optimizer(model)
    run(model, optimizer, range(2))
    assert torch.equal(model[0].weight, before)
    assert "optim.exp_avg.0.weight" not in optimizer.state_tensors()


def test_many_micro_batches_are_one_large_batch() -> None:
    one, many = make_model(torch.float64), make_model(torch.float64)
    for model, micro_batches in ((one, 1), (many, 8)):
        optimizer = make_optimizer(model)
        for step in range(3):
            backward(model, step, micro_batches=micro_batches)
            optimizer.step(*rates(step), inv_scale=1.0)
            optimizer.zero_grad()
    assert distance(many, one) <= tolerances.ACCUMULATION


def test_start_line_says_how_many_elements_a_rank_updates(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", logger="evomesh.optim.zero"):
        make_optimizer(make_model(torch.float32))
    assert caplog.messages == ["Number of elements on ranks: [161], rank:0"]
