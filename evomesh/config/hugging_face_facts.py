"""Facts of each ``model_type`` of a ``config.json``: its family here, its switches, and what a file may leave out."""

from __future__ import annotations

from dataclasses import dataclass

# A switch is the key of config.json that has it, or what every model of the type has.
Switch = str | bool


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
    """

    family: str
    qkv_bias: Switch = "attention_bias"
    o_bias: Switch = "attention_bias"
    mlp_bias: Switch = False
    bias_default: bool = False
    head_dim: int | None = None
    max_position: int = 2048
    rope_base: float = 10000.0


HUGGING_FACE_FACTS: dict[str, HuggingFaceFacts] = {
    "llama": HuggingFaceFacts("LLAMA2", mlp_bias="mlp_bias"),
    "qwen2": HuggingFaceFacts("QWEN2", qkv_bias=True, o_bias=False),
    "qwen3": HuggingFaceFacts("QWEN3", head_dim=128),
    "mistral": HuggingFaceFacts("MISTRAL", qkv_bias=False, o_bias=False),
    "olmo2": HuggingFaceFacts("OLMO2"),
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
