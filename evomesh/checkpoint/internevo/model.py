"""InternEvo's model files, ``model_tp{t}_pp{p}.pt`` (isp: ``model_tp{t}_wp{w}_pp{p}.pt``), read into our names.

Their layout, by family: INTERNLM keeps ``[q; k; v]`` of its own heads on each tensor rank, INTERNLM2_PUBLIC one
``[q..q, k, v]`` group a key/value head, LLAMA2 wq, wk and wv apart. Column-cut matrices lie in parts along dim 0,
row-cut ones along dim 1; isp cuts every matrix of a block along dim 0 over wp. Layer numbers are local to a stage.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from evomesh.checkpoint.internevo.pickles import read_pickle
from evomesh.checkpoint.native.format import CheckpointError

FILE = re.compile(r"^model_tp(\d+)(?:_wp(\d+))?_pp(\d+)\.pt$")
CHUNK = re.compile(
    r"^(\d+)\.(?:model\.)?(?=blocks\.|layers\.|embedding\.|tok_embeddings\.|norm\.|head\.|output\.)"
)
LAYER = re.compile(r"^(?:blocks|layers)\.(\d+)\.(.+)$")
NAMES = {  # theirs -> ours, below "layers.{i}."
    "mixer.Wqkv": "attention.wqkv",
    "mixer.out_proj": "attention.wo",
    "norm1": "attention_norm",
    "norm2": "ffn_norm",
    "mlp.w1": "feed_forward.w1",
    "mlp.w2": "feed_forward.w2",
    "mlp.w3": "feed_forward.w3",
}
TOP = {
    "embedding": "embedding",
    "embedding.word_embeddings": "embedding",
    "tok_embeddings": "embedding",
    "tok_embeddings.word_embeddings": "embedding",
    "norm": "norm",
    "head": "head",
    "output": "head",
}
InternEvoFamily = Literal["INTERNLM", "INTERNLM2_PUBLIC", "LLAMA2"]
W2 = Literal["auto", "down", "up"]  # what w2 is: by shape, or as said


@dataclass(frozen=True)
class HeadCounts:
    """Attention heads of the whole model."""

    heads: int
    kv_heads: int


@dataclass(frozen=True)
class InternEvoFolder:
    """The model files of one checkpoint; ``files[pp][wp][tp]`` is a path."""

    path: str
    files: dict[tuple[int, int, int], str]  # (pp, wp, tp)
    sizes: tuple[int, int, int]
    isp: bool

    def states(self, pp: int) -> list[dict[str, Tensor]]:
        """State dicts of a stage: over tp, or over (wp, tp) in isp with tp fastest."""
        _, wp, tp = self.sizes
        return [_state(self.files[pp, w, t]) for w in range(wp) for t in range(tp)]


def find_folder(path: str) -> InternEvoFolder:
    """
    Raises:
        CheckpointError: no model files, or some of the tp x pp grid are missing: names them.
    """
    found = {name: match for name in sorted(_listing(path)) if (match := FILE.match(name))}
    if not found:
        raise CheckpointError(
            "no model_tp*_pp*.pt in it", where=path, expected="an InternEvo checkpoint of one step"
        )
    files = {(int(m[3]), int(m[2] or 0), int(m[1])): os.path.join(path, name) for name, m in found.items()}
    isp = any(m[2] for m in found.values())
    sizes = tuple(1 + max(key[axis] for key in files) for axis in range(3))
    want = [(p, w, t) for p in range(sizes[0]) for w in range(sizes[1]) for t in range(sizes[2])]
    missing = [file_name(t, w if isp else None, p) for p, w, t in want if (p, w, t) not in files]
    if missing:
        raise CheckpointError(f"{', '.join(missing[:4])} of {len(want)} files are missing", where=path)
    return InternEvoFolder(path, files, (sizes[0], sizes[1], sizes[2]), isp)


def file_name(tp: int, wp: int | None, pp: int) -> str:
    return f"model_tp{tp}_pp{pp}.pt" if wp is None else f"model_tp{tp}_wp{wp}_pp{pp}.pt"


def _listing(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError as error:
        raise CheckpointError(f"cannot be listed: {error.strerror}", where=path) from None


def _state(path: str) -> dict[str, Tensor]:
    state = read_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError("is not a state dict of tensors", where=path)
    return {str(name).removeprefix("model."): tensor for name, tensor in state.items()}


def model_section(path: str) -> dict[str, Any] | None:
    """``model_config.pt`` as plain values; None when absent."""
    file = os.path.join(path, "model_config.pt")
    if not os.path.exists(file):
        return None
    section = read_pickle(file)
    if not isinstance(section, dict):
        raise CheckpointError("is not a model section", where=file)
    plain = {str(k): str(v) if isinstance(v, torch.dtype) else v for k, v in section.items()}
    return {k: v for k, v in plain.items() if v is None or isinstance(v, bool | int | float | str)}


def family_of(folder: InternEvoFolder) -> InternEvoFamily:
    """Told by the parameter names of the first file."""
    names = " ".join(_state(folder.files[0, 0, 0]))
    if "mixer.Wqkv" in names:
        return "INTERNLM"
    if "attention.wqkv" in names:
        return "INTERNLM2_PUBLIC"
    if "attention.wq" in names:
        return "LLAMA2"
    raise CheckpointError(
        "no known model family", where=folder.path, expected="INTERNLM, INTERNLM2_PUBLIC or LLAMA2"
    )


def read_model(path: str, heads: HeadCounts, w2: W2 = "auto") -> Iterator[tuple[str, Tensor]]:
    """Whole tensors under our names, stage by stage.

    Args:
        w2: what their w2 is; checkpoints of early 2023 have w2 and w3 exchanged.

    Raises:
        CheckpointError: missing files, unknown parameters, or w2 and w3 that shapes cannot tell apart.
    """
    yield from merge_folder(find_folder(path), heads, w2)


def merge_folder(
    folder: InternEvoFolder,
    heads: HeadCounts,
    w2: W2,
    states_of: Callable[[int], list[dict[str, Tensor]]] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """As ``read_model``.

    Args:
        states_of: what to put together of a stage, in the place of ``folder.states``: tensors of the same names and
            shapes.
    """
    family, offsets = family_of(folder), _layer_offsets(folder)
    for pp in range(folder.sizes[0]):
        states = (states_of or folder.states)(pp)
        down = _down(states[0], w2, folder.path)
        for chunk in sorted({_chunk(name)[0] for name in states[0]}):
            whole = {
                rest: _merge(rest, [s[name] for s in states if name in s], folder, family, heads, down)
                for name in states[0]
                for number, rest in [_chunk(name)]
                if number == chunk
            }
            yield from _renamed(whole, offsets.get((chunk, pp), 0), heads, down, folder.path)


def _layer_offsets(folder: InternEvoFolder) -> dict[tuple[int, int], int]:
    """(chunk, stage) -> global number of its first layer: chunk after chunk, in each stage after stage."""
    counts: dict[tuple[int, int], int] = {}
    for pp in range(folder.sizes[0]):
        for name in _state(folder.files[pp, 0, 0]):
            chunk, rest = _chunk(name)
            layer = LAYER.match(rest)
            if layer:
                counts[chunk, pp] = max(counts.get((chunk, pp), 0), int(layer[1]) + 1)
    offsets, total = {}, 0
    for key in sorted(counts):
        offsets[key], total = total, total + counts[key]
    return offsets


def _chunk(name: str) -> tuple[int, str]:
    match = CHUNK.match(name)
    return (int(match[1]), name[match.end() :]) if match else (0, name)


def _down(state: dict[str, Tensor], w2: W2, where: str) -> str:
    """Which of w2 and w3 is the down projection: the one whose columns are not those of w1."""
    columns: dict[str, int] = {}
    for name, tensor in state.items():
        if match := re.search(r"\.w([123])\.weight$", name):
            columns.setdefault(match[1], tensor.shape[1])
    if w2 != "auto" or not columns:
        return "w3" if w2 == "up" else "w2"
    if columns["2"] == columns["3"]:
        raise CheckpointError(
            "the shapes of w2 and w3 are equal: they do not tell which is the down projection",
            where=where,
            expected="down for checkpoints of InternEvo, up for those of early 2023",
            fix="say it: --w2 down or --w2 up",
        )
    return "w3" if columns["2"] == columns["1"] else "w2"


def _merge(
    name: str,
    parts: list[Tensor],
    folder: InternEvoFolder,
    family: InternEvoFamily,
    heads: HeadCounts,
    down: str,
) -> Tensor:
    """One tensor from the ranks' parts of it; ``name`` is local."""
    tp = folder.sizes[2]
    block = LAYER.match(name)
    leaf = block[2] if block else name
    if folder.isp:
        # Blocks are cut over wp and repeated over tp; embedding and head are cut over tp and repeated over wp.
        parts = parts[::tp] if block else parts[:tp]
    if len(parts) == 1 or "norm" in leaf:
        whole = parts[0]
    elif folder.isp and block:
        whole = torch.cat(parts)
    elif leaf.endswith(("out_proj.bias", "wo.bias")):
        whole = parts[0]  # added after the sum over ranks
    elif leaf.endswith(
        ("embedding.weight", "tok_embeddings.weight", "out_proj.weight", "wo.weight", f"{down}.weight")
    ):
        whole = torch.cat(parts, 1)
    else:
        whole = torch.cat(parts)
    if family == "INTERNLM" and "Wqkv" in leaf:
        ranks = 1 if folder.isp else tp
        return torch.cat([_from_blocks(part, heads.heads // ranks) for part in whole.chunk(ranks)])
    return whole


def _renamed(
    whole: dict[str, Tensor], first_layer: int, heads: HeadCounts, down: str, where: str
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in whole.items():
        block = LAYER.match(name)
        leaf, kind = (block[2] if block else name).rsplit(".", 1)
        if block is None and leaf in TOP:
            yield f"{TOP[leaf]}.{kind}", tensor
            continue
        if block is None:
            raise CheckpointError(f"unknown parameter {name!r}", where=where)
        prefix = f"layers.{first_layer + int(block[1])}."
        leaf = NAMES.get(leaf, leaf)
        if down == "w3" and leaf.endswith((".w2", ".w3")):
            leaf = leaf[:-1] + ("3" if leaf.endswith("2") else "2")
        if leaf in ("attention.wk", "attention.wv"):
            continue
        if leaf == "attention.wq":
            q, k, v = (whole[name.replace("attention.wq", f"attention.w{x}")] for x in "qkv")
            yield f"{prefix}attention.wqkv.{kind}", _grouped(q, k, v, heads.kv_heads)
            continue
        if leaf not in NAMES.values():
            raise CheckpointError(f"unknown parameter {name!r}", where=where)
        yield f"{prefix}{leaf}.{kind}", tensor


def _grouped(q: Tensor, k: Tensor, v: Tensor, kv_heads: int) -> Tensor:
    """One [q..q, k, v] group a key/value head, along dim 0."""
    return torch.cat([t.reshape(kv_heads, -1, *t.shape[1:]) for t in (q, k, v)], 1).flatten(0, 1)


def _from_blocks(rows: Tensor, heads: int) -> Tensor:
    """[q; k; v] of some heads (dim 0) to one [q, k, v] group a head."""
    return rows.reshape(3, heads, -1, *rows.shape[1:]).transpose(0, 1).flatten(0, 2)


def to_blocks(rows: Tensor, heads: int) -> Tensor:
    """The way back of what INTERNLM's [q; k; v] went through."""
    return rows.reshape(heads, 3, -1, *rows.shape[1:]).transpose(0, 1).flatten(0, 2)
