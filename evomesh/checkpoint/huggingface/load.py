"""Load the weights of a foreign folder under our names, checked before the first tensor is read.

These are the loaders of ``ckpt_type`` "hf", "hf_llama" and "llama".
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
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

    def read(self, box: Box | None = None) -> Tensor:
        """Read the tensor, or a box of it: only the foreign rows and columns that hold its elements are read."""
        if self.link.of_heads:
            whole = foreign_to_native(
                self.link,
                [self.folder.read(self.link.foreign[0])],
                self.config,
                self.name_map,
            )
            return whole if box is None else whole[box.within(Box.whole(self.shape))]
        box = box or Box.whole(self.shape)
        if not self.link.fused:
            name, first_row = self.link.foreign[0], self.link.first_rows[0]
            return self.folder.read(name, _moved_down(box, first_row))
        first_row = box.offsets[0]
        # Number the rows of the foreign matrices one after another, and convert the
        # numbers like a tensor: the result tells which foreign row each of our rows is.
        row_counts = [shape[0] for shape in self.link.shapes]
        numbers = torch.split(torch.arange(self.shape[0]), row_counts)
        sources = foreign_to_native(self.link, numbers, self.config, self.name_map)
        wanted = sources[first_row : first_row + box.shape[0]]
        parts = []
        for name, numbered, part_row in zip(
            self.link.foreign, numbers, self.link.first_rows, strict=True
        ):
            first, last = numbered[0], numbered[-1]
            in_this = (wanted >= first) & (wanted <= last)
            if bool(in_this.any()):
                rows = wanted[in_this] - first + part_row
                values = self._read_rows(name, rows, box)
                parts.append((in_this, values))
        value = parts[0][1].new_empty(box.shape)
        for in_this, values in parts:
            value[in_this] = values
        return value

    def _read_rows(self, name: str, rows: Tensor, box: Box) -> Tensor:
        """Read some rows of a foreign matrix, only the columns of ``box``, in one read that spans the rows."""
        first, last = int(rows.min()), int(rows.max())
        span = Box((first, *box.offsets[1:]), (last - first + 1, *box.shape[1:]))
        return self.folder.read(name, span)[rows - first]


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
        )
    if described.tied and not config.tie_word_embeddings:
        logger.warning("%s: %s", folder.path, UNTIED)
    yield from foreign_tensors(folder, described.naming, config, described.tied)


def load_llama(path: str, model: dict[str, Any]) -> Iterator[tuple[str, ForeignTensor]]:
    """Yield like ``load_huggingface`` the tensors of Meta's ``consolidated.*.pth``, which must be on a local disk.

    A Hugging Face folder is read as such.
    """
    folder = local_folder(path) if split_url(path)[0] == "local" else None
    if folder is None or not any(folder.glob("consolidated.*.pth")):
        yield from load_huggingface(path, model)
        return
    config = ModelConfig.model_validate(model, strict=False)
    if (folder / "params.json").is_file():
        params = read_json(LocalStorage(), str(folder), "params.json")
        heads = params.get("n_heads", config.num_attention_heads)
        kv_heads = params.get("n_kv_heads") or heads
        differing = []
        if heads != config.num_attention_heads:
            differing.append(
                f"n_heads={heads}, the run's is {config.num_attention_heads}"
            )
        if kv_heads != config.kv_heads:
            differing.append(f"n_kv_heads={kv_heads}, the run's is {config.kv_heads}")
        if differing:
            raise CheckpointError(
                "; ".join(differing), where=str(folder / "params.json")
            )
    weights = MetaFolder(folder)
    if config.tie_word_embeddings:
        refuse_another_head(weights, META)
    yield from foreign_tensors(weights, META, config)


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
        )


def foreign_tensors(
    folder: WeightFolder, name_map: NameMap, config: ModelConfig, tied: bool = False
) -> Iterator[tuple[str, ForeignTensor]]:
    """Yield (our name, tensor) for all tensors of the model, after ``match_tensors``."""
    for link in match_tensors(folder, name_map, config, tied):
        yield link.native, ForeignTensor(link, folder, name_map, config)
