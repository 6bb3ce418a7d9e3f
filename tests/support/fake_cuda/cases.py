"""The steps that run on the fake device: dtypes, models and layouts; data only, so that reading it imports no torch."""

from __future__ import annotations

from typing import Any

T, VOCAB, WORLD = 48, 64, 4
MODEL: dict[str, Any] = {
    "model_type": "LLAMA2",
    "num_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_kv_attention_heads": 2,
    "mlp_ratio": 2.0,
    "multiple_of": 8,
    "vocab_size": VOCAB,
    "no_bias": True,
    "dtype": "bfloat16",
    "compile": False,
}
_INTERNLM2 = {"model_type": "INTERNLM2_PUBLIC", "no_bias": False}
_MODELS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "tf32": {"dtype": "tf32"},
    "bfloat16": {},
    "float16": {"dtype": "float16"},
    "float64": {"dtype": "float64"},
    "recompute": {"checkpoint": 0.5},
    "norm_head": {**_INTERNLM2, "norm_head": True, "embed_grad_scale": 0.1},
    "float32 norms": {"use_fp32_norm": True, "residual_in_fp32": True},
    "dynamic rope": {"use_dynamic_ntk_rope": True, "max_position_embeddings": 16},
    "layernorm, GELU": {"norm_type": "layernorm", "use_swiglu": False},
    "tied": {"tie_word_embeddings": True},
}
_LAYOUTS: dict[str, dict[str, Any]] = {
    "zero": {"zero1": {"size": 2}},
    "mtp": {"tensor": {"size": 2, "mode": "mtp"}},
    "msp": {"tensor": {"size": 2, "mode": "msp"}},
    "fsp": {"tensor": {"size": 2, "mode": "fsp"}},
    "isp": {"tensor": {"size": 2, "mode": "isp"}},
    "fsdp": {"zero1": {"fsdp": True}},
    "isp, sharded": {
        "tensor": {"size": 2, "mode": "isp"},
        "weight": {"size": 2, "overlap": True},
    },
}
_PIPELINE = {"parallel": {"pipeline": {"size": 2}}, "model": {"num_layers": 2}}
# What a step must not do, done on purpose (``steps.py``).
BROKEN = {
    "a value is read": "_local_scalar_dense",
    "a tensor is made on the host": "meets host tensors",
    "a blocking copy": "the host waits for a copy",
    "a second copy to the host": "[9]",
    "a host tensor is sent": "that only NCCL connects",
}
CASES: list[dict[str, Any]] = [
    *({"name": name, "model": changes} for name, changes in _MODELS.items()),
    *({"name": name, "parallel": sizes} for name, sizes in _LAYOUTS.items()),
    {"name": "pipeline", **_PIPELINE},
    *({"name": name, "parallel": _LAYOUTS["mtp"], "broken": True} for name in BROKEN),
]
