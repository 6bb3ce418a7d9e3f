"""The rotary tables and the float32 upcasts of ``transformers``, in float64."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

MODELS = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "olmo2",
    "phi3",
    "smollm3",
    "gemma",
    "gemma2",
    "gemma3",
)
PREFIXES = {"smollm3": "SmolLM3"}  # of the classes of a module


def stock_frequencies(
    config: Any,
    length: int,
    monkeypatch: pytest.MonkeyPatch,
    layer_type: str | None = None,
) -> tuple[Tensor, float]:
    """Return the frequencies [H/2] and the attention factor of a scaling, computed by transformers in float64."""
    rope_utils = importlib.import_module("transformers.modeling_rope_utils")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        kind = settings_of(config, layer_type)["rope_type"]
        make = rope_utils.ROPE_INIT_FUNCTIONS[kind]
        options = {} if layer_type is None else {"layer_type": layer_type}
        found: tuple[Tensor, float] = make(
            config, torch.device("cpu"), seq_len=length, **options
        )
    return found


def settings_of(config: Any, layer_type: str | None) -> dict[str, Any]:
    """Return the rotary settings of a kind of layers, None: of all."""
    settings: dict[str, Any] = config.rope_parameters
    return settings if layer_type is None else settings[layer_type]


def plain_frequencies(base: float, head_dim: int) -> Tensor:
    """Return base^(-2i/H) for pair i, [H/2] float64."""
    return base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def keep_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make transformers compute norm, rotary and softmax in float64, which it does in float32 by name."""

    def norm(self: Any, x: Tensor) -> Tensor:
        scaled: Tensor = x * torch.rsqrt(
            x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon
        )
        return self.weight * scaled

    def offset_norm(self: Any, x: Tensor) -> Tensor:
        scaled: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (1 + self.weight) * scaled

    def scaled_embedding(self: Any, ids: Tensor) -> Tensor:
        rows: Tensor = self.weight[ids]
        return rows * self.scalar_embed_scale

    def rotary(
        self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        head_dim = (
            getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads
        )
        settings = settings_of(config, layer_type)
        frequencies, factor = plain_frequencies(settings["rope_theta"], head_dim), 1.0
        if settings["rope_type"] != "default":
            frequencies, factor = stock_frequencies(
                config, position_ids.shape[-1], monkeypatch, layer_type
            )
        angles = position_ids[..., None].double() * frequencies
        both = torch.cat((angles, angles), dim=-1)
        return both.cos() * factor, both.sin() * factor

    softmax = torch.nn.functional.softmax

    def no_upcast(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim=dim)

    monkeypatch.setattr(torch.nn.functional, "softmax", no_upcast)
    for model in MODELS:
        module = importlib.import_module(
            f"transformers.models.{model}.modeling_{model}"
        )
        prefix = PREFIXES.get(model, model.capitalize())
        is_gemma = model.startswith("gemma")
        monkeypatch.setattr(
            getattr(module, f"{prefix}RMSNorm"),
            "forward",
            offset_norm if is_gemma else norm,
        )
        monkeypatch.setattr(
            getattr(module, f"{prefix}RotaryEmbedding"), "forward", rotary
        )
        if is_gemma:
            embedding = getattr(module, f"{prefix}TextScaledWordEmbedding")
            monkeypatch.setattr(embedding, "forward", scaled_embedding)
