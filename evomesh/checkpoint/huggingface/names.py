"""Names and layouts of the weights in other systems' folders: one table a family, read in both directions.

Shapes: G key/value heads, R query heads per key/value head, H head dim, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomesh.config.schema import ModelConfig
from evomesh.models.registry import build_model
from evomesh.parallel.spec import spec_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NameMap:
    """Attributes:
    modules: our module -> theirs, ``{}`` being the layer. Three names take the fused wqkv apart into q, k and v; one
        keeps our order, group by group.
    interleaved: their rotary pairs are neighbouring rows of a head, not its first and second half.
    """

    modules: dict[str, tuple[str, ...]]
    interleaved: bool = False


def _blocks(layer: str, qkv: Sequence[str], rest: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The modules of one block; ``rest``: output projection, gate, up, down, and the two norms."""
    ours = (
        "attention.wo",
        "feed_forward.w1",
        "feed_forward.w3",
        "feed_forward.w2",
        "attention_norm",
        "ffn_norm",
    )
    blocks = {"layers.{}.attention.wqkv": tuple(layer + name for name in qkv)}
    return blocks | {f"layers.{{}}.{mine}": (layer + name,) for mine, name in zip(ours, rest, strict=True)}


INTERNLM2_REST = (
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w3",
    "feed_forward.w2",
    "attention_norm",
    "ffn_norm",
)
LLAMA = NameMap(
    {
        "embedding": ("model.embed_tokens",),
        **_blocks(
            "model.layers.{}.",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            (
                "self_attn.o_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.down_proj",
                "input_layernorm",
                "post_attention_layernorm",
            ),
        ),
        "norm": ("model.norm",),
        "head": ("lm_head",),
    }
)
INTERNLM2 = NameMap(
    {
        "embedding": ("model.tok_embeddings",),
        **_blocks("model.layers.{}.", ("attention.wqkv",), INTERNLM2_REST),
        "norm": ("model.norm",),
        "head": ("output",),
    }
)
META = NameMap(  # Llama's consolidated files
    {
        "embedding": ("tok_embeddings",),
        **_blocks("layers.{}.", ("attention.wq", "attention.wk", "attention.wv"), INTERNLM2_REST),
        "norm": ("norm",),
        "head": ("output",),
    },
    interleaved=True,
)
NAMINGS = {"llama": LLAMA, "internlm": LLAMA, "internlm2": INTERNLM2}  # by model_type of a config.json


@dataclass(frozen=True)
class TensorLink:
    """One of our tensors and the one or three of theirs that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...]

    @property
    def fused(self) -> bool:
        return ".wqkv." in self.ours


def our_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter of the model by global name, without the padding of the vocabulary."""
    return {
        name: spec_of(p).stored_shape for name, p in build_model(config, device="meta").named_parameters()
    }


def links(config: ModelConfig, naming: NameMap) -> list[TensorLink]:
    """All tensors of the model, in the order of the layers.

    Raises:
        KeyError: a parameter of ours that the family has no word for.
    """
    found = []
    for name, shape in our_shapes(config).items():
        module, _, kind = name.rpartition(".")
        layer = next((part for part in module.split(".") if part.isdigit()), "")
        pattern = module.replace(f".{layer}.", ".{}.", 1) if layer else module
        theirs = tuple(f"{name.format(layer)}.{kind}" for name in naming.modules[pattern])
        shapes: tuple[Shape, ...] = (shape,)
        if len(theirs) == 3:
            rows = [
                n * config.head_dim for n in (config.num_attention_heads, config.kv_heads, config.kv_heads)
            ]
            shapes = tuple((n, *shape[1:]) for n in rows)
        found.append(TensorLink(name, theirs, shapes))
    return found


def to_theirs(link: TensorLink, value: Tensor, config: ModelConfig, naming: NameMap) -> list[Tensor]:
    """Our tensor as theirs: a fused weight [G (R + 2) H, D] taken apart, its rotary rows in their order."""
    if not link.fused:
        return [value]
    groups = value.view(config.kv_heads, -1, config.head_dim, *value.shape[1:])
    if config.qk_interleaved != naming.interleaved:
        groups = _reorder(groups, to_halves=config.qk_interleaved)
    if len(link.theirs) == 1:
        return [groups.reshape(value.shape)]
    parts = torch.split(groups, [groups.shape[1] - 2, 1, 1], dim=1)
    return [part.reshape(shape) for part, shape in zip(parts, link.shapes, strict=True)]


def to_ours(link: TensorLink, values: Sequence[Tensor], config: ModelConfig, naming: NameMap) -> Tensor:
    """The inverse of ``to_theirs``."""
    if not link.fused:
        return values[0]
    rest = values[0].shape[1:]
    groups = torch.cat([value.view(config.kv_heads, -1, config.head_dim, *rest) for value in values], dim=1)
    if config.qk_interleaved != naming.interleaved:
        groups = _reorder(groups, to_halves=naming.interleaved)
    return groups.reshape(-1, *rest)


def _reorder(groups: Tensor, *, to_halves: bool) -> Tensor:
    """Rotary rows of the query and key heads in [G, R + 2, H, ...] between the two pairings; values stay."""
    half = groups.shape[2] // 2
    heads = groups[:, :-1]
    pairs = heads.reshape(*heads.shape[:2], *((half, 2) if to_halves else (2, half)), *heads.shape[3:])
    turned = pairs.transpose(2, 3).flatten(2, 3)
    return torch.cat((turned, groups[:, -1:]), dim=1)
