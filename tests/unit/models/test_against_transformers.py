"""The built-in families against ``transformers`` with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evomesh.config.families import architecture_of
from evomesh.config.rope import RopeScaling
from evomesh.config.schema import ModelConfig
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.decoder import Decoder
from evomesh.models.registry import build_model, initialize_weights
from tests.support.covers import covers
from tests.support.reference_decoder import ReferenceDecoder
from tests.support.stock_rope import keep_float64
from tests.support.tolerances import TRANSFORMERS, TRANSFORMERS_FLOAT32

transformers = pytest.importorskip("transformers")
VOCAB, HIDDEN, HEADS, LAYERS, LENGTH = 61, 32, 4, 2, 23


def our_config(
    model_type: str,
    kv_heads: int,
    interleaved: bool,
    bias: bool,
    changes: dict[str, Any] | None = None,
) -> ModelConfig:
    heads = {"num_kv_attention_heads": kv_heads}
    return ModelConfig(
        **(heads | (changes or {})),
        model_type=model_type,
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        num_attention_heads=HEADS,
        mlp_ratio=2.0,
        multiple_of=8,
        dtype="float64",
        no_bias=not bias,
        qk_interleaved=interleaved,
        embedding_init_std=0.5,
        attn_wqkv_init_std=0.3,
        attn_other_init_std=0.3,
        ffn_uplayer_init_std=0.3,
        ffn_other_init_std=0.3,
        out_head_init_std=0.3,
    )


def split_rows(ours: Decoder, i: int, kind: str) -> list[Tensor]:
    """q, k, v parts of a group-major fused weight or bias, as views."""
    value = getattr(ours.layers[str(i)].attention.wqkv, kind)
    config = ours.config
    queries = HEADS // config.kv_heads
    groups = value.view(config.kv_heads, queries + 2, config.head_dim, *value.shape[1:])
    parts = groups.split([queries, 1, 1], dim=1)
    return [part.reshape(-1, *value.shape[1:]) for part in parts]


def halves(x: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head from adjacent rotary pairs to first and second half."""
    return x.view(-1, head_dim // 2, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


BLOCK_NORMS = {
    "before": {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    },
    "after": {
        "attention_norm": "post_attention_layernorm",
        "ffn_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_out_norm": "post_feedforward_layernorm",
    },
}


def named_pairs(
    ours: Decoder, theirs: torch.nn.Module, of
) -> list[tuple[str, Tensor, Tensor]]:
    """(their name, our value in their layout, their value); ``of`` picks the value or the gradient of a parameter."""
    their = dict(theirs.named_parameters())
    pairs = [
        ("model.embed_tokens.weight", of(ours.embedding.weight)),
        ("model.norm.weight", of(ours.norm.weight)),
    ]
    if not ours.config.tie_word_embeddings:
        pairs.append(("lm_head.weight", of(ours.head.weight)))
    for i in range(LAYERS):
        block, prefix = ours.layers[str(i)], f"model.layers.{i}."
        for kind in ("weight", "bias"):
            if getattr(block.attention.wo, kind) is not None:
                pairs.append(
                    (
                        f"{prefix}self_attn.o_proj.{kind}",
                        of(getattr(block.attention.wo, kind)),
                    )
                )
            if getattr(block.attention.wqkv, kind) is None:
                continue
            parts = (
                split_rows(ours, i, kind)
                if of is identity
                else split_gradient(ours, i, kind)
            )
            for name, part in zip("qkv", parts, strict=True):
                reorder = name != "v" and ours.config.qk_interleaved
                pairs.append(
                    (
                        f"{prefix}self_attn.{name}_proj.{kind}",
                        halves(part, ours.config.head_dim) if reorder else part,
                    )
                )
        for name in ("q_norm", "k_norm") if ours.config.qk_norm else ():
            norm = of(getattr(block.attention, name).weight)
            pairs.append(
                (
                    f"{prefix}self_attn.{name}.weight",
                    halves(norm, ours.config.head_dim).flatten()
                    if ours.config.qk_interleaved
                    else norm,
                )
            )
        for name, theirs_name in BLOCK_NORMS[ours.config.norm_placement].items():
            norm = of(getattr(block, name).weight)
            pairs.append((f"{prefix}{theirs_name}.weight", norm))
        for name, part in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            pairs.append(
                (
                    f"{prefix}mlp.{name}.weight",
                    of(getattr(block.feed_forward, part).weight),
                )
            )
            if ours.config.mlp_bias:
                bias = getattr(block.feed_forward, part).bias
                pairs.append((f"{prefix}mlp.{name}.bias", of(bias)))
    pairs = with_fused(pairs, set(their))
    assert {name for name, _ in pairs} == set(their)
    return [(name, value, of(their[name])) for name, value in pairs]


# A matrix of theirs -> those whose rows it has, one below the other.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.W_pack": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def with_fused(
    pairs: list[tuple[str, Tensor]], theirs: set[str]
) -> list[tuple[str, Tensor]]:
    """Put parts together where their model has one matrix for several."""
    values = dict(pairs)
    for name in theirs - values.keys():
        for whole, parts in FUSED.items():
            if f".{whole}." in name:
                rows = [values.pop(name.replace(whole, part)) for part in parts]
                values[name] = torch.cat(rows)
    return list(values.items())


def identity(x: Tensor) -> Tensor:
    return x.detach()


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def split_gradient(ours: Decoder, i: int, kind: str) -> list[Tensor]:
    linear = ours.layers[str(i)].attention.wqkv
    value = getattr(linear, kind)
    saved, value.data = value.data, value.grad
    parts = [part.detach() for part in split_rows(ours, i, kind)]
    value.data = saved
    return parts


@pytest.fixture
def float64_upcasts(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_float64(monkeypatch)


def make_both(
    model_type: str,
    kv_heads: int,
    interleaved: bool,
    bias: bool,
    changes: dict[str, Any] | None = None,
    stock: str = "Llama",
    settings: dict[str, Any] | None = None,
):
    """Build one of our models and the one of transformers with its weights.

    Args:
        changes: further settings of ours.
        stock: prefix of the class in transformers.
        settings: further ones of theirs.
    """
    ours = build_model(our_config(model_type, kv_heads, interleaved, bias, changes))
    assert isinstance(ours, Decoder)
    initialize_weights(ours, seed=3)
    with torch.no_grad():  # values that would hide a mistake when left as they start
        for name, parameter in ours.named_parameters():
            if parameter.dim() == 1:
                torch.manual_seed(len(name))
                parameter.add_(torch.randn_like(parameter) * 0.2)
    record = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=ours.config.mlp_width,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=ours.config.kv_heads,
        rms_norm_eps=ours.config.layer_norm_epsilon,
        **{
            "attention_bias": bias,
            "tie_word_embeddings": False,
            "pad_token_id": None,  # an embedding gives its row no gradient
            **(settings or {}),
        },
    )
    theirs = stock_model(stock, record).double()
    for _, ours_value, theirs_value in named_pairs(ours, theirs, identity):
        theirs_value.copy_(ours_value)
    return ours, theirs


REFERENCES = {
    "InternLM3": "internlm3",
    "Baichuan": "baichuan",
}  # without a class in transformers


def stock_model(stock: str, record: dict[str, Any]) -> torch.nn.Module:
    """Build a model of transformers, or where it has no such class, the reference of the tests."""
    if stock in REFERENCES:
        return ReferenceDecoder({**record, "model_type": REFERENCES[stock]})
    config_class = "Gemma3TextConfig" if stock == "Gemma3" else f"{stock}Config"
    config = getattr(transformers, config_class)(**record, attn_implementation="eager")
    return getattr(transformers, f"{stock}ForCausalLM")(config)


def worst_difference(ours: Decoder, theirs: torch.nn.Module) -> float:
    """Largest difference of logits, of loss and, relative to its largest element, of each gradient."""
    torch.manual_seed(0)
    ids, labels = torch.randint(0, VOCAB, (2, LENGTH))
    expected = theirs(ids[None]).logits[0]
    expected_loss = torch.nn.functional.cross_entropy(expected, labels, reduction="sum")
    expected_loss.backward()
    hidden = ours(ids, single_sequence(LENGTH))
    loss = ours.loss(hidden, labels)
    loss.scaled_sum.backward()
    differences = [
        (ours.logits(hidden) - expected).abs().max(),
        (loss.scaled_sum - expected_loss).abs(),
    ]
    for _, a, b in named_pairs(ours, theirs, gradient):
        differences.append((a - b).abs().max() / b.abs().max().clamp(min=1e-3))
    return max(d.item() for d in differences)


CASES = [
    ("LLAMA2", 4, False, False),
    ("LLAMA2", 4, True, False),
    ("LLAMA2", 2, False, False),
    ("INTERNLM2_PUBLIC", 1, True, False),
    ("INTERNLM", 4, False, True),
]


@covers("model_type")
@pytest.mark.parametrize(("model_type", "kv_heads", "interleaved", "bias"), CASES)
def test_float64_equals_transformers(
    model_type: str, kv_heads: int, interleaved: bool, bias: bool, float64_upcasts: None
) -> None:
    assert (
        worst_difference(*make_both(model_type, kv_heads, interleaved, bias))
        < TRANSFORMERS
    )


LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
THETA = {"rope_theta": 10000.0}
NO_PAD = {"pad_token_id": None}  # the default is beyond the small vocabulary
LONGROPE = {
    "short_factor": [1.0, 1.1, 1.2, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 16,
}
PLAIN = {"max_position_embeddings": 64}
# Longer than the trained length: the base is stretched.
DYNAMIC = {
    "max_position_embeddings": 16,
    "rope_scaling": {"rope_type": "dynamic", "factor": 3.0},
}
DYNAMIC_OURS = {
    "max_position_embeddings": 16,
    "use_dynamic_ntk_rope": True,
    "rope_scaling_factor": 3.0,
}
# Small enough that scores and logits are where tanh bends.
SOFT_CAPS = {
    "query_pre_attn_scalar": 20,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.5,
}
# model type, bias, our further settings, prefix of the stock class, its further settings
FAMILIES = {
    "llama-3.1": (
        "LLAMA2",
        False,
        {
            "rope_scaling": RopeScaling(type="llama3", **LLAMA3),
            "max_position_embeddings": 64,
        },
        "Llama",
        {
            "rope_parameters": {"rope_type": "llama3", **LLAMA3, **THETA},
            "max_position_embeddings": 64,
        },
    ),
    "yarn": (
        "LLAMA2",
        False,
        {
            "rope_scaling": RopeScaling(
                type="yarn", factor=4.0, original_max_position_embeddings=16
            )
        },
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                **THETA,
            }
        },
    ),
    "qwen2": ("QWEN2", True, {"o_bias": False}, "Qwen2", {}),
    "qwen2-tied": (
        "QWEN2",
        True,
        {"o_bias": False, "tie_word_embeddings": True},
        "Qwen2",
        {"tie_word_embeddings": True},
    ),
    "qwen3": (
        "QWEN3",
        False,
        {"qk_norm": True, "head_dim": 12},
        "Qwen3",
        {"head_dim": 12},
    ),
    "mistral": (
        "MISTRAL",
        False,
        {"head_dim": 12, "sliding_window": 7},
        "Mistral",
        {"head_dim": 12, "sliding_window": 7},
    ),
    "olmo2": (
        "OLMO2",
        False,
        {"qk_norm": True, **architecture_of("OLMO2")},
        "Olmo2",
        {},
    ),
    "llama-mlp-bias": (
        "LLAMA2",
        True,
        {"mlp_bias": True},
        "Llama",
        {"mlp_bias": True},
    ),
    "internlm3": (
        "INTERNLM3",
        False,
        {"head_dim": 12, **DYNAMIC_OURS},
        "InternLM3",
        {"head_dim": 12, **DYNAMIC},
    ),
    "internlm3-input-biases": (
        "INTERNLM3",
        False,
        {"qkv_bias": True},
        "InternLM3",
        {"qkv_bias": True, **PLAIN},
    ),
    "internlm3-output-biases": (
        "INTERNLM3",
        False,
        {"o_bias": True, "mlp_bias": True},
        "InternLM3",
        {"bias": True, **PLAIN},
    ),
    "phi3": (
        "PHI3",
        False,
        {"sliding_window": 7},
        "Phi3",
        {"sliding_window": 7, **NO_PAD},
    ),
    "phi3-longrope": (
        "PHI3",
        False,
        {
            "rope_scaling": RopeScaling.model_validate(
                {"type": "longrope", **LONGROPE}, strict=False
            ),
            "max_position_embeddings": 64,
        },
        "Phi3",
        {
            "rope_parameters": {"rope_type": "longrope", **LONGROPE, **THETA},
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 64,
            **NO_PAD,
        },
    ),
    "smollm3": (
        "SMOLLM3",
        False,
        {"nope_layers": (1,), "mlp_bias": True},
        "SmolLM3",
        {"no_rope_layers": [1, 0], "mlp_bias": True, **THETA, **NO_PAD},
    ),
    "smollm3-window": (
        "SMOLLM3",
        False,
        {
            "nope_layers": (0,),
            "sliding_window": 5,
            "layer_types": ("sliding_attention", "full_attention"),
        },
        "SmolLM3",
        {
            "no_rope_layers": [0, 1],
            "use_sliding_window": True,
            "sliding_window": 5,
            **THETA,
            **NO_PAD,
        },
    ),
    "baichuan2": (
        "BAICHUAN2",
        False,
        {"num_kv_attention_heads": 4, "norm_head": True},
        "Baichuan",
        PLAIN,
    ),
    "gemma": (
        "GEMMA",
        False,
        {"head_dim": 12, "tie_word_embeddings": True, **architecture_of("GEMMA")},
        "Gemma",
        {"head_dim": 12, "tie_word_embeddings": True},
    ),
    "gemma2": (
        "GEMMA2",
        False,
        {
            "head_dim": 12,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "layer_types": ("sliding_attention", "full_attention"),
            **SOFT_CAPS,
            **architecture_of("GEMMA2"),
        },
        "Gemma2",
        {
            "head_dim": 12,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            **SOFT_CAPS,
        },
    ),
    "gemma3": (
        "GEMMA3",
        False,
        {
            "head_dim": 12,
            "tie_word_embeddings": True,
            "qk_norm": True,
            "sliding_window": 5,
            "layer_types": ("sliding_attention", "full_attention"),
            "query_pre_attn_scalar": 20.0,
            "rope_base": 1e6,
            "local_rope_base": 1e4,
            "rope_scaling": RopeScaling(type="linear", factor=8.0),
            **architecture_of("GEMMA3"),
        },
        "Gemma3",
        {
            "head_dim": 12,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1e6,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "qwen3-window": (
        "QWEN3",
        False,
        {
            "qk_norm": True,
            "sliding_window": 4,
            "layer_types": ("full_attention", "sliding_attention"),
        },
        "Qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
}


@covers(
    "model.head_dim",
    "model.qkv_bias",
    "model.o_bias",
    "model.mlp_bias",
    "model.nope_layers",
    "model.qk_norm",
    "model.qk_norm_over",
    "model.norm_placement",
    "model.add_unit_offset",
    "model.scale_embeddings",
    "model.gate_activation",
    "model.query_pre_attn_scalar",
    "model.attn_logit_softcapping",
    "model.final_logit_softcapping",
    "model.local_rope_base",
    "model.sliding_window",
    "model.layer_types",
)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_transformers_in_float64(
    family: str, interleaved: bool, float64_upcasts: None
) -> None:
    model_type, bias, changes, stock, settings = FAMILIES[family]
    pair = make_both(model_type, 2, interleaved, bias, changes, stock, settings)
    assert worst_difference(*pair) < TRANSFORMERS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_within_float32_of_unpatched_transformers(family: str) -> None:
    model_type, bias, changes, stock, settings = FAMILIES[family]
    pair = make_both(model_type, 2, False, bias, changes, stock, settings)
    assert worst_difference(*pair) < TRANSFORMERS_FLOAT32


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "interleaved", "bias"), [CASES[1], CASES[4]]
)
def test_within_float32_of_unpatched_transformers(
    model_type: str, kv_heads: int, interleaved: bool, bias: bool
) -> None:
    assert (
        worst_difference(*make_both(model_type, kv_heads, interleaved, bias))
        < TRANSFORMERS_FLOAT32
    )
