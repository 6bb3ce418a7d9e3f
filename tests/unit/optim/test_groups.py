"""Parameter groups: which parameters they have, and what a group does in each update rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.config.loader import load_config
from evomesh.config.optimizer import OptimizerConfig
from evomesh.config.parameter_groups import ParameterGroupConfig, group_number
from evomesh.config.schema import AdamConfig, ZeroConfig
from evomesh.errors import ConfigError, UserError
from evomesh.optim.group_table import check_groups, group_table, grouped_parameters
from evomesh.optim.groups import UpdateSettings, has_weight_decay, update_settings
from evomesh.optim.zero import ZeroOptimizer
from tests.support.runs import write_run
from tests.support.tolerances import assert_equal_bits

NAMES = [
    "embedding.weight",
    "layers.0.attention.wqkv.weight",
    "layers.0.attention.wqkv.bias",
    "layers.0.attention_norm.weight",
    "layers.0.ffn_norm.bias",
    "norm.weight",
    "head.weight",
]
SHAPES = {
    "embedding.weight": (7, 4),
    "layers.0.wo.weight": (6, 4),
    "layers.1.wo.weight": (6, 4),
    "layers.1.wo.bias": (6,),
}


def kept(*no_decay: str) -> list[str]:
    return [name for name in NAMES if not has_weight_decay(name, no_decay)]


def groups(*items: dict[str, Any]) -> tuple[ParameterGroupConfig, ...]:
    return tuple(ParameterGroupConfig(**item) for item in items)


def test_everything_is_decayed_by_default() -> None:
    assert kept() == []


def test_each_kind_can_be_left_out() -> None:
    assert kept("bias") == [NAMES[2], NAMES[4]]
    assert kept("norm") == [NAMES[3], NAMES[4], NAMES[5]]
    assert kept("embedding") == [NAMES[0]]
    assert kept("bias", "norm", "embedding") == [NAMES[0], *NAMES[2:6]]


def test_the_first_pattern_holds() -> None:
    chosen = groups(
        {"pattern": "layers.*.bias", "weight_decay": 0.0},
        {"pattern": "layers.?.attention*", "lr_scale": 0.5},
        {"pattern": "*norm.weight", "weight_decay": 0.3},
        {"pattern": "LAYERS.*", "lr_scale": 9.0},
    )
    numbers = [group_number(name, chosen) for name in NAMES]
    assert numbers == [None, 2, 1, 2, 1, 3, None]


def test_what_a_group_leaves_open_is_as_for_all() -> None:
    chosen = groups(
        {"pattern": "layers.0.attention.*", "lr_scale": 0.5},
        {"pattern": "layers.0.*", "weight_decay": 0.3},
        {"pattern": "head*", "weight_decay": 0.0},
    )
    adam = AdamConfig(weight_decay=0.1, no_decay=("bias", "norm"), groups=chosen)
    found = [update_settings(name, adam) for name in NAMES]
    assert found == [
        UpdateSettings(1.0, 0.1),
        UpdateSettings(0.5, 0.1),
        UpdateSettings(0.5, 0.0),
        UpdateSettings(1.0, 0.3),
        UpdateSettings(1.0, 0.3),
        UpdateSettings(1.0, 0.0),
        UpdateSettings(1.0, 0.0),
    ]


def optimizer_of(
    rule: str, adam: AdamConfig, names: list[str]
) -> tuple[ZeroOptimizer, dict[str, nn.Parameter]]:
    draw = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(shape, generator=draw, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }
    weights = {name: nn.Parameter(drawn[name].clone()) for name in names}
    config = OptimizerConfig.model_validate({"type": rule})
    zero = ZeroConfig(clip_grad_norm=0.0)
    return ZeroOptimizer(weights.items(), adam, zero, config=config), weights


def trained(
    rule: str, adam: AdamConfig, names: list[str], lr: float
) -> dict[str, torch.Tensor]:
    optimizer, weights = optimizer_of(rule, adam, names)
    for step in range(4):
        for name, weight in weights.items():
            seed = 100 * step + list(SHAPES).index(name)
            draw = torch.Generator().manual_seed(seed)
            weight.grad = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
        optimizer.step(lr * (step + 1), 0.9, 1.0)
    return {name: weight.detach() for name, weight in weights.items()}


@pytest.mark.parametrize("rule", ["adamw", "muon", "lion", "schedule_free"])
def test_a_group_is_an_optimizer_with_its_rate_and_decay(rule: str) -> None:
    """To the bit: the factors are powers of two."""
    plain = AdamConfig(weight_decay=0.1)
    chosen = groups(
        {"pattern": "layers.1.*", "lr_scale": 0.25, "weight_decay": 0.5},
        {"pattern": "emb*", "lr_scale": 4.0},
    )
    adam = plain.model_copy(update={"groups": chosen})
    found = trained(rule, adam, list(SHAPES), 0.01)
    other_decay = plain.model_copy(update={"weight_decay": 0.5})
    # Muon refuses a model without a matrix: each part has one of the second block.
    matrix = "layers.0.wo.weight"
    parts = [
        (["layers.1.wo.weight", "layers.1.wo.bias"], other_decay, 0.0025),
        (["embedding.weight", matrix], plain, 0.04),
        ([matrix], plain, 0.01),
    ]
    expected: dict[str, torch.Tensor] = {}
    for names, settings, lr in parts:
        expected |= trained(rule, settings, names, lr)
    for name, weight in expected.items():
        assert_equal_bits(found[name], weight, name)
    ungrouped = trained(rule, plain, list(SHAPES), 0.01)
    same = [name for name in SHAPES if torch.equal(ungrouped[name], found[name])]
    assert same == [matrix]


def test_a_pattern_without_a_parameter_is_refused_with_the_nearest_names() -> None:
    names = [f"layers.{n}.attention.{kind}.weight" for n in (0, 1) for kind in "ok"]
    chosen = groups({"pattern": "*.attention.kv.*", "lr_scale": 0.5})
    with pytest.raises(UserError) as refused:
        check_groups(chosen, [*names, "layers.0.ffn_norm.weight"])
    assert "'*.attention.kv.*' matches none of the model's 5" in str(refused.value)
    assert "adam.groups, item 1" in str(refused.value)
    nearest = str(refused.value.expected).partition("nearest are ")[2].split(", ")
    assert nearest[0] == "layers.0.attention.k.weight"
    assert "layers.1.attention.k.weight" not in nearest


def test_a_pattern_whose_parameters_are_all_taken_is_refused() -> None:
    chosen = groups(
        {"pattern": "head*", "lr_scale": 0.5},
        {"pattern": "*", "lr_scale": 0.5},
        {"pattern": "*norm*", "lr_scale": 0.5},
    )
    with pytest.raises(UserError, match=r"all 3 .* earlier items, .*norm.* to item 2"):
        check_groups(chosen, NAMES)
    check_groups(chosen[:2], NAMES)


def test_the_table_counts_parameters() -> None:
    chosen = groups(
        {"pattern": "layers.1.*", "lr_scale": 0.25},
        {"pattern": "emb*", "weight_decay": 0.0},
    )
    adam = AdamConfig(weight_decay=0.1, no_decay=("bias",), groups=chosen)
    optimizer, _ = optimizer_of("adamw", adam, list(SHAPES))
    table = group_table(chosen, grouped_parameters(optimizer))
    assert [line.split() for line in table.splitlines()] == [
        ["group", "pattern", "parameters", "lr_scale", "weight_decay"],
        ["1", "layers.1.*", "24", "0.25", "0.1"],
        ["1", "layers.1.*", "6", "0.25", "0"],
        ["2", "emb*", "28", "1", "0"],
        ["-", "all", "others", "24", "1", "0.1"],
    ]


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([{"pattern": "*", "lr_sclae": 1.0}], "unknown key 'lr_sclae'; did you mean"),
        ([{"lr_scale": 1.0}], "item 1 has no pattern"),
        ([{"pattern": "*"}], "item 1 changes nothing"),
        ([{"pattern": "*", "lr_scale": -1.0}], "found -1.0"),
        ([{"pattern": "*", "weight_decay": "a"}], "found 'a'"),
        ({"pattern": "*"}, "a list of dicts"),
        (["*"], "item 1 is '*'"),
    ],
)
def test_wrong_groups_are_one_problem(tmp_path: Path, value: Any, part: str) -> None:
    config = write_run(tmp_path, f'adam["groups"] = {value!r}\n')
    with pytest.raises(ConfigError) as refused:
        load_config(str(config))
    assert part in str(refused.value) and "adam.groups" in str(refused.value)
    assert len(refused.value.problems) == 1


def test_commands_show_and_check_groups(tmp_path: Path) -> None:
    items = [{"pattern": "*norm*", "lr_scale": 0.5}, {"pattern": "q*", "lr_scale": 1.0}]
    config = str(write_run(tmp_path, f'adam["groups"] = {items!r}\n'))
    shown = CliRunner().invoke(app, ["config", "show", config, "--lr", "--json"])
    document = json.loads(shown.output)
    assert document["lr_scales"] == {"*norm*": 0.5, "q*": 1.0}
    table = CliRunner().invoke(app, ["config", "show", config, "--lr"]).output
    head, first, *_ = (line.split() for line in table.splitlines())
    assert head == ["step", "lr", "*norm*", "q*"]
    assert float(first[2]) == pytest.approx(float(first[1]) / 2, rel=1e-5)
    checked = CliRunner().invoke(app, ["config", "check", config])
    assert isinstance(checked.exception, UserError)
    assert "'q*' matches none" in str(checked.exception)
