"""Map the names and layouts of weights in other systems' folders.

There is one table per family, which is read in both directions. "Native"
are our names and layouts, "foreign" those of the folder.

Shapes: G key/value heads, R query heads per key/value head, H head dim, D model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomesh.config.schema import ModelConfig
from evomesh.models.registry import build_model
from evomesh.parallel.spec import spec_of

Shape = tuple[int, ...]
LAYER_NUMBER = re.compile(r"\.(\d+)\.")
BLOCK_MODULES = (  # of a block beside attention.wqkv; a table lists the foreign names in this order
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w3",
    "feed_forward.w2",
    "attention_norm",
    "ffn_norm",
)


@dataclass(frozen=True)
class NameMap:
    """The foreign module names of one family, and how it pairs rotary dims.

    Attributes:
        modules: native module -> foreign ones; ``{}`` stands for the layer. Three names for wqkv mean that q, k and v
            are separate, one that they are fused in our order, group by group. A name that occurs several times is of
            one tensor that holds all of these parts, one below the other: Phi-3's ``qkv_proj`` has the rows of q, then
            of k, then of v, and its ``gate_up_proj`` those of w1, then of w3.
        interleaved: rotary pairs are neighboring rows of a head, not row i of its first and of its second half.
    """

    modules: dict[str, tuple[str, ...]]
    interleaved: bool = False

    def weight(self, module: str) -> str:
        """Return the foreign name of the weight of a module outside the blocks."""
        return f"{self.modules[module][0]}.weight"


def _name_map(
    embedding: str,
    layer: str,
    qkv: Sequence[str],
    block: Sequence[str],
    norm: str,
    head: str,
    interleaved: bool = False,
) -> NameMap:
    """Build a table; ``block`` has the foreign names of ``BLOCK_MODULES``, which like ``qkv`` follow ``layer``."""
    modules: dict[str, tuple[str, ...]] = {"embedding": (embedding,)}
    modules["layers.{}.attention.wqkv"] = tuple(layer + name for name in qkv)
    for native, foreign in zip(BLOCK_MODULES, block, strict=True):
        modules[f"layers.{{}}.{native}"] = (layer + foreign,)
    modules |= {"norm": (norm,), "head": (head,)}
    return NameMap(modules, interleaved)


LLAMA_FAMILY = _name_map(
    embedding="model.embed_tokens",
    layer="model.layers.{}.",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    block=(
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "input_layernorm",
        "post_attention_layernorm",
    ),
    norm="model.norm",
    head="lm_head",
)
HEAD_NORMS = {
    f"layers.{{}}.attention.{name}": (f"model.layers.{{}}.self_attn.{name}",)
    for name in ("q_norm", "k_norm")
}
# Qwen3 has the norms of queries and keys, the others do not.
LLAMA = NameMap(LLAMA_FAMILY.modules | HEAD_NORMS)
# Norms come after attention and feed-forward network, whose other norms it does not have.
OLMO2 = NameMap(
    LLAMA.modules
    | {
        "layers.{}.attention_norm": ("model.layers.{}.post_attention_layernorm",),
        "layers.{}.ffn_norm": ("model.layers.{}.post_feedforward_layernorm",),
    }
)
PHI3 = _name_map(
    embedding="model.embed_tokens",
    layer="model.layers.{}.",
    qkv=("self_attn.qkv_proj",) * 3,
    block=(
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
        "input_layernorm",
        "post_attention_layernorm",
    ),
    norm="model.norm",
    head="lm_head",
)
BAICHUAN = NameMap(
    LLAMA_FAMILY.modules
    | {"layers.{}.attention.wqkv": ("model.layers.{}.self_attn.W_pack",) * 3}
)
GEMMA2 = NameMap(
    LLAMA.modules
    | {
        "layers.{}.attention_out_norm": ("model.layers.{}.post_attention_layernorm",),
        "layers.{}.ffn_norm": ("model.layers.{}.pre_feedforward_layernorm",),
        "layers.{}.ffn_out_norm": ("model.layers.{}.post_feedforward_layernorm",),
    }
)
INTERNLM2 = _name_map(
    embedding="model.tok_embeddings",
    layer="model.layers.{}.",
    qkv=("attention.wqkv",),
    block=BLOCK_MODULES,
    norm="model.norm",
    head="output",
)
META = _name_map(  # Llama's consolidated files
    embedding="tok_embeddings",
    layer="layers.{}.",
    qkv=("attention.wq", "attention.wk", "attention.wv"),
    block=BLOCK_MODULES,
    norm="norm",
    head="output",
    interleaved=True,
)
# By model_type of a config.json.
NAME_MAPS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "smollm3": LLAMA,
    "baichuan": BAICHUAN,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "internlm": LLAMA,
    "internlm2": INTERNLM2,
    "internlm3": LLAMA,
}


@dataclass(frozen=True)
class TensorLink:
    """A native tensor and the one or three foreign parts that hold the same numbers.

    Attributes:
        foreign: names of the tensors that the parts are in: whole ones, or rows of one that several parts share.
        shapes: of the parts.
        first_rows: where each part begins in its tensor.
    """

    native: str
    foreign: tuple[str, ...]
    shapes: tuple[Shape, ...]
    first_rows: tuple[int, ...]

    @property
    def fused(self) -> bool:
        return ".wqkv." in self.native

    @property
    def of_heads(self) -> bool:
        """Return whether it is the norm of queries or keys, whose elements are in the order of the rotary pairs."""
        return self.native.endswith(("q_norm.weight", "k_norm.weight"))

    @property
    def native_shape(self) -> Shape:
        rows = sum(shape[0] for shape in self.shapes)
        return (rows, *self.shapes[0][1:])


def native_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every parameter by its global name, without the padding of the vocabulary."""
    model = build_model(config, device="meta")
    return {
        name: spec_of(parameter).stored_shape
        for name, parameter in model.named_parameters()
    }


def tensor_links(config: ModelConfig, name_map: NameMap) -> list[TensorLink]:
    """Return the links of all parameters of the model, in the order of the layers.

    Raises:
        KeyError: the family has no name for a parameter.
    """
    # Phi-3's qkv_proj holds q, k and v, one below the other: with 32 + 8 + 8 heads of 96
    # the parts begin at rows 0, 3072 and 3840.
    links = []
    used_rows: Counter[str] = Counter()  # of each foreign tensor, by the parts before
    for name, shape in native_shapes(config).items():
        foreign = _foreign_names(name, name_map)
        shapes = _shapes_of_parts(shape, len(foreign), config)
        first_rows = []
        for part, part_name in enumerate(foreign):
            rows, *_ = shapes[part]
            first_row = used_rows[part_name]
            first_rows.append(first_row)
            used_rows[part_name] += rows
        link = TensorLink(name, foreign, shapes, tuple(first_rows))
        links.append(link)
    return links


def foreign_shapes(links: Iterable[TensorLink]) -> dict[str, Shape]:
    """Return the shapes of the foreign tensors that hold all parts of the links.

    They are in the order of their first parts.
    """
    found: dict[str, Shape] = {}
    for link in links:
        for part, name in enumerate(link.foreign):
            first_row = link.first_rows[part]
            shape = link.shapes[part]
            rows, *columns = shape
            # The last part of a tensor ends where the tensor does.
            end = first_row + rows
            found[name] = (end, *columns)
    return found


def _foreign_names(name: str, name_map: NameMap) -> tuple[str, ...]:
    """Return the names of the foreign parts of one native tensor."""
    # layers.31.attention.wqkv.bias -> layers.{}.attention.wqkv, 31 and bias
    module, _, kind = name.rpartition(".")
    match = LAYER_NUMBER.search(module)
    layer = match[1] if match else ""
    pattern = LAYER_NUMBER.sub(".{}.", module, count=1)
    foreign = []
    for foreign_pattern in name_map.modules[pattern]:
        foreign_module = foreign_pattern.format(layer)
        foreign_name = f"{foreign_module}.{kind}"
        foreign.append(foreign_name)
    return tuple(foreign)


def _shapes_of_parts(
    shape: Shape, num_parts: int, config: ModelConfig
) -> tuple[Shape, ...]:
    """Return the shapes of the one part, or of q, k and v."""
    if num_parts == 1:
        return (shape,)
    _, *columns = shape
    shapes = []
    for heads in (config.num_attention_heads, config.kv_heads, config.kv_heads):
        rows = heads * config.head_dim
        shapes.append((rows, *columns))
    return tuple(shapes)


def native_to_foreign(
    link: TensorLink, value: Tensor, config: ModelConfig, name_map: NameMap
) -> list[Tensor]:
    """Convert a native tensor to the foreign ones.

    A fused weight is split, and its rotary rows are reordered.

    Args:
        value: the native tensor; a fused weight is [G (R + 2) H, D], a fused bias
            [G (R + 2) H].
    """
    is_reordered = config.qk_interleaved != name_map.interleaved
    to_halves = config.qk_interleaved
    if link.of_heads and is_reordered:
        heads = _reorder_heads(value, config, to_halves=to_halves)
        return [heads]
    if not link.fused:
        return [value]

    # A fused one, as groups [G, R + 2, H, ...]: the foreign layout has the same rows, or
    # three tensors with those of q, of k and of v.
    groups = _groups(value, config)
    if is_reordered:
        groups = _reorder_rotary(groups, to_halves=to_halves)
    if len(link.foreign) == 1:
        fused = groups.reshape(value.shape)
        return [fused]
    queries = groups.shape[1] - 2  # R
    qkv = torch.split(groups, [queries, 1, 1], dim=1)
    parts = []
    for part, shape in zip(qkv, link.shapes, strict=True):
        matrix = part.reshape(shape)
        parts.append(matrix)
    return parts


def _groups(rows: Tensor, config: ModelConfig) -> Tensor:
    """View rows of heads by key/value head: wqkv as [G, R + 2, H, D], q as [G, R, H, D]."""
    columns = rows.shape[1:]
    return rows.view(config.kv_heads, -1, config.head_dim, *columns)


def foreign_to_native(
    link: TensorLink, values: Sequence[Tensor], config: ModelConfig, name_map: NameMap
) -> Tensor:
    """Convert foreign tensors to the native one: the inverse of ``native_to_foreign``."""
    is_reordered = config.qk_interleaved != name_map.interleaved
    to_halves = name_map.interleaved
    first = values[0]
    if link.of_heads and is_reordered:
        return _reorder_heads(first, config, to_halves=to_halves)
    if not link.fused:
        return first
    parts = [_groups(value, config) for value in values]
    groups = torch.cat(parts, dim=1)  # [G, R + 2, H, D]
    if is_reordered:
        groups = _reorder_rotary(groups, to_halves=to_halves)
    return groups.flatten(0, 2)


def _reorder_rotary(groups: Tensor, *, to_halves: bool) -> Tensor:
    """Reorder the rows of query and key heads from one rotary pairing to the other.

    Interleaved, pair i of a head is rows 2 i and 2 i + 1; in halves, it is rows i and i
    + H / 2. Values stay.

    Args:
        groups: [G, R + 2, H, ...].
    """
    # H = 6, rows by pair and side: interleaved 0a 0b 1a 1b 2a 2b, halves 0a 1a 2a 0b 1b
    # 2b. Scores are sums over rows, so they do not change as long as queries and keys
    # have one order and the rotation pairs the same rows.
    queries_and_keys = groups[:, :-1]  # [G, R + 1, H, ...]
    values = groups[:, -1:]
    reordered = _reorder_pairs(queries_and_keys, dim=2, to_halves=to_halves)
    return torch.cat((reordered, values), dim=1)


def _reorder_heads(weight: Tensor, config: ModelConfig, *, to_halves: bool) -> Tensor:
    """Reorder the weight of a norm of queries or keys: [H], or [heads * H] of all heads together."""
    heads = weight.view(-1, config.head_dim)
    return _reorder_pairs(heads, dim=1, to_halves=to_halves).reshape(weight.shape)


def _reorder_pairs(
    x: Tensor,
    *,
    dim: int,
    to_halves: bool,
) -> Tensor:
    """Reorder a dim of length H from one rotary pairing to the other."""
    half = x.shape[dim] // 2
    split = (half, 2) if to_halves else (2, half)
    before = x.shape[:dim]
    after = x.shape[dim + 1 :]
    pairs = x.reshape(*before, *split, *after)
    swapped = pairs.transpose(dim, dim + 1)
    return swapped.flatten(dim, dim + 1)
