"""muP: a coordinate check over widths, for which the standard parametrization is what fails it; and each rule alone."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evomesh.config.loader import load_config
from evomesh.config.model import DType
from evomesh.config.mup import MupConfig
from evomesh.config.optimizer import OptimizerConfig
from evomesh.config.schema import AdamConfig, ModelConfig, ZeroConfig
from evomesh.errors import ConfigError
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import build_model, initialize_weights
from evomesh.optim.groups import UpdateSettings
from evomesh.optim.zero import ZeroOptimizer
from tests.support.covers import covers
from tests.support.runs import write_run
from tests.support.tolerances import assert_close, assert_equal_bits

BASE, HEAD = 64, 16
WIDTHS = (64, 128, 256, 512)
TOKENS = VOCAB = 64
STEPS = 4
STD = 1 / math.sqrt(BASE)
MUP = MupConfig(base_hidden_size=BASE, base_head_dim=HEAD)
OFF = MupConfig()
STDS = (
    "attn_wqkv_init_std",
    "attn_other_init_std",
    "ffn_uplayer_init_std",
    "ffn_other_init_std",
    "out_head_init_std",
)
WATCHED = ("layers.1.attention", "layers.1.feed_forward", "layers.1", "logits")


def config_of(
    width: int, mup: MupConfig, heads: int | None = None, dtype: DType = "float32"
) -> ModelConfig:
    """A model whose variances without muP are 1 / fan-in, as is usual."""
    std = STD if mup.is_on else 1 / math.sqrt(width)
    return ModelConfig(
        model_type="LLAMA2",
        num_layers=2,
        hidden_size=width,
        vocab_size=VOCAB,
        num_attention_heads=heads or width // HEAD,
        mlp_ratio=2.0,
        multiple_of=16,
        no_bias=True,
        dtype=dtype,
        embedding_init_std=1.0,
        mup=mup,
        **dict.fromkeys(STDS, std),
    )


def built(config: ModelConfig) -> LanguageModel:
    model = build_model(config)
    initialize_weights(model, seed=0)
    return model


def optimizer_of(model: LanguageModel, config: ModelConfig, rule: str) -> ZeroOptimizer:
    return ZeroOptimizer(
        model.named_parameters(),
        AdamConfig(weight_decay=0.0),
        ZeroConfig(clip_grad_norm=0.0),
        config=OptimizerConfig.model_validate({"type": rule}),
        width_multiplier=config.width_multiplier,
    )


def activations(model: LanguageModel, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        seen[name] = output.detach().clone()

    hooks = [
        module.register_forward_hook(functools.partial(watch, name))
        for name, module in model.named_modules()
        if name in WATCHED
    ]
    hidden = model(ids, single_sequence(TOKENS))
    seen["logits"] = model.logits(hidden).detach()
    for hook in hooks:
        hook.remove()
    return hidden, seen


def sizes(config: ModelConfig, rule: str) -> dict[str, tuple[float, float]]:
    """The root mean square of each activation at the start, and that of its change in a few steps."""
    model = built(config)
    optimizer = optimizer_of(model, config, rule)
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCAB, (TOKENS,), generator=draw)
    _, first = activations(model, ids)
    for _ in range(STEPS):
        hidden, _ = activations(model, ids)
        loss = model.loss(hidden, torch.roll(ids, -1), 1 / TOKENS)
        loss.scaled_sum.backward()
        optimizer.step(0.01, 0.95, 1.0)
        optimizer.zero_grad()
    _, last = activations(model, ids)
    return {name: (rms(first[name]), rms(last[name] - first[name])) for name in WATCHED}


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def exponents(
    rule: str, mup: MupConfig, grows: str, widths: tuple[int, ...]
) -> dict[str, tuple[float, float]]:
    """The power of the width with which each of ``sizes`` grows."""
    found = []
    for width in widths:
        heads = width // HEAD if grows == "heads" else BASE // HEAD
        found.append(sizes(config_of(width, mup, heads=heads), rule))
    logs = np.log(widths)
    fits = {}
    for name in WATCHED:
        values = np.log([size[name] for size in found])
        at_start, change = np.polyfit(logs, values, 1)[0]
        fits[name] = (float(at_start), float(change))
    return fits


@pytest.mark.slow
@covers("model.mup.base_hidden_size")
@pytest.mark.parametrize(
    ("rule", "grows", "widths"),
    [
        ("adamw", "heads", WIDTHS),
        ("adamw", "head_dim", WIDTHS),
        ("muon", "heads", WIDTHS[:3]),
    ],
)
def test_coordinate_check(rule: str, grows: str, widths: tuple[int, ...]) -> None:
    """Activations change by the same at every width; without muP they change by more and more."""
    scaled = exponents(rule, MUP, grows, widths)
    for name, (at_start, change) in scaled.items():
        assert abs(change) < 0.2, (name, change)
        # Logits begin near 0 in wide models: they are what is learned.
        expected = -0.5 if name == "logits" else 0.0
        assert abs(at_start - expected) < 0.2, (name, at_start)
    plain = exponents(rule, OFF, grows, widths)
    assert plain["layers.1"][1] > 0.3 and plain["logits"][1] > 0.25


@covers("model.mup.base_head_dim")
def test_each_factor_of_the_model() -> None:
    """Three times the width in heads of four times the width: against a plain model with the factors in its weights."""
    config = config_of(192, MUP, heads=3, dtype="float64")
    assert config.head_dim == 4 * HEAD
    model, plain = built(config), built(config.model_copy(update={"mup": OFF}))
    for name, weight in plain.named_parameters():
        own = model.get_parameter(name).detach()
        factor = 1.0 if name.startswith(("emb", "head")) or "norm" in name else 3**-0.5
        # They are drawn in float32.
        assert_close(own, weight.detach() * factor, 1e-6, name)
    for name, weight in plain.named_parameters():
        own = model.get_parameter(name).detach().clone()
        if "wqkv" in name:
            own.view(3, 3, config.head_dim, -1)[:, 0] /= 2  # sqrt(16 / 64)
        weight.data.copy_(own / 3 if name == "head.weight" else own)
    ids = torch.arange(TOKENS) % VOCAB
    assert_close(
        activations(model, ids)[1]["logits"],
        activations(plain, ids)[1]["logits"],
        1e-12,
    )


def test_the_base_is_the_plain_model() -> None:
    config, plain = config_of(BASE, MUP), config_of(BASE, OFF)
    ids = torch.arange(TOKENS) % VOCAB
    seen = [activations(built(one), ids)[1] for one in (config, plain)]
    for name in WATCHED:
        assert_equal_bits(seen[0][name], seen[1][name], name)
    optimizers = [
        optimizer_of(built(one), one, rule)
        for one, rule in ((config, "muon"), (plain, "muon"))
    ]
    settings = [list(optimizer.settings.values()) for optimizer in optimizers]
    assert settings[0] == settings[1]


@pytest.mark.parametrize(
    ("rule", "factor"),
    [("adamw", 0.25), ("lion", 0.25), ("schedule_free", 0.25), ("muon", 0.5)],
)
def test_rates_of_hidden_matrices(rule: str, factor: float) -> None:
    """And what decay takes away in a step, rate times decay, is that of the base."""
    config = config_of(4 * BASE, MUP)
    model = built(config)
    optimizer = ZeroOptimizer(
        model.named_parameters(),
        AdamConfig(weight_decay=0.1),
        ZeroConfig(),
        config=OptimizerConfig.model_validate({"type": rule}),
        width_multiplier=config.width_multiplier,
    )
    hidden = {"wqkv", "wo", "w1", "w2", "w3"}
    for slot in optimizer.slots:
        is_hidden = slot.name.split(".")[-2] in hidden
        expected = UpdateSettings(1.0, 0.1)
        if is_hidden:
            expected = UpdateSettings(factor, 0.1 / factor)
        assert optimizer.settings[slot.master] == expected, slot.name


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ("norm_head=True", "norm_head takes the head's scale"),
        ("scale_embeddings=True", "grows with the width"),
        ("query_pre_attn_scalar=9.0", "both set the scale of attention scores"),
        ("mup=dict(base_head_dim=8)", "without base_hidden_size"),
        ("mup=dict(base_width=8)", "base_width"),
    ],
)
def test_what_has_no_rule_is_refused(tmp_path: Any, keys: str, part: str) -> None:
    extra = f"model |= dict(mup=dict(base_hidden_size=16))\nmodel |= dict({keys})\n"
    with pytest.raises(ConfigError) as refused:
        load_config(str(write_run(tmp_path, extra)))
    assert part in str(refused.value)
