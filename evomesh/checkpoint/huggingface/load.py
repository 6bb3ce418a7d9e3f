"""Weights of a foreign folder under our names, checked before the first is read.

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
from evomesh.checkpoint.huggingface.config import read_config
from evomesh.checkpoint.huggingface.folder import (
    MetaFolder,
    WeightFolder,
    open_folder,
    read_json,
)
from evomesh.checkpoint.huggingface.names import META, NAMINGS, NameMap, TensorLink, links, to_ours
from evomesh.checkpoint.native.boxes import Box, Coordinates
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.config.schema import ModelConfig
from evomesh.storage.base import join
from evomesh.storage.local import LocalStorage
from evomesh.storage.urls import split_url

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForeignTensor:
    """One of our tensors as it lies in a foreign folder. Nothing is read before ``read``."""

    link: TensorLink
    folder: WeightFolder
    naming: NameMap
    config: ModelConfig

    @property
    def shape(self) -> Coordinates:
        return (sum(shape[0] for shape in self.link.shapes), *self.link.shapes[0][1:])

    def read(self, box: Box | None = None) -> Tensor:
        """The tensor, or a box of it: of their matrices only the rows and columns that hold its elements are read."""
        if not self.link.fused:
            return self.folder.read(self.link.theirs[0], box)
        box = box or Box.whole(self.shape)
        parts = []
        # The number of our row in their matrices, one after another: the same reordering, done to row numbers.
        places = torch.split(torch.arange(self.shape[0]), [shape[0] for shape in self.link.shapes])
        wanted = to_ours(self.link, places, self.config, self.naming)[
            box.offsets[0] : box.offsets[0] + box.shape[0]
        ]
        for name, place in zip(self.link.theirs, places, strict=True):
            here = (wanted >= place[0]) & (wanted <= place[-1])
            if bool(here.any()):
                rows = wanted[here] - place[0]
                first, last = int(rows.min()), int(rows.max())
                read = Box((first, *box.offsets[1:]), (last - first + 1, *box.shape[1:]))
                parts.append((here, self.folder.read(name, read)[rows - first]))
        value = parts[0][1].new_empty(box.shape)
        for here, rows in parts:
            value[here] = rows
        return value


def load_hf(path: str, model: dict[str, Any]) -> Iterator[tuple[str, ForeignTensor]]:
    """Tensors of a Hugging Face folder (InternLM, InternLM2 or Llama naming) under our names.

    Args:
        model: the model section of the run.
    Raises:
        CheckpointError: not such a folder, or of another model: every difference is named.
    """
    folder = open_folder(path)
    config = ModelConfig.model_validate(model, strict=False)
    record = folder.json("config.json")
    theirs = read_config(record, join(folder.path, "config.json"))
    compare_models(config, theirs, folder.path)
    yield from tensors(
        folder, NAMINGS[record["model_type"]], config, tied=bool(record.get("tie_word_embeddings"))
    )


def load_llama(path: str, model: dict[str, Any]) -> Iterator[tuple[str, ForeignTensor]]:
    """As ``load_hf``, from Meta's ``consolidated.*.pth`` on a local disk; a Hugging Face folder is read as such."""
    folder = local_folder(path) if split_url(path)[0] == "local" else None
    if folder is None or not any(folder.glob("consolidated.*.pth")):
        yield from load_hf(path, model)
        return
    config = ModelConfig.model_validate(model, strict=False)
    if (folder / "params.json").is_file():
        params = read_json(LocalStorage(), str(folder), "params.json")
        heads = params.get("n_heads", config.num_attention_heads), config.num_attention_heads
        kv_heads = params.get("n_kv_heads") or heads[0], config.kv_heads
        wrong = [
            f"{n}={a}, the run's is {b}"
            for n, (a, b) in (("n_heads", heads), ("n_kv_heads", kv_heads))
            if a != b
        ]
        if wrong:
            raise CheckpointError("; ".join(wrong), where=str(folder / "params.json"))
    yield from tensors(MetaFolder(folder), META, config)


def compare_models(ours: ModelConfig, theirs: ModelConfig, where: str) -> None:
    """Settings that change what the weights compute and that no shape shows.

    Raises:
        CheckpointError: head counts or biases differ. Other rotary bases and epsilons only warn.
    """
    strict = (
        "num_layers",
        "num_attention_heads",
        "kv_heads",
        "hidden_size",
        "vocab_size",
        "mlp_width",
        "no_bias",
    )
    wrong = [
        f"{key}={getattr(theirs, key)}, the run's is {getattr(ours, key)}"
        for key in strict
        if getattr(theirs, key) != getattr(ours, key)
    ]
    if wrong:
        raise CheckpointError(
            f"the folder's model is another one: {'; '.join(wrong)}",
            where=where,
            fix="change the model section",
        )
    for key in ("rope_base", "layer_norm_epsilon"):
        if getattr(ours, key) != getattr(theirs, key):
            logger.warning(
                "%s: %s was %s there, this run uses %s", where, key, getattr(theirs, key), getattr(ours, key)
            )


def tensors(
    folder: WeightFolder, naming: NameMap, config: ModelConfig, tied: bool = False
) -> Iterator[tuple[str, ForeignTensor]]:
    """(our name, where its tensor lies)."""
    for link in checked(folder, naming, config, tied):
        yield link.ours, ForeignTensor(link, folder, naming, config)


def checked(
    folder: WeightFolder, naming: NameMap, config: ModelConfig, tied: bool = False
) -> list[TensorLink]:
    """All links of the model, after comparing names and shapes with the folder's headers.

    Args:
        tied: the folder may leave the head out, which then is the embedding.
    Raises:
        CheckpointError: names every tensor that is missing, not wanted, or of another shape.
    """
    wanted = links(config, naming)
    shapes = folder.shapes
    head, embedding = naming.modules["head"][0] + ".weight", naming.modules["embedding"][0] + ".weight"
    if tied and head not in shapes:
        wanted = [
            TensorLink(link.ours, (embedding,), link.shapes) if link.ours == "head.weight" else link
            for link in wanted
        ]
    expected = {name: shape for link in wanted for name, shape in zip(link.theirs, link.shapes, strict=True)}
    missing = [f"{name} {list(expected[name])}" for name in expected if name not in shapes]
    extra = [f"{name} {list(shapes[name])}" for name in sorted(shapes) if name not in expected]
    wrong = [
        f"{name} is {list(shapes[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = [
        f"{words} ({len(names)}): {'; '.join(names)}"
        for words, names in (("missing", missing), ("of another shape", wrong), ("unknown", extra))
        if names
    ]
    if problems:
        raise CheckpointError(
            "the tensors are not those of this model:\n  " + "\n  ".join(problems),
            where=folder.path,
            fix="compare the model section with the folder's config.json",
        )
    return wanted
