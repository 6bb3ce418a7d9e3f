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

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.pickles import read_pickle

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
# What a value of ``model_config.pt`` is, where a config file may hold it.
PLAIN_TYPES = bool | int | float | str | None
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
        """Read the state dicts of a stage.

        One per tp rank, or in isp one per (wp, tp) with tp fastest.
        """
        states = []
        for wp, tp in product(range(self.wp_size), range(self.tp_size)):
            state = _read_state(self.files[pp, wp, tp])
            states.append(state)
        return states


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
            code="EVO-CKPT-018",
        )
    # The largest rank on each axis gives the size of the grid.
    pp_size, wp_size, tp_size = (1 + max(ranks) for ranks in zip(*files, strict=True))
    folder = InternEvoFolder(path, files, pp_size, wp_size, tp_size, isp)
    _refuse_incomplete(folder)
    return folder


def _refuse_incomplete(folder: InternEvoFolder) -> None:
    sizes = (folder.pp_size, folder.wp_size, folder.tp_size)
    grid = list(product(*map(range, sizes)))
    missing = []
    for position in grid:
        if position not in folder.files:
            pp, wp, tp = position
            wp_in_name = wp if folder.isp else None
            missing.append(file_name(tp, wp_in_name, pp))
    if missing:
        raise CheckpointError(
            f"{', '.join(missing[:4])} of {len(grid)} files are missing",
            where=folder.path,
            code="EVO-CKPT-018",
        )


def file_name(tp: int, wp: int | None, pp: int) -> str:
    """Return the name of one model file; ``wp`` None: not of isp."""
    return f"model_tp{tp}_pp{pp}.pt" if wp is None else f"model_tp{tp}_wp{wp}_pp{pp}.pt"


def _list_folder(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot list the folder: {error.strerror}", where=path, code="EVO-CKPT-014"
        ) from None


def _read_state(path: str) -> dict[str, Tensor]:
    content = _read_dictionary(path, "a state dict of tensors")
    state = {}
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                "is not a state dict of tensors", where=path, code="EVO-CKPT-018"
            )
        local_name = str(name).removeprefix("model.")
        state[local_name] = tensor
    return state


def read_model_section(path: str) -> dict[str, Any] | None:
    """Return the plain values of ``model_config.pt`` in the folder ``path``.

    None if there is no such file.
    """
    file = os.path.join(path, "model_config.pt")
    if not os.path.exists(file):
        return None
    section = _read_dictionary(file, "a model section")
    return _plain_values(section)


def _plain_values(section: dict[Any, Any]) -> dict[str, Any]:
    """Return the values that a config file may hold; a dtype as text."""
    plain: dict[str, Any] = {}
    for name, value in section.items():
        key = str(name)
        is_plain = isinstance(value, PLAIN_TYPES)
        if isinstance(value, torch.dtype):
            plain[key] = str(value)
        elif is_plain:
            plain[key] = value
    return plain


def _read_dictionary(path: str, kind: str) -> dict[Any, Any]:
    """Read a file that must hold a dictionary; ``kind`` says which, for the message."""
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"is not {kind}", where=path, code="EVO-CKPT-018")
    return content


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
        code="EVO-CKPT-018",
    )


def read_model(
    path: str, heads: HeadCounts, w2: W2Role = "auto"
) -> Iterator[tuple[str, Tensor]]:
    """Yield unsharded tensors under our names, stage by stage.

    Args:
        w2: what their w2 is; checkpoints of early 2023 have w2 and w3 exchanged.

    Raises:
        CheckpointError: missing files, unknown parameters, or w2 and w3 that shapes
            cannot tell apart.
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
        stage_states: returns what to merge of a stage instead of ``folder.stage_states``,
            tensors of the same names and shapes: optimizer state, say.
    """
    family = family_of(folder)
    first_layers = _first_layers(folder)
    read_states = stage_states or folder.stage_states
    for pp in range(folder.pp_size):
        # One stage at a time is in memory, and one chunk of it is merged.
        states = read_states(pp)
        first_state = states[0]
        down = _down_projection(first_state, w2, folder.path)
        names_of_chunk = _names_of_chunk(first_state)
        for chunk in sorted(names_of_chunk):
            merged = {}
            for name in names_of_chunk[chunk]:
                # In InternEvo's v1 only the first rank has an output bias.
                shards = [state[name] for state in states if name in state]
                _, local_name = _split_chunk(name)
                whole = _merge_shards(local_name, shards, folder, family, heads, down)
                merged[local_name] = whole
            # Layers are numbered within the chunk.
            first_layer = first_layers.get((chunk, pp), 0)
            yield from _rename(merged, first_layer, heads, down, folder.path)


def _names_of_chunk(state: dict[str, Tensor]) -> dict[int, list[str]]:
    """Return the names of each model chunk in a file.

    With interleaved stages a file holds several chunks, whose number precedes the names:
    ``0.layers.1.norm1.weight`` and ``1.layers.1.norm1.weight``.
    """
    names_of_chunk: dict[int, list[str]] = {}
    for name in state:
        chunk, _ = _split_chunk(name)
        names_of_chunk.setdefault(chunk, []).append(name)
    return names_of_chunk


def _first_layers(folder: InternEvoFolder) -> dict[tuple[int, int], int]:
    """Return (chunk, stage) -> global number of its first layer.

    Layers run through all stages of the first chunk, then through all stages of the
    second, and so on: of 8 layers on 2 stages with 2 chunks, stage 0 has layers 0, 1
    and 4, 5, and stage 1 has 2, 3 and 6, 7.
    """
    num_layers: dict[tuple[int, int], int] = {}
    for pp in range(folder.pp_size):
        state = _read_state(folder.files[pp, 0, 0])
        for name in state:
            chunk, local_name = _split_chunk(name)
            layer = LAYER_NAME.match(local_name)
            if layer:
                after_it = int(layer[1]) + 1
                known = num_layers.get((chunk, pp), 0)
                num_layers[chunk, pp] = max(known, after_it)
    first_layers = {}
    total = 0
    # Sorted by chunk, then by stage.
    for key in sorted(num_layers):
        first_layers[key] = total
        total += num_layers[key]
    return first_layers


def _split_chunk(name: str) -> tuple[int, str]:
    """Split a parameter name into the number of its model chunk and the name in it.

    The number is 0 if the name has none.
    """
    match = CHUNK_PREFIX.match(name)
    if match is None:
        return 0, name
    return int(match[1]), name[match.end() :]


def _down_projection(
    state: dict[str, Tensor], w2: W2Role, where: str
) -> DownProjection:
    """Return which of w2 and w3 is the down projection.

    It is the one whose columns are not those of w1.
    """
    # w1 and the up projection are [F / tp, D], the down projection is [D, F / tp].
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
            code="EVO-CKPT-018",
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
    in_isp_block = folder.isp and layer is not None
    # In isp blocks are sharded over wp and replicated over tp; embedding and head are
    # sharded over tp and replicated over wp. ``shards`` has tp fastest: with tp 2 and
    # wp 3 its shards are those of (wp, tp) 00 01 10 11 20 21.
    if in_isp_block:
        shards = shards[:: folder.tp_size]
    elif folder.isp:
        shards = shards[: folder.tp_size]

    whole = shards[0]
    dim = _shard_dim(leaf, in_isp_block=in_isp_block, down=down)
    if dim is not None and len(shards) > 1:
        whole = torch.cat(shards, dim)

    if family == "INTERNLM" and "Wqkv" in leaf:
        # [q; k; v] of the heads of rank 0, then of rank 1, ...: reordered rank by rank.
        ranks = 1 if folder.isp else folder.tp_size
        heads_of_rank = heads.heads // ranks
        groups = []
        for blocks in whole.chunk(ranks):
            groups.append(_blocks_to_groups(blocks, heads_of_rank))
        whole = torch.cat(groups)
    return whole


def _shard_dim(leaf: str, *, in_isp_block: bool, down: DownProjection) -> int | None:
    """Return the dim along which a parameter is sharded, None when it is replicated."""
    if "norm" in leaf:
        return None
    if in_isp_block:
        return 0
    if leaf.endswith(OUTPUT_BIASES):
        return None
    row_parallel = (*ROW_PARALLEL, f"{down}.weight")
    return 1 if leaf.endswith(row_parallel) else 0


def _rename(
    tensors: dict[str, Tensor],
    first_layer: int,
    heads: HeadCounts,
    down: DownProjection,
    where: str,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the unsharded tensors of a model chunk under our names.

    wq, wk and wv become one wqkv.
    """
    for name, tensor in tensors.items():
        layer = LAYER_NAME.match(name)
        leaf = layer[2] if layer else name
        module, kind = leaf.rsplit(".", 1)
        if layer is None:
            if module not in TOP_MODULES:
                raise CheckpointError(
                    f"unknown parameter {name!r}", where=where, code="EVO-CKPT-018"
                )
            yield f"{TOP_MODULES[module]}.{kind}", tensor
            continue
        number = first_layer + int(layer[1])
        # The first of the three brings its siblings, which are skipped when their turn
        # comes.
        if module == "attention.wq":
            qkv = []
            for letter in "qkv":
                sibling = name.replace("attention.wq", f"attention.w{letter}")
                qkv.append(tensors[sibling])
            merged = _group_qkv(qkv, heads.kv_heads)
            yield f"layers.{number}.attention.wqkv.{kind}", merged
        elif module not in ("attention.wk", "attention.wv"):
            ours = _block_module(module, down)
            if ours not in BLOCK_MODULES.values():
                raise CheckpointError(
                    f"unknown parameter {name!r}", where=where, code="EVO-CKPT-018"
                )
            yield f"layers.{number}.{ours}.{kind}", tensor


def _block_module(module: str, down: DownProjection) -> str:
    """Return our name of a module in a block; an unknown one as it is."""
    ours = BLOCK_MODULES.get(module, module)
    if down == "w3":
        ours = EXCHANGED.get(ours, ours)
    return ours


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
    """Reorder one [q, k, v] group per head along dim 0 to INTERNLM's [q; k; v]."""
    groups = rows.reshape(heads, 3, -1, *rows.shape[1:])  # [n, 3, H, ...]
    return groups.transpose(0, 1).flatten(0, 2)
