"""Facts of each ``model_type`` of a ``config.json``: its family here, its switches, and what a file may leave out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# A switch is the key of config.json that has it, or what every model of the type has.
Switch = str | bool
# A window that a type never has, has by ``sliding_window`` alone, or by ``use_sliding_window``
# in the layers of ``layer_types``.
WindowKeys = Literal["none", "size", "switch"]


@dataclass(frozen=True)
class HuggingFaceFacts:
    """Facts of one ``model_type``.

    Attributes:
        family: our ``model_type``.
        qkv_bias, o_bias, mlp_bias: switches of the biases.
        bias_default: value of the switches that a file leaves out.
        head_dim: width of a head in a file without it; None: hidden_size / num_attention_heads.
        max_position: ``max_position_embeddings`` of a file without it.
        rope_base: ``rope_theta`` of a file without it.
        window: keys of the attention window.
        window_default: ``sliding_window`` of a file without it; None: no window.
        nope_interval: one of so many layers has no rotation, in a file without ``no_rope_layers``; None: all rotate.
        tied: ``tie_word_embeddings`` of a file without it.
        absent: numbers that a file leaves out, by the keys that it shares with our model section.
        activation_key: the key that transformers reads the activation of the gate from.
        activations: names of the one that the family has; an export writes the first.
        full_every: every so many layers one has no window, in a file without ``layer_types``; None: no such pattern.
    """

    family: str
    qkv_bias: Switch = "attention_bias"
    o_bias: Switch = "attention_bias"
    mlp_bias: Switch = False
    bias_default: bool = False
    head_dim: int | None = None
    max_position: int = 2048
    rope_base: float = 10000.0
    window: WindowKeys = "none"
    window_default: int | None = 4096
    nope_interval: int | None = None
    tied: bool = False
    absent: Mapping[str, float] = field(default_factory=dict)
    activation_key: str = "hidden_act"
    activations: tuple[str, ...] = ("silu", "swish")
    full_every: int | None = None


# "gelu" in Gemma's first files means the tanh approximation, too.
GELU_TANH = ("gelu_pytorch_tanh", "gelu")
HUGGING_FACE_FACTS: dict[str, HuggingFaceFacts] = {
    "llama": HuggingFaceFacts("LLAMA2", mlp_bias="mlp_bias"),
    "qwen2": HuggingFaceFacts("QWEN2", qkv_bias=True, o_bias=False, window="switch"),
    "qwen3": HuggingFaceFacts("QWEN3", head_dim=128, window="switch"),
    "mistral": HuggingFaceFacts("MISTRAL", qkv_bias=False, o_bias=False, window="size"),
    "phi3": HuggingFaceFacts(
        "PHI3",
        qkv_bias=False,
        o_bias=False,
        max_position=4096,
        window="size",
        window_default=None,
    ),
    "smollm3": HuggingFaceFacts(
        "SMOLLM3",
        mlp_bias="mlp_bias",
        max_position=32768,
        rope_base=2_000_000.0,
        window="switch",
        window_default=None,
        nope_interval=4,
    ),
    "baichuan": HuggingFaceFacts(
        "BAICHUAN2", qkv_bias=False, o_bias=False, max_position=4096
    ),
    "olmo2": HuggingFaceFacts("OLMO2"),
    "gemma": HuggingFaceFacts(
        "GEMMA",
        head_dim=256,
        max_position=8192,
        tied=True,
        activations=GELU_TANH,
    ),
    "gemma2": HuggingFaceFacts(
        "GEMMA2",
        head_dim=256,
        max_position=8192,
        tied=True,
        absent={
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        activation_key="hidden_activation",
        activations=GELU_TANH[:1],
        window="size",
        full_every=2,
    ),
    "gemma3_text": HuggingFaceFacts(
        "GEMMA3",
        head_dim=256,
        max_position=131072,
        rope_base=1e6,
        tied=True,
        absent={"query_pre_attn_scalar": 256},
        activation_key="hidden_activation",
        activations=GELU_TANH[:1],
        window="size",
        full_every=6,
    ),
    "internlm": HuggingFaceFacts(
        "INTERNLM", qkv_bias="bias", o_bias="bias", bias_default=True
    ),
    "internlm2": HuggingFaceFacts("INTERNLM2_PUBLIC", qkv_bias="bias", o_bias="bias"),
    "internlm3": HuggingFaceFacts(
        "INTERNLM3",
        qkv_bias="qkv_bias",
        o_bias="bias",
        mlp_bias="bias",
        max_position=32768,
    ),
}
