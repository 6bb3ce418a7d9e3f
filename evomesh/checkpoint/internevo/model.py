"""Read InternEvo's model files, ``model_tp{t}_pp{p}.pt`` (isp: ``model_tp{t}_wp{w}_pp{p}.pt``), under our names.

How each family stores attention, N heads in all and n of them on a tensor rank:

- INTERNLM: ``mixer.Wqkv`` [3 n H, D], on each tensor rank the ``[q; k; v]`` of its heads;
- INTERNLM2_PUBLIC: ``attention.wqkv``, one ``[q..q, k, v]`` group per key/value head, which is our order too;
- LLAMA2: ``attention.wq``, ``wk`` and ``wv``, three tensors.

Column-parallel matrices are sharded along dim 0, row-parallel ones along dim 1; isp
shards every matrix of a block along dim 0 over wp. Layer numbers count from 0 in each
stage.

Shapes: N attention heads, H head dim, D model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from evomesh.checkpoint.internevo.pickles import read_pickle
from evomesh.checkpoint.native.format import CheckpointError

MODEL_FILE = re.compile(r"^model_tp(?P<tp>\d+)(?:_wp(?P<wp>\d+))?_pp(?P<pp>\d+)\.pt$")
CHUNK_PREFIX = re.compile(
    r"^(\d+)\.(?:model\.)?(?=blocks\.|layers\.|embedding\.|tok_embeddings\.|norm\.|head\.|output\.)"
)
LAYER_NAME = re.compile(r"^(?:blocks|layers)\.(\d+)\.(.+)$")
BLOCK_MODULES = {  # theirs -> ours, below "layers.{i}."
    "mixer.Wqkv": "attention.wqkv",
    "mixer.out_proj": "attention.wo",
    "norm1": "attention_norm",
    "norm2": "ffn_norm",
    "mlp.w1": "feed_forward.w1",
    "mlp.w2": "feed_forward.w2",
    "mlp.w3": "feed_forward.w3",
}
TOP_MODULES = {  # theirs -> ours, outside the blocks
    "embedding": "embedding",
    "embedding.word_embeddings": "embedding",
    "tok_embeddings": "embedding",
    "tok_embeddings.word_embeddings": "embedding",
    "norm": "norm",
    "head": "head",
    "output": "head",
}
# Added after the sum over ranks, so not sharded.
OUTPUT_BIASES = ("out_proj.bias", "wo.bias")
ROW_PARALLEL = (
    "embedding.weight",
    "tok_embeddings.weight",
    "out_proj.weight",
    "wo.weight",
)
EXCHANGED = {"feed_forward.w2": "feed_forward.w3", "feed_forward.w3": "feed_forward.w2"}

InternEvoFamily = Literal["INTERNLM", "INTERNLM2_PUBLIC", "LLAMA2"]
W2Role = Literal["auto", "down", "up"]  # what w2 is: "auto" judges by the shapes
DownProjection = Literal["w2", "w3"]


@dataclass(frozen=True)
class HeadCounts:
    """Numbers of attention heads in the whole model."""

    heads: int
    kv_heads: int


@dataclass(frozen=True)
class InternEvoFolder:
    """The model files of one checkpoint: a path per (pp, wp, tp), and the size of each axis.

    Without isp there is no weight-parallel axis: ``wp_size`` is 1.
    """

    path: str
    files: dict[tuple[int, int, int], str]
    pp_size: int
    wp_size: int
    tp_size: int
    isp: bool

    def stage_states(self, pp: int) -> list[dict[str, Tensor]]:
        """Read the state dicts of a stage: one per tp rank, or in isp one per (wp, tp) with tp fastest."""
        return [
            _read_state(self.files[pp, wp, tp])
            for wp in range(self.wp_size)
            for tp in range(self.tp_size)
        ]


def find_model_files(path: str) -> InternEvoFolder:
    """Find the model files in the folder ``path`` and check that the grid is complete.

    Raises:
        CheckpointError: no model files, or some of the tp x pp grid are missing: names them.
    """
    isp = False
    files: dict[tuple[int, int, int], str] = {}
    for name in sorted(_list_folder(path)):
        match = MODEL_FILE.match(name)
        if match is None:
            continue
        if match["wp"] is not None:
            isp = True
        position = int(match["pp"]), int(match["wp"] or 0), int(match["tp"])
        files[position] = os.path.join(path, name)
    if not files:
        raise CheckpointError(
            "there is no model_tp*_pp*.pt in the folder",
            where=path,
            expected="an InternEvo checkpoint of one step",
        )
    # The largest rank on each axis gives the size of the grid.
    pp_size, wp_size, tp_size = (1 + max(ranks) for ranks in zip(*files, strict=True))
    folder = InternEvoFolder(path, files, pp_size, wp_size, tp_size, isp)
    _refuse_incomplete(folder)
    return folder


def _refuse_incomplete(folder: InternEvoFolder) -> None:
    grid = list(
        product(range(folder.pp_size), range(folder.wp_size), range(folder.tp_size))
    )
    missing = [
        file_name(tp, wp if folder.isp else None, pp)
        for pp, wp, tp in grid
        if (pp, wp, tp) not in folder.files
    ]
    if missing:
        raise CheckpointError(
            f"{', '.join(missing[:4])} of {len(grid)} files are missing",
            where=folder.path,
        )


def file_name(tp: int, wp: int | None, pp: int) -> str:
    """Return the name of one model file; ``wp`` None: not of isp."""
    return f"model_tp{tp}_pp{pp}.pt" if wp is None else f"model_tp{tp}_wp{wp}_pp{pp}.pt"


def _list_folder(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot list the folder: {error.strerror}", where=path
        ) from None


def _read_state(path: str) -> dict[str, Tensor]:
    state = read_pickle(path)
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise CheckpointError("is not a state dict of tensors", where=path)
    return {str(name).removeprefix("model."): tensor for name, tensor in state.items()}


def read_model_section(path: str) -> dict[str, Any] | None:
    """Return the plain values of ``model_config.pt`` in the folder ``path``, None if there is no such file."""
    file = os.path.join(path, "model_config.pt")
    if not os.path.exists(file):
        return None
    section = read_pickle(file)
    if not isinstance(section, dict):
        raise CheckpointError("is not a model section", where=file)
    plain: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, torch.dtype):
            plain[str(key)] = str(value)
        elif value is None or isinstance(value, bool | int | float | str):
            plain[str(key)] = value
    return plain


def family_of(folder: InternEvoFolder) -> InternEvoFamily:
    """Return the model family, which the parameter names of the first file show."""
    names = " ".join(_read_state(folder.files[0, 0, 0]))
    if "mixer.Wqkv" in names:
        return "INTERNLM"
    if "attention.wqkv" in names:
        return "INTERNLM2_PUBLIC"
    if "attention.wq" in names:
        return "LLAMA2"
    raise CheckpointError(
        "the parameter names are of no known model family",
        where=folder.path,
        expected="INTERNLM, INTERNLM2_PUBLIC or LLAMA2",
    )


def read_model(
    path: str, heads: HeadCounts, w2: W2Role = "auto"
) -> Iterator[tuple[str, Tensor]]:
    """Yield unsharded tensors under our names, stage by stage.

    Args:
        w2: what their w2 is; checkpoints of early 2023 have w2 and w3 exchanged.

    Raises:
        CheckpointError: missing files, unknown parameters, or w2 and w3 that shapes cannot tell apart.
    """
    yield from merge_folder(find_model_files(path), heads, w2)


def merge_folder(
    folder: InternEvoFolder,
    heads: HeadCounts,
    w2: W2Role,
    stage_states: Callable[[int], list[dict[str, Tensor]]] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Merge the shards of a folder like ``read_model``.

    Args:
        stage_states: returns what to merge of a stage instead of ``folder.stage_states``, tensors of the same names and
            shapes: optimizer state, say.
    """
    family = family_of(folder)
    first_layers = _first_layers(folder)
    read_states = stage_states or folder.stage_states
    for pp in range(folder.pp_size):
        states = read_states(pp)
        first_state = states[0]
        down = _down_projection(first_state, w2, folder.path)
        # With interleaved stages a file holds several model chunks, whose number
        # precedes the names.
        names_of_chunk: dict[int, list[str]] = {}
        for name in first_state:
            chunk, _ = _split_chunk(name)
            names_of_chunk.setdefault(chunk, []).append(name)
        for chunk, names in sorted(names_of_chunk.items()):
            merged: dict[str, Tensor] = {}
            for name in names:
                _, local_name = _split_chunk(name)
                shards = [state[name] for state in states if name in state]
                merged[local_name] = _merge_shards(
                    local_name, shards, folder, family, heads, down
                )
            first_layer = first_layers.get((chunk, pp), 0)
            yield from _rename(merged, first_layer, heads, down, folder.path)


def _first_layers(folder: InternEvoFolder) -> dict[tuple[int, int], int]:
    """Return (chunk, stage) -> global number of its first layer.

    Layers run through all stages of the first chunk, then through all stages of the
    second, and so on.
    """
    counts: dict[tuple[int, int], int] = {}
    for pp in range(folder.pp_size):
        for name in _read_state(folder.files[pp, 0, 0]):
            chunk, local_name = _split_chunk(name)
            layer = LAYER_NAME.match(local_name)
            if layer:
                counts[chunk, pp] = max(counts.get((chunk, pp), 0), int(layer[1]) + 1)
    first_layers: dict[tuple[int, int], int] = {}
    total = 0
    for key in sorted(counts):
        first_layers[key] = total
        total += counts[key]
    return first_layers


def _split_chunk(name: str) -> tuple[int, str]:
    """Split a parameter name into the number of its model chunk, 0 if it has none, and the name in the chunk."""
    match = CHUNK_PREFIX.match(name)
    return (int(match[1]), name[match.end() :]) if match else (0, name)


def _down_projection(
    state: dict[str, Tensor], w2: W2Role, where: str
) -> DownProjection:
    """Return which of w2 and w3 is the down projection: the one whose columns are not those of w1."""
    columns: dict[str, int] = {}
    for name, tensor in state.items():
        match = re.search(r"\.w([123])\.weight$", name)
        if match:
            columns.setdefault(match[1], tensor.shape[1])
    if w2 != "auto" or not columns:
        return "w3" if w2 == "up" else "w2"
    if columns["2"] == columns["3"]:
        raise CheckpointError(
            "w2 and w3 have equal shapes, which do not show which one is the down projection",
            where=where,
            expected="down for checkpoints of InternEvo, up for those of early 2023",
            fix="choose one: --w2 down or --w2 up",
        )
    return "w3" if columns["2"] == columns["1"] else "w2"


def _merge_shards(
    name: str,
    shards: list[Tensor],
    folder: InternEvoFolder,
    family: InternEvoFamily,
    heads: HeadCounts,
    down: DownProjection,
) -> Tensor:
    """Return the unsharded tensor ``name`` of a stage."""
    layer = LAYER_NAME.match(name)
    leaf = layer[2] if layer else name
    if folder.isp:
        # Blocks are sharded over wp and replicated over tp; embedding and head are
        # sharded over tp and replicated over wp. ``shards`` has tp fastest.
        shards = shards[:: folder.tp_size] if layer else shards[: folder.tp_size]
    dim = _shard_dim(leaf, in_isp_block=folder.isp and layer is not None, down=down)
    replicated = dim is None or len(shards) == 1
    whole = shards[0] if replicated else torch.cat(shards, dim or 0)
    if family == "INTERNLM" and "Wqkv" in leaf:
        # [q; k; v] of the heads of rank 0, then of rank 1, ...: reordered rank by rank.
        ranks = 1 if folder.isp else folder.tp_size
        blocks = whole.chunk(ranks)
        whole = torch.cat(
            [_blocks_to_groups(block, heads.heads // ranks) for block in blocks]
        )
    return whole


def _shard_dim(leaf: str, *, in_isp_block: bool, down: DownProjection) -> int | None:
    """Return the dim along which a parameter is sharded, None when it is replicated."""
    if "norm" in leaf:
        return None
    if in_isp_block:
        return 0
    if leaf.endswith(OUTPUT_BIASES):
        return None
    return 1 if leaf.endswith((*ROW_PARALLEL, f"{down}.weight")) else 0


def _rename(
    tensors: dict[str, Tensor],
    first_layer: int,
    heads: HeadCounts,
    down: DownProjection,
    where: str,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the unsharded tensors of a model chunk under our names, wq, wk and wv as one wqkv."""
    for name, tensor in tensors.items():
        layer = LAYER_NAME.match(name)
        module, kind = (layer[2] if layer else name).rsplit(".", 1)
        if layer is None:
            if module not in TOP_MODULES:
                raise CheckpointError(f"unknown parameter {name!r}", where=where)
            yield f"{TOP_MODULES[module]}.{kind}", tensor
            continue
        prefix = f"layers.{first_layer + int(layer[1])}."
        if module == "attention.wq":
            qkv = [
                tensors[name.replace("attention.wq", f"attention.w{letter}")]
                for letter in "qkv"
            ]
            yield f"{prefix}attention.wqkv.{kind}", _group_qkv(qkv, heads.kv_heads)
        elif module not in ("attention.wk", "attention.wv"):
            ours = BLOCK_MODULES.get(module, module)
            if down == "w3":
                ours = EXCHANGED.get(ours, ours)
            if ours not in BLOCK_MODULES.values():
                raise CheckpointError(f"unknown parameter {name!r}", where=where)
            yield f"{prefix}{ours}.{kind}", tensor


def _group_qkv(qkv: list[Tensor], kv_heads: int) -> Tensor:
    """Merge q, k and v along dim 0 into one [q..q, k, v] group per key/value head."""
    # Each [kv_heads, rows of a group, ...].
    groups = [rows.reshape(kv_heads, -1, *rows.shape[1:]) for rows in qkv]
    return torch.cat(groups, dim=1).flatten(0, 1)


def _blocks_to_groups(rows: Tensor, heads: int) -> Tensor:
    """Reorder the [q; k; v] of some heads along dim 0 to one [q, k, v] group per head."""
    blocks = rows.reshape(3, heads, -1, *rows.shape[1:])  # [3, n, H, ...]
    return blocks.transpose(0, 1).flatten(0, 2)


def groups_to_blocks(rows: Tensor, heads: int) -> Tensor:
    """Reorder one [q, k, v] group per head along dim 0 to INTERNLM's [q; k; v] of all of them."""
    groups = rows.reshape(heads, 3, -1, *rows.shape[1:])  # [n, 3, H, ...]
    return groups.transpose(0, 1).flatten(0, 2)
