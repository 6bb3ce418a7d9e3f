"""Load the weights of a foreign folder under our names, checked before the first tensor is read.

These are the loaders of ``ckpt_type`` "hf", "hf_llama" and "llama".
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomesh.checkpoint.hub_cache import local_folder
from evomesh.checkpoint.huggingface.folder import (
    MetaFolder,
    WeightFolder,
    open_folder,
    read_json,
)
from evomesh.checkpoint.huggingface.match import (
    describe_folder,
    match_tensors,
    refuse_another_head,
)
from evomesh.checkpoint.huggingface.names import (
    META,
    NameMap,
    TensorLink,
    foreign_to_native,
)
from evomesh.checkpoint.native.boxes import Box, Coordinates
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.families import ARCHITECTURE_KEYS
from evomesh.config.schema import ModelConfig
from evomesh.storage.local import LocalStorage
from evomesh.storage.urls import split_url

logger = logging.getLogger(__name__)

UNTIED = (
    "its head is its embedding, and the run has model.tie_word_embeddings=False: both start from the same values and "
    "are trained apart"
)
# Settings that change what the weights compute; shapes do not show all of them.
COMPARED = (
    "num_layers",
    "num_attention_heads",
    "kv_heads",
    "hidden_size",
    "vocab_size",
    "mlp_width",
    "head_dim",
    "has_qkv_bias",
    "has_o_bias",
    "mlp_bias",
    "qk_norm",
    *ARCHITECTURE_KEYS,
    "sliding_window",
    "layer_types",
    "nope_layers",
    "layer_norm_epsilon",
    "rope_base",
    "rope_scaling",
    "use_dynamic_ntk_rope",
)
DYNAMIC = ("rope_scaling_factor", "max_position_embeddings")  # settings of dynamic NTK


@dataclass(frozen=True)
class ForeignTensor:
    """One of our tensors as a foreign folder holds it. Nothing is read before ``read``."""

    link: TensorLink
    folder: WeightFolder
    name_map: NameMap
    config: ModelConfig

    @property
    def shape(self) -> Coordinates:
        return self.link.native_shape

    @property
    def reads_boxes(self) -> bool:
        """Return whether a box costs no more than its bytes."""
        return self.folder.reads_boxes

    def read(self, box: Box | None = None) -> Tensor:
        """Read the tensor, or a box of it.

        Only the foreign rows and columns that hold its elements are read.
        """
        link = self.link
        whole = Box.whole(self.shape)
        if box is None:
            box = whole
        name = link.foreign[0]
        if link.of_heads:
            # A vector, whose elements may be in another order: read whole.
            value = self._convert([self.folder.read(name)])
            return value[box.within(whole)]
        if not link.fused:
            moved = _moved_down(box, link.first_rows[0])
            return self.folder.read(name, moved)
        return self._read_fused(box)

    def _convert(self, values: Sequence[Tensor]) -> Tensor:
        return foreign_to_native(self.link, values, self.config, self.name_map)

    def _read_fused(self, box: Box) -> Tensor:
        """Read a box of wqkv, whose rows are those of q, k and v in another order."""
        # Number the rows of the foreign matrices one after another, and convert the
        # numbers like a tensor: the result tells which foreign row each of our rows is.
        # Two heads of one row each, in q, k and v: numbers 0 1, 2 3, 4 5 become
        # 0 2 4 1 3 5, so a rank with the first three rows reads one row of each matrix.
        link = self.link
        row_counts = [shape[0] for shape in link.shapes]
        all_numbers = torch.arange(self.shape[0])
        numbers = torch.split(all_numbers, row_counts)
        sources = self._convert(numbers)
        first_row = box.offsets[0]
        end_row = first_row + box.shape[0]
        wanted = sources[first_row:end_row]

        parts = []
        first = 0  # number of the first row of a matrix
        for part, name in enumerate(link.foreign):
            after_last = first + row_counts[part]
            in_this = (wanted >= first) & (wanted < after_last)
            if bool(in_this.any()):
                rows = wanted[in_this] - first + link.first_rows[part]
                values = self._read_rows(name, rows, box)
                parts.append((in_this, values))
            first = after_last
        _, any_values = parts[0]
        value = any_values.new_empty(box.shape)
        for in_this, values in parts:
            value[in_this] = values
        return value

    def _read_rows(self, name: str, rows: Tensor, box: Box) -> Tensor:
        """Read some rows of a foreign matrix, only the columns of ``box``.

        One read spans all rows.
        """
        first = int(rows.min())
        num_rows = int(rows.max()) - first + 1
        offsets = (first, *box.offsets[1:])
        span = Box(offsets, (num_rows, *box.shape[1:]))
        values = self.folder.read(name, span)
        return values[rows - first]


def _moved_down(box: Box, rows: int) -> Box:
    """Return the box of a part that begins so many rows down in the tensor that holds it."""
    if not rows:
        return box
    return Box((box.offsets[0] + rows, *box.offsets[1:]), box.shape)


def load_huggingface(
    path: str, model: dict[str, Any]
) -> Iterator[tuple[str, ForeignTensor]]:
    """Yield the tensors of a Hugging Face folder (InternLM, InternLM2 or Llama naming) under our names.

    Args:
        model: the model section of the run.
    Raises:
        CheckpointError: not such a folder, or of another model: every difference is named.
    """
    folder = open_folder(path)
    config = ModelConfig.model_validate(model, strict=False)
    described = describe_folder(folder)
    compare_models(config, described.model, folder.path)
    if config.tie_word_embeddings and not described.tied:
        raise CheckpointError(
            "the folder has a head beside the embedding, and the run has model.tie_word_embeddings=True",
            where=folder.path,
            fix="remove model.tie_word_embeddings",
            code="EVO-HF-012",
        )
    if described.tied and not config.tie_word_embeddings:
        logger.warning("%s: %s", folder.path, UNTIED)
    yield from foreign_tensors(folder, described.naming, config, described.tied)


def load_llama(path: str, model: dict[str, Any]) -> Iterator[tuple[str, ForeignTensor]]:
    """Yield like ``load_huggingface`` the tensors of Meta's ``consolidated.*.pth``, which must be on a local disk.

    A Hugging Face folder is read as such.
    """
    folder = _meta_folder(path)
    if folder is None:
        yield from load_huggingface(path, model)
        return
    config = ModelConfig.model_validate(model, strict=False)
    if (folder / "params.json").is_file():
        _refuse_other_heads(folder, config)
    weights = MetaFolder(folder)
    if config.tie_word_embeddings:
        refuse_another_head(weights, META)
    yield from foreign_tensors(weights, META, config)


def _meta_folder(path: str) -> Path | None:
    """Return the local folder of Meta's files, None for another one."""
    scheme, _ = split_url(path)
    if scheme != "local":
        return None
    folder = local_folder(path)
    has_files = any(folder.glob("consolidated.*.pth"))
    return folder if has_files else None


def _refuse_other_heads(folder: Path, config: ModelConfig) -> None:
    """Refuse Meta's weights with other numbers of heads than the run's.

    No shape shows them: 32 heads of 128 and 64 of 64 have the same matrices.

    Raises:
        CheckpointError: with both numbers.
    """
    params = read_json(LocalStorage(), str(folder), "params.json")
    own_heads = config.num_attention_heads
    heads = params.get("n_heads", own_heads)
    kv_heads = params.get("n_kv_heads") or heads
    differing = []
    if heads != own_heads:
        differing.append(f"n_heads={heads}, the run's is {own_heads}")
    if kv_heads != config.kv_heads:
        differing.append(f"n_kv_heads={kv_heads}, the run's is {config.kv_heads}")
    if differing:
        found = "; ".join(differing)
        where = str(folder / "params.json")
        raise CheckpointError(found, where=where, code="EVO-HF-012")


def compare_models(run: ModelConfig, folder: ModelConfig, where: str) -> None:
    """Compare the settings of the run with those of the folder.

    Raises:
        CheckpointError: they differ; each with both values.
    """
    keys = list(COMPARED)
    # A run may normalize a head that the folder does not: rows of an export are
    # normalized already.
    if folder.norm_head:
        keys.append("norm_head")
    if run.use_dynamic_ntk_rope and folder.use_dynamic_ntk_rope:
        keys += DYNAMIC
    differing = [
        f"{key}={getattr(folder, key)}, the run's is {getattr(run, key)}"
        for key in keys
        if getattr(folder, key) != getattr(run, key)
    ]
    if differing:
        raise CheckpointError(
            f"the folder contains a different model: {'; '.join(differing)}",
            where=where,
            fix='change the model section, or take the folder\'s: model=dict(from_hf="FOLDER")',
            code="EVO-HF-012",
        )


def foreign_tensors(
    folder: WeightFolder, name_map: NameMap, config: ModelConfig, tied: bool = False
) -> Iterator[tuple[str, ForeignTensor]]:
    """Yield (our name, tensor) for all tensors of the model, after ``match_tensors``."""
    for link in match_tensors(folder, name_map, config, tied):
        yield link.native, ForeignTensor(link, folder, name_map, config)
