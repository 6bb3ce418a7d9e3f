"""A model that cannot fit into the memory of a machine is refused before it is built; float16 on a CPU is reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evomesh.config.schema import Config
from evomesh.config.size import parameter_count
from evomesh.errors import UserError
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.train.memory import bytes_per_rank, float16_warning, refuse_too_large
from evomesh.train.stages import build_stages

GIB = 1024**3


def config_of(dtype: str = "bfloat16", **parallel: Any) -> Config:
    """Return a config of the guide's 7B model."""
    model = dict(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        mlp_ratio=8 / 3,
        vocab_size=103168,
        dtype=dtype,
    )
    return Config.model_validate({"model": model, "parallel": parallel})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_bytes_are_those_of_the_tensors_that_training_holds(dtype: str) -> None:
    small = dict(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=61)
    config = Config.model_validate({"model": small | {"dtype": dtype}})
    stages = build_stages(config, Grid(), MODES["mtp"], torch.device("cpu"))
    named = stages.parameters().items()
    zero = config.hybrid_zero_optimizer
    optimizer = ZeroOptimizer(named, config.adam, zero, Grid(), stages.module)
    held = [*stages.parameters().values(), *optimizer.state_tensors().values()]
    bytes_held = sum(tensor.nbytes for tensor in held)
    gradients = sum(slot.master.nbytes for slot in optimizer.slots)
    assert bytes_per_rank(config, 1) == bytes_held + gradients


@pytest.mark.parametrize(
    ("parallel", "world", "per_parameter"),
    [
        ({}, 1, 18),
        ({}, 4, 6 + 12 / 4),
        ({"zero1": {"size": 2}}, 4, 6 + 12 / 2),
        ({"zero1": {"size": -1, "fsdp": True}}, 4, 18 / 4),
        ({"tensor": {"size": 2}, "pipeline": {"size": 2}}, 8, 6 / 4 + 12 / 8),
        ({"tensor": {"size": 2, "mode": "isp"}, "weight": {"size": 4}}, 8, 6 / 4 + 12 / 8),
    ],
)  # fmt: skip
def test_shards_take_less(
    parallel: dict[str, Any], world: int, per_parameter: float
) -> None:
    config = config_of(**parallel)
    parameters = parameter_count(config.model)
    assert parameters == 7_321_948_160
    assert bytes_per_rank(config, world) == parameters * per_parameter


def test_a_model_that_does_not_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(UserError) as caught:
        refuse_too_large(config_of(), 1, {}, lambda: 25 * GIB)
    words = str(caught.value)
    for part in ("7,321,948,160 parameters", "122.7 GiB", "25.0 GiB are free", "demo"):
        assert part in words
    refuse_too_large(config_of(), 1, {}, lambda: 123 * GIB)
    refuse_too_large(config_of(), 1, {}, lambda: None)


def test_ranks_of_one_machine_share_its_memory() -> None:
    together = {"LOCAL_WORLD_SIZE": "4"}
    refuse_too_large(config_of(), 4, {}, lambda: 100 * GIB)
    with pytest.raises(UserError, match=r"245\.5 GiB"):
        refuse_too_large(config_of(), 4, together, lambda: 100 * GIB)


def test_float16_on_a_cpu_is_reported_with_the_ratio() -> None:
    words = float16_warning(config_of("float16"), lambda: 9.37)
    assert words is not None and "9.4 times as long as in float32" in words
    assert float16_warning(config_of("float16"), lambda: 0.9) is None
    assert float16_warning(config_of("float32"), lambda: 1 / 0) is None
