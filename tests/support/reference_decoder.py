"""A plain decoder for families that ``transformers`` has no class for, written from their published facts.

It shares nothing with evomesh: no packing, no fused weights, no cache. Parameters have
the names of the families' folders.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class ReferenceOutput:
    """Logits [B, L, V]."""

    logits: Tensor


class ReferenceDecoder(nn.Module):
    """Token ids [B, L] -> logits, from the content of a config.json."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__()
        self.record = record
        hidden = record["hidden_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(record["vocab_size"], hidden)
        self.model.layers = nn.ModuleList(
            _block(record) for _ in range(record["num_hidden_layers"])
        )
        self.model.norm = _Scale(hidden)
        self.lm_head = nn.Linear(hidden, record["vocab_size"], bias=False)

    def forward(self, ids: Tensor) -> ReferenceOutput:
        x = self.model.embed_tokens(ids)
        rotation = self._rotation(ids.shape[1])
        for block in self.model.layers:
            x = x + self._attention(
                block.self_attn, self._norm(x, block.input_layernorm), rotation
            )
            x = x + _feed_forward(
                block.mlp, self._norm(x, block.post_attention_layernorm)
            )
        x = self._norm(x, self.model.norm)
        head = self.lm_head.weight
        if self.record["model_type"] == "baichuan":
            head = head / head.norm(dim=1, keepdim=True)
        return ReferenceOutput(x @ head.T)

    def _norm(self, x: Tensor, scale: nn.Module) -> Tensor:
        mean_square = (x * x).mean(dim=-1, keepdim=True)
        return scale.weight * x / (mean_square + self.record["rms_norm_eps"]).sqrt()

    def _rotation(self, length: int) -> Tensor:
        """Return e^(i angle) of position p and pair j, [L, H / 2]."""
        width = _head_dim(self.record)
        base = self.record.get("rope_theta", 10000.0)
        scaling = self.record.get("rope_scaling") or {}
        longest = self.record["max_position_embeddings"]
        if scaling.get("rope_type") == "dynamic" and length > longest:
            factor = scaling["factor"]
            stretch = factor * length / longest - (factor - 1)
            base *= stretch ** (width / (width - 2))
        pairs = torch.arange(width // 2, dtype=torch.float64)
        angles = torch.outer(
            torch.arange(length, dtype=torch.float64), base ** (-2 * pairs / width)
        )
        return torch.polar(torch.ones_like(angles), angles)

    def _attention(self, part: nn.Module, x: Tensor, rotation: Tensor) -> Tensor:
        heads = self.record["num_attention_heads"]
        groups = self.record.get("num_key_value_heads", heads)
        width = _head_dim(self.record)
        if hasattr(part, "W_pack"):
            q, k, v = part.W_pack(x).chunk(3, dim=-1)
        else:
            q, k, v = part.q_proj(x), part.k_proj(x), part.v_proj(x)
        batch, length = x.shape[:2]
        q = _rotate(q.view(batch, length, heads, width), rotation)
        k = _rotate(k.view(batch, length, groups, width), rotation)
        v = v.view(batch, length, groups, width)
        out = torch.zeros_like(q)
        future = torch.ones(length, length).triu(1).bool()
        for head in range(heads):
            group = head * groups // heads
            scores = q[:, :, head] @ k[:, :, group].transpose(1, 2) / math.sqrt(width)
            weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
            out[:, :, head] = weights @ v[:, :, group]
        mixed: Tensor = part.o_proj(out.flatten(2))
        return mixed

    @torch.no_grad()
    def continued(self, prompt: list[int], count: int) -> list[int]:
        """Return the most likely tokens after a prompt, each from a pass over all tokens before it."""
        ids = list(prompt)
        for _ in range(count):
            logits = self(torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
        return ids[len(prompt) :]


class _Scale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


def _head_dim(record: dict[str, Any]) -> int:
    width: int = record.get("head_dim") or (
        record["hidden_size"] // record["num_attention_heads"]
    )
    return width


def _block(record: dict[str, Any]) -> nn.Module:
    hidden, width = record["hidden_size"], record["intermediate_size"]
    heads = record["num_attention_heads"]
    q_rows = heads * _head_dim(record)
    kv_rows = record.get("num_key_value_heads", heads) * _head_dim(record)
    bias, qkv_bias = record.get("bias", False), record.get("qkv_bias", False)
    block, attention, mlp = nn.Module(), nn.Module(), nn.Module()
    if record["model_type"] == "baichuan":
        attention.W_pack = nn.Linear(hidden, 3 * hidden, bias=False)
    else:
        attention.q_proj = nn.Linear(hidden, q_rows, bias=qkv_bias)
        attention.k_proj = nn.Linear(hidden, kv_rows, bias=qkv_bias)
        attention.v_proj = nn.Linear(hidden, kv_rows, bias=qkv_bias)
    attention.o_proj = nn.Linear(q_rows, hidden, bias=bias)
    mlp.gate_proj = nn.Linear(hidden, width, bias=bias)
    mlp.up_proj = nn.Linear(hidden, width, bias=bias)
    mlp.down_proj = nn.Linear(width, hidden, bias=bias)
    block.self_attn, block.mlp = attention, mlp
    block.input_layernorm = _Scale(hidden)
    block.post_attention_layernorm = _Scale(hidden)
    return block


def _feed_forward(part: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = part.down_proj(F.silu(part.gate_proj(x)) * part.up_proj(x))
    return out


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs (column j of the first half, column j of the second) of x [B, L, heads, H] as complex numbers."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * rotation[:, None].to(
        torch.promote_types(x.dtype, torch.complex64)
    )
    return torch.cat((turned.real, turned.imag), dim=-1)


def save_reference(record: dict[str, Any], folder: Path) -> ReferenceDecoder:
    """Write a folder of float32 weights at random, biases and norms too, and return the model."""
    torch.manual_seed(0)
    model = ReferenceDecoder(record)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
            if "norm" in name:
                parameter.add_(1)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(record))
    return model.eval()
