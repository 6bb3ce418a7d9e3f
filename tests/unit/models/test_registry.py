from __future__ import annotations

import pytest
import torch

from evomesh.config.schema import ModelConfig
from evomesh.errors import ConfigError, UserError
from evomesh.models.decoder import Decoder
from evomesh.models.registry import ModelInitializer, build_model, model_initializer
from tests.support.covers import covers

pytestmark = covers("promise:register-module")


def test_parameter_count_of_the_documents_7b_config() -> None:
    config = ModelConfig(
        num_layers=32,
        hidden_size=4096,
        vocab_size=103168,
        num_attention_heads=32,
        mlp_ratio=8 / 3,
        dtype="bfloat16",
    )
    model = build_model(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 7_321_948_160


def test_unknown_model_type_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'INTERNLM2_PUBLIC'"):
        build_model(ModelConfig(model_type="INTERNLM2_PUBLC"))


def test_own_parameters_are_checked_against_the_builder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def builder(
        config: ModelConfig,
        window: int,
        *,
        device: torch.device | str,
        gain: float = 1.0,
    ) -> Decoder:
        raise AssertionError("not reached")

    registry = ModelInitializer({"MINE": builder})
    monkeypatch.setattr("evomesh.models.registry.model_initializer", registry)
    with pytest.raises(ConfigError) as error:
        build_model(ModelConfig(model_type="MINE", extra={"gian": 2.0}))
    assert "unknown key 'gian'" in str(error.value) and "did you mean 'gain'?" in str(
        error.value
    )
    assert "needs 'window'" in str(error.value)


def test_a_builtin_takes_no_extra_key() -> None:
    with pytest.raises(ConfigError, match="unknown key 'window'"):
        build_model(ModelConfig(extra={"window": 4}))


def test_a_used_name_is_refused_but_the_same_builder_may_come_again() -> None:
    def builder(config: ModelConfig) -> Decoder:
        raise AssertionError("not reached")

    registry = ModelInitializer({})
    registry.register_module("MINE", builder)
    registry.register_module("MINE", builder)
    with pytest.raises(UserError, match="already registered"):
        registry.register_module("MINE", Decoder)
    assert "LLAMA2" in model_initializer.names()
