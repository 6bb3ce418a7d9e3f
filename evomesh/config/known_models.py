"""Sizes of published models, as their ``config.json`` has them: enough to check and plan before a download."""

from __future__ import annotations

from typing import Any

from evomesh.config.hugging_face import read_model
from evomesh.config.schema import ModelConfig

_INTERNLM2: dict[str, Any] = dict(
    model_type="internlm2",
    vocab_size=92544,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    bias=False,
    rope_theta=1_000_000,
    max_position_embeddings=32768,
)
_MISTRAL: dict[str, Any] = dict(
    model_type="mistral",
    sliding_window=None,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    rms_norm_eps=1e-5,
    rope_theta=1_000_000,
    max_position_embeddings=32768,
)
_SIZES: dict[str, dict[str, int]] = {
    "1_8b": dict(
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=8192,
    ),
    "7b": dict(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=14336,
    ),
    "20b": dict(
        hidden_size=6144,
        num_hidden_layers=48,
        num_attention_heads=48,
        intermediate_size=16384,
    ),
}


def known_model(name: str) -> ModelConfig | None:
    """Return the model section of a hub id such as "internlm/internlm2-7b", None for one that is not in the table."""
    owner, _, model = name.partition("/")
    if owner == "internlm" and model.startswith("internlm2-"):
        # What is trained further keeps its sizes: "internlm2-chat-7b-sft" has those of
        # "internlm2-7b".
        size = model.removeprefix("internlm2-")
        size = size.removeprefix("chat-")
        size = size.removeprefix("base-")
        size = size.removesuffix("-sft")
        if size in _SIZES:
            settings = _INTERNLM2 | _SIZES[size]
            return read_model(settings, name)
    if owner == "mistralai" and model in (
        "Mistral-7B-v0.3",
        "Mistral-7B-Instruct-v0.3",
    ):
        settings = _MISTRAL | {"vocab_size": 32768}
        return read_model(settings, name)
    return None
