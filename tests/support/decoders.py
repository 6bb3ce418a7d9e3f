"""Tiny models whose next token depends on everything before it, and decoding them without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evomesh.config.schema import ModelConfig
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import build_model, initialize_weights

VOCAB = 50


def tiny_config(**changes: object) -> ModelConfig:
    shape = dict(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_kv_attention_heads=2,
        vocab_size=VOCAB,
    )
    fixed = dict(
        model_type="LLAMA2", dtype="float64", mlp_ratio=2.0, multiple_of=8, no_bias=True
    )
    return ModelConfig(**(fixed | shape | changes))


def tiny(**changes: object) -> LanguageModel:
    model = build_model(tiny_config(**changes))
    initialize_weights(model, seed=3)
    enlarge(model)
    return model.eval()


def enlarge(model: LanguageModel) -> None:
    """Enlarge the weights so that the most probable token depends on the context."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)


def uncached_greedy(
    model: LanguageModel, prompt: Sequence[int], count: int
) -> list[int]:
    """Every token from a forward pass over all tokens before it."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            hidden = model(torch.tensor(ids), single_sequence(len(ids)))
            ids.append(int(model.logits(hidden[-1:])[0].argmax()))
    return ids[len(prompt) :]
