"""The ``model`` section of a config: the shape and numerics of the decoder."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from evomesh.config.families import ARCHITECTURE_KEYS, FAMILY_FACTS, FamilyFacts
from evomesh.config.mup import MupConfig
from evomesh.config.rope import RopeScaling
from evomesh.config.section import Section

DType = Literal["float64", "float32", "tf32", "bfloat16", "float16"]
ModelFamily = Literal[
    "INTERNLM",
    "INTERNLM2_PUBLIC",
    "INTERNLM3",
    "LLAMA2",
    "QWEN2",
    "QWEN3",
    "MISTRAL",
    "OLMO2",
    "PHI3",
    "SMOLLM3",
    "BAICHUAN2",
    "GEMMA",
    "GEMMA2",
    "GEMMA3",
]
GateActivation = Literal["silu", "gelu_tanh"]
NormPlacement = Literal["before", "after", "both"]
LayerType = Literal["full_attention", "sliding_attention"]
# Which flash attention torch calls on a GPU: its own, or that of a package.
AttentionKernel = Literal["auto", "FA3", "FA4"]
# Beyond the trained length: unscaled, or with dynamic NTK.
RotaryType = Literal["origin", "dynamic"]


class ModelConfig(Section):
    """Shape and numerics of the decoder. ``model_type`` and ``use_fp32_norm`` are top-level keys in a config file."""

    model_type: str = Field(
        "INTERNLM",
        description=f"{', '.join(get_args(ModelFamily))} or a registered custom model.",
    )
    num_layers: int = Field(48, ge=1, description="Number of decoder layers.")
    hidden_size: int = Field(2048, ge=1, description="Width of the residual stream.")
    vocab_size: int = Field(50304, ge=2, description="Number of token ids.")
    num_attention_heads: int = Field(32, ge=1, description="Number of query heads.")
    num_kv_attention_heads: int | None = Field(
        None,
        ge=1,
        description="Number of key/value heads; None: num_attention_heads, as INTERNLM requires.",
    )
    head_dim: int = Field(
        64,
        ge=1,
        description="Width of a head; unset: hidden_size / num_attention_heads.",
    )
    mlp_ratio: float = Field(
        4.0,
        gt=0,
        description="Feed-forward width = int(hidden_size * mlp_ratio), rounded up to multiple_of.",
    )
    multiple_of: int = Field(
        256,
        ge=1,
        description="The feed-forward width is rounded up to a multiple of this.",
    )
    dtype: DType = Field(
        "float16",
        description="torch.float16, half, bfloat16, float32, tf32 or float64; unset: float16, with a warning.",
    )
    checkpoint: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Fraction of layers whose activations are recomputed; also True or False.",
    )
    norm_type: Literal["rmsnorm", "layernorm"] = Field(
        "rmsnorm", description="Kind of the norms."
    )
    layer_norm_epsilon: float = Field(1e-5, gt=0, description="Epsilon of the norms.")
    apply_post_layer_norm: bool = Field(
        False,
        description="Place norms after the residual additions (INTERNLM2_PUBLIC).",
    )
    norm_placement: NormPlacement = Field(
        "before",
        description="Norms of a layer: before attention and feed-forward network, after them, or both; "
        "after means x + norm(f(x)).",
    )
    add_unit_offset: bool = Field(
        False,
        description="RMSNorm multiplies by 1 + weight, and weights begin at 0.",
    )
    use_swiglu: bool = Field(
        True,
        description="True: a gated network, such as SwiGLU; False: GELU, in GEMMA of the gate.",
    )
    gate_activation: GateActivation = Field(
        "silu",
        description="Of the gate in gated networks: silu (SwiGLU), or gelu_tanh (GeGLU).",
    )
    no_bias: bool = Field(
        False,
        description="Omit the biases of the attention projections; INTERNLM always has them.",
    )
    qkv_bias: bool | None = Field(
        None, description="Bias of queries, keys and values; None: unless no_bias."
    )
    o_bias: bool | None = Field(
        None, description="Bias of the attention output; None: unless no_bias."
    )
    mlp_bias: bool = Field(
        False,
        description="Biases of the feed-forward network (LLAMA2, INTERNLM3, SMOLLM3).",
    )
    qk_norm: bool = Field(
        False,
        description="Norms of queries and keys before the rotation; see qk_norm_over.",
    )
    qk_norm_over: Literal["head", "projection"] = Field(
        "head",
        description="What qk_norm norms at once: each head, with one weight for all heads, "
        "or all query heads (all key heads) together.",
    )
    sliding_window: int | None = Field(
        None,
        ge=1,
        description="Tokens that a position sees, itself included; None: all before it.",
    )
    layer_types: tuple[LayerType, ...] | None = Field(
        None,
        description="sliding_attention or full_attention for each layer, as in config.json; None: all have the window.",
    )
    nope_layers: tuple[int, ...] = Field(
        (),
        description="Layers without rotary positions, by index; unset: by family (SMOLLM3: every fourth).",
    )
    query_pre_attn_scalar: float | None = Field(
        None,
        gt=0,
        description="Attention scores are divided by its square root; None: by that of head_dim.",
    )
    attn_logit_softcapping: float | None = Field(
        None,
        gt=0,
        description="Soft cap c of attention scores: c tanh(scores / c); None: none.",
    )
    final_logit_softcapping: float | None = Field(
        None,
        gt=0,
        description="Soft cap c of the logits, in training and generation: c tanh(logits / c); None: none.",
    )
    qk_interleaved: bool = Field(
        False,
        description="Rotary pairs are adjacent columns, or in two halves. Default by family.",
    )
    rope_base: float = Field(10000.0, gt=0, description="Base of the rotary angles.")
    local_rope_base: float | None = Field(
        None,
        gt=0,
        description="Base of the rotary angles in layers with a window, which then have no rope_scaling; "
        "None: that of all layers.",
    )
    rope_scaling_factor: float = Field(1.0, ge=1, description="Factor of dynamic NTK.")
    max_position_embeddings: int = Field(
        2048, ge=1, description="Trained length, for dynamic NTK and longrope."
    )
    use_dynamic_ntk_rope: bool = Field(
        False, description="Dynamic NTK beyond the trained length."
    )
    rope_scaling: RopeScaling | None = Field(
        None,
        description="Scaling of the rotary angles: dict(type=..., factor=...), as in config.json.",
    )
    tie_word_embeddings: bool = Field(
        False,
        description="Embedding and output head are one weight, which a checkpoint holds once.",
    )
    scale_embeddings: bool = Field(
        False,
        description="Multiply embeddings by sqrt(hidden_size), rounded to dtype.",
    )
    embed_grad_scale: float = Field(
        1.0, description="Scale of the embedding's gradient."
    )
    embed_split_hidden: bool = Field(
        False, description="Shard the embedding by columns instead of rows."
    )
    parallel_output: bool = Field(
        True,
        description="Accepted for InternEvo; the loss never materializes the full logits.",
    )
    norm_head: bool = Field(False, description="Normalize the rows of the output head.")
    residual_in_fp32: bool = Field(
        False, description="Keep the residual stream in float32."
    )
    use_scaled_init: bool = Field(
        True, description="Scale the initial wo and w2 down with depth."
    )
    init_type: Literal["normal", "uniform"] = Field(
        "normal", description="Distribution of the initial weights."
    )
    embedding_init_std: float | None = Field(
        None,
        description="Initial standard deviation of the embedding; None: by family.",
    )
    attn_wqkv_init_std: float | None = Field(
        None,
        description="Initial standard deviation of query, key and value; None: by family.",
    )
    attn_other_init_std: float | None = Field(
        None,
        description="Initial standard deviation of the attention output; None: by family.",
    )
    ffn_uplayer_init_std: float | None = Field(
        None,
        description="Initial standard deviation of the feed-forward inputs; None: by family.",
    )
    ffn_other_init_std: float | None = Field(
        None,
        description="Initial standard deviation of the feed-forward output; None: by family.",
    )
    out_head_init_std: float | None = Field(
        None,
        description="Initial standard deviation of the output head; None: by family.",
    )
    drop_rate: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout of the embedding's output and of every attention's and feed-forward network's; "
        "the same masks in every layout.",
    )
    attn_drop_rate: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout of attention probabilities; slow: they are computed one by one, without a fused kernel.",
    )
    dropout_selective_checkpoint: bool = Field(
        True,
        description="Accepted for InternEvo; masks take no memory worth recomputing them for.",
    )
    num_chunks: int = Field(
        1, ge=1, description="Model chunks per rank in an interleaved pipeline."
    )
    use_flash_attn: bool = Field(
        True,
        description="Accepted for InternEvo; the fastest available kernel is used on every device.",
    )
    attention_kernel: AttentionKernel = Field(
        "auto",
        description="Flash attention in training on a GPU: auto (torch's own), or that of an installed package: "
        "FA3 (flash_attn_interface, for H100 and H200) or FA4 (flash_attn.cute, for B200 too).",
    )
    use_fp32_norm: bool = Field(False, description="Compute norms in float32.")
    output_tf32: bool = Field(
        False, description="Compute the output head in TF32 (not available yet)."
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile the blocks; auto: on CUDA, if triton and a C compiler are there.",
    )
    mup: MupConfig = Field(
        MupConfig(),
        description="Scale learning rates, initial weights, logits and attention scores with the width (muP).",
    )
    extra: dict[str, Any] = Field(
        {}, description="Parameters of a registered custom model."
    )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_attention_heads or self.num_attention_heads

    @model_validator(mode="before")
    @classmethod
    def _derive_head_dim(cls, values: Any) -> Any:
        """Fill ``head_dim`` from the width and the number of heads, where these are numbers."""
        if not isinstance(values, dict) or values.get("head_dim") is not None:
            return values
        completed = dict(values)
        completed.pop("head_dim", None)
        sizes = []
        for name in ("hidden_size", "num_attention_heads"):
            default = cls.model_fields[name].default
            size = values.get(name, default)
            sizes.append(size)
        width, heads = sizes
        # Values of another kind are reported by the validation that follows.
        are_numbers = isinstance(width, int) and isinstance(heads, int)
        if are_numbers and heads > 0:
            completed["head_dim"] = max(width // heads, 1)
        return completed

    @property
    def width_multiplier(self) -> float:
        """Return the width over that of ``mup``'s base; 1 without muP."""
        base = self.mup.base_hidden_size
        return 1.0 if base is None else self.hidden_size / base

    @property
    def query_multiplier(self) -> float:
        """Return what muP multiplies attention scores with, beside 1 / sqrt(head_dim): they fall as 1 / head_dim."""
        base = self.mup.base_head_dim
        return 1.0 if base is None else math.sqrt(base / self.head_dim)

    @property
    def has_dropout(self) -> bool:
        return self.drop_rate > 0 or self.attn_drop_rate > 0

    @property
    def has_qkv_bias(self) -> bool:
        return not self.no_bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_o_bias(self) -> bool:
        return not self.no_bias if self.o_bias is None else self.o_bias

    @property
    def qk_norm_widths(self) -> tuple[int, int]:
        """Return how many weights the norms of queries and of keys have, (0, 0) without ``qk_norm``."""
        if not self.qk_norm:
            return 0, 0
        if self.qk_norm_over == "head":
            return self.head_dim, self.head_dim
        return self.attention_width, self.kv_heads * self.head_dim

    def rotates(self, layer: int) -> bool:
        """Return whether a layer, by its global index, has rotary positions."""
        return layer not in self.nope_layers

    def window_of(self, layer: int) -> int | None:
        """Return the window of a layer by its global index, None if it has none."""
        types = self.layer_types
        if types is not None and types[layer] == "full_attention":
            return None
        return self.sliding_window

    def uses_local_rope_base(self, layer: int) -> bool:
        """Return whether a layer, by its global index, has the angles of ``local_rope_base``."""
        return self.local_rope_base is not None and self.window_of(layer) is not None

    def mean_attention_span(self, seq_len: int) -> float:
        """Return the most tokens that a position of ``seq_len`` tokens sees, the mean over the layers."""
        spans = [
            min(self.window_of(layer) or seq_len, seq_len)
            for layer in range(self.num_layers)
        ]
        return sum(spans) / len(spans)

    @property
    def attention_width(self) -> int:
        """Width of all query heads together, the input of the attention output projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def rotary_type(self) -> RotaryType:
        """Return what the rotary embedding does beyond the trained length."""
        return "dynamic" if self.use_dynamic_ntk_rope else "origin"

    @property
    def qkv_width(self) -> int:
        """Output width of the fused query, key and value projection."""
        return (self.num_attention_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def mlp_width(self) -> int:
        """``int(hidden * mlp_ratio)`` rounded up to ``multiple_of``."""
        return (
            -(-int(self.hidden_size * self.mlp_ratio) // self.multiple_of)
            * self.multiple_of
        )


def differing_key(model: ModelConfig, family: str | None = None) -> str | None:
    """Return the first of ``ARCHITECTURE_KEYS`` that no model of a family has as this one has it, None without one.

    Args:
        family: None: one with the schema's default of each key.
    """
    facts = FamilyFacts()
    if family is not None:
        facts = FAMILY_FACTS[family]
    fixed = facts.architecture or {}
    for key in ARCHITECTURE_KEYS:
        if key in facts.free:
            continue
        default = ModelConfig.model_fields[key].default
        wanted = fixed.get(key, default)
        if getattr(model, key) != wanted:
            return key
    return None
