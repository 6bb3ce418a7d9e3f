"""A Llama-shaped Hugging Face folder with a sentencepiece tokenizer as GGUF, llama.cpp's file format (version 3)."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor

ALIGNMENT = 32
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Type number and bytes: unsigned and signed whole numbers, floats, truth values, strings, lists."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    kind = {int: 5, float: 6, str: 8}[type(value[0])]
    items = [
        _string(item) if kind == 8 else struct.pack("<i" if kind == 5 else "<f", item)
        for item in value
    ]
    return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(items)


def _tokens(file: Path) -> dict[str, Any]:
    model = SentencePieceProcessor(model_file=str(file))
    ids = range(model.vocab_size())
    kinds = {
        2: model.is_unknown,
        3: model.is_control,
        5: model.is_unused,
        6: model.is_byte,
    }
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(n) for n in ids],
        "tokenizer.ggml.scores": [float(model.get_score(n)) for n in ids],
        "tokenizer.ggml.token_type": [
            next((kind for kind, is_one in kinds.items() if is_one(n)), 1) for n in ids
        ],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": model.encode("a", out_type=str)[
            0
        ].startswith("\u2581"),
    }


def _interleave_rotary(value: Tensor, heads: int) -> Tensor:
    """Reorder rotary pairs from halves to adjacent rows, as llama.cpp's Llama has them."""
    return (
        value.view(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
    )


def write_gguf(folder: Path, out: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    facts = {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": groups,
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.rope.dimension_count": config["hidden_size"] // heads,
        "llama.vocab_size": config["vocab_size"],
        **_tokens(folder / "tokenizer.model"),
    }
    header, data = b"", b""
    state = {
        name: t
        for file in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(file).items()
    }
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        _, _, rest = module.partition("model.layers.")
        layer, _, part = rest.partition(".")
        turned = {"self_attn.q_proj": heads, "self_attn.k_proj": groups}.get(part)
        value = _interleave_rotary(tensor, turned) if turned else tensor
        theirs = (
            f"blk.{layer}.{NAMES[part]}.{kind}" if layer else f"{NAMES[module]}.{kind}"
        )
        shape = tuple(reversed(value.shape))
        header += _string(theirs) + struct.pack(
            f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data)
        )
        data += value.to(torch.float32).contiguous().numpy().tobytes()
        data += b"\0" * (-len(data) % ALIGNMENT)
    top = b"GGUF" + struct.pack("<IQQ", 3, len(state), len(facts))
    top += (
        b"".join(_string(key) + _value(value) for key, value in facts.items()) + header
    )
    out.write_bytes(top + b"\0" * (-len(top) % ALIGNMENT) + data)
