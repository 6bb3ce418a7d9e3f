"""Writes InternEvo's model files of any tensor x pipeline (x weight) size from one of our checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evomesh.checkpoint.internevo.model import NAMES, HeadCounts, file_name, to_blocks
from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native import read
from evomesh.checkpoint.native.boxes import Box, LocalPart
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import CheckpointError, TensorRecord
from evomesh.config.schema import ModelConfig
from evomesh.pipeline.stages import layer_ranges

OURS = re.compile(r"^layers\.(\d+)\.(.+)\.(weight|bias)$")
V1 = {ours: theirs for theirs, ours in NAMES.items()}
TOP_V1 = {"embedding": "embedding", "norm": "norm", "head": "head"}
TOP_V2 = {"embedding": "tok_embeddings", "norm": "norm", "head": "output"}


def write_model(
    found: Checkpoint, model: ModelConfig, target: str, tensor: int, pipeline: int, weight: int | None = None
) -> list[str]:
    """Writes ``model_tp{t}_pp{p}.pt``, ``model_config.pt`` (a plain dict) and ``{step}.step``; returns the files.

    Args:
        weight: weight-parallel size of isp, whose files are ``model_tp{t}_wp{w}_pp{p}.pt``; None: not isp.

    Raises:
        CheckpointError: sizes that do not divide, a family InternEvo has not, or a target that exists.
    """
    if model.model_type not in ("INTERNLM", "INTERNLM2_PUBLIC", "LLAMA2"):
        raise CheckpointError(f"InternEvo has no model type {model.model_type!r}", where=found.folder)
    for size, name in (
        (model.kv_heads, "key/value heads"),
        (model.vocab_size, "vocabulary"),
        (model.mlp_width, "mlp"),
    ):
        if size % tensor:
            raise CheckpointError(
                f"{name}: {size} cannot be divided by --tensor {tensor}", where=found.folder
            )
    if weight and (wrong := [size for size in _block_rows(model) if size % weight]):
        raise CheckpointError(
            f"matrices of {wrong[0]} rows cannot be divided by --weight {weight}", where=found.folder
        )
    if pipeline > model.num_layers:
        raise CheckpointError(f"{model.num_layers} layers cannot fill {pipeline} stages", where=found.folder)
    if os.path.isdir(target) and os.listdir(target):
        raise CheckpointError("the folder is not empty", where=target, fix="give a new one")
    os.makedirs(target, exist_ok=True)
    weights = weight or 1
    heads = HeadCounts(model.num_attention_heads, model.kv_heads)
    records = {name: record for name, record in found.records().items() if not name.startswith("optim.")}
    written = []
    for pp, layers in enumerate(layer_ranges(model.num_layers, pipeline)):
        states: dict[tuple[int, int], dict[str, Tensor]] = {
            (t, w): {} for t in range(tensor) for w in range(weights)
        }
        for name, record in records.items():
            for theirs, cut in _places(name, layers, model, heads):
                parts = cut(_whole(found, record), tensor if weight is None or not OURS.match(name) else 1)
                for (t, w), state in states.items():
                    part = parts[t % len(parts)]
                    if part is not None:
                        here = part if _whole_in_isp(name, weight) else part.chunk(weights)[w]
                        state[theirs] = here.contiguous().clone()
        for (t, w), state in states.items():
            written.append(os.path.join(target, file_name(t, None if weight is None else w, pp)))
            torch.save(state, written[-1])
    section: dict[str, Any] = {
        k: v for k, v in model.model_dump().items() if isinstance(v, bool | int | float | str)
    }
    torch.save(section, os.path.join(target, "model_config.pt"))
    torch.save({"step": found.step}, os.path.join(target, f"{found.step}.step"))
    return written


def _block_rows(model: ModelConfig) -> tuple[int, ...]:
    """Rows of a block's matrices: queries, keys and values together or apart, and the rest."""
    keys = model.kv_heads * model.head_dim
    qkv = (keys,) if model.model_type == "LLAMA2" else (model.hidden_size + 2 * keys,)
    return (*qkv, model.hidden_size, model.mlp_width)


def _whole_in_isp(name: str, weight: int | None) -> bool:
    """Norms, and what lies outside the blocks, are not cut over the weight-parallel ranks."""
    return weight is None or not OURS.match(name) or "norm" in name


ShardFunction = Callable[[Tensor, int], list[Tensor | None]]


def _rows(whole: Tensor, ranks: int) -> list[Tensor | None]:
    return list(whole.chunk(ranks))


def _columns(whole: Tensor, ranks: int) -> list[Tensor | None]:
    return list(whole.chunk(ranks, 1))


def _all(whole: Tensor, ranks: int) -> list[Tensor | None]:
    return [whole] * ranks


def _first(whole: Tensor, ranks: int) -> list[Tensor | None]:
    return [whole] + [None] * (ranks - 1)


def _places(
    name: str, layers: range, model: ModelConfig, heads: HeadCounts
) -> list[tuple[str, ShardFunction]]:
    """Their names for one of our tensors in a stage, and how each is cut; [] when it lies in another stage."""
    v1 = model.model_type == "INTERNLM"
    match = OURS.match(name)
    if match is None:
        top, kind = name.rsplit(".", 1)
        here = layers.start == 0 if top == "embedding" else layers.stop == model.num_layers
        cut = {"embedding": _columns, "norm": _all, "head": _rows}[top]
        return [(f"{(TOP_V1 if v1 else TOP_V2)[top]}.{kind}", cut)] if here else []
    number, leaf, kind = int(match[1]), match[2], match[3]
    if number not in layers:
        return []
    prefix = f"{'blocks' if v1 else 'layers'}.{number - layers.start}."
    if leaf == "attention.wqkv" and model.model_type == "LLAMA2":
        group = heads.heads // heads.kv_heads
        return [
            (f"{prefix}attention.w{x}.{kind}", _split(heads.kv_heads, group, model.head_dim, x))
            for x in "qkv"
        ]
    if leaf == "attention.wqkv" and v1:

        def blocks(whole: Tensor, ranks: int) -> list[Tensor | None]:
            return [to_blocks(part, heads.heads // ranks) for part in whole.chunk(ranks)]

        return [(f"{prefix}mixer.Wqkv.{kind}", blocks)]
    cut = _rows
    if "norm" in leaf:
        cut = _all
    elif leaf in ("attention.wo", "feed_forward.w2"):
        cut = _columns if kind == "weight" else (_first if v1 else _all)
    return [(f"{prefix}{V1[leaf] if v1 else leaf}.{kind}", cut)]


def _split(kv_heads: int, group: int, head_dim: int, which: str) -> ShardFunction:
    """One of q, k and v out of the groups, then cut by rows."""
    place = {"q": slice(0, group), "k": slice(group, group + 1), "v": slice(group + 1, group + 2)}[which]

    def cut(whole: Tensor, ranks: int) -> list[Tensor | None]:
        return list(
            whole.reshape(kv_heads, group + 2, head_dim, *whole.shape[1:])[:, place]
            .flatten(0, 2)
            .chunk(ranks)
        )

    return cut


def _whole(found: Checkpoint, record: TensorRecord) -> Tensor:
    target = torch.empty(record.shape, dtype=fmt.DTYPES[record.dtype])
    part = LocalPart(target, Box((0,) * target.dim(), record.shape))
    read.run(found, [read.ReadItem(record, piece, (part,)) for piece in record.pieces])
    return target
