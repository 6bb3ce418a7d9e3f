"""Readers of foreign weights, by ``ckpt_type``: a table that users add to.

A loader takes the path from the config and the run's model section, and yields whole tensors under our global names;
``fill`` copies what this rank holds of each.

    from evomesh.checkpoint.loaders import checkpoint_loaders

    @checkpoint_loaders.register("numpy")
    def load_numpy(path: str, model: dict[str, object]) -> Iterator[tuple[str, Tensor]]:
        for file in Path(path).glob("*.npy"):
            yield file.stem, torch.from_numpy(numpy.load(file))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from evomesh.checkpoint import internevo
from evomesh.checkpoint.boxes import Box
from evomesh.checkpoint.format import CheckpointError
from evomesh.checkpoint.hf_load import load_hf, load_llama
from evomesh.checkpoint.plan import Local

Loader = Callable[[str, dict[str, Any]], Iterator[tuple[str, Tensor]]]


class LoaderTable:
    """Loaders by name."""

    def __init__(self, loaders: dict[str, Loader]) -> None:
        self._loaders = loaders

    def register(self, name: str) -> Callable[[Loader], Loader]:
        """Decorator: adds a loader under a ``ckpt_type`` of its own."""

        def add(loader: Loader) -> Loader:
            self._loaders[name.lower()] = loader
            return loader

        return add

    def get(self, name: str) -> Loader | None:
        return self._loaders.get(name.lower())

    def names(self) -> list[str]:
        return sorted(self._loaders)


def load_internevo(path: str, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """InternEvo's model files; the heads are taken from model_config.pt.

    Raises:
        CheckpointError: there is none.
    """
    section = internevo.model_section(path)
    if section is None or "num_attention_heads" not in section:
        raise CheckpointError(
            "no model_config.pt to tell the number of heads",
            where=path,
            fix=f"evomesh convert from-internevo {path} OUT --config CONFIG, and load OUT",
        )
    heads = int(section["num_attention_heads"])
    return internevo.read_model(path, internevo.Heads(heads, int(section.get("num_kv_attention_heads") or heads)))


checkpoint_loaders = LoaderTable({"internevo": load_internevo, "hf": load_hf, "hf_llama": load_hf, "llama": load_llama})


def fill(local: Mapping[str, Local], source: Iterator[tuple[str, Tensor]], where: str) -> None:
    """Copies whole tensors into the parts this rank holds, casting to their dtype.

    Raises:
        CheckpointError: a wanted tensor did not come, one came that nobody wants, or a shape differs.
    """
    missing = set(local)
    for name, tensor in source:
        wanted = local.get(name)
        if wanted is None:
            continue
        if tuple(tensor.shape) != wanted.shape:
            raise CheckpointError(
                f"{name}: the checkpoint has {list(tensor.shape)}, the model wants {list(wanted.shape)}", where=where
            )
        missing.discard(name)
        whole = Box((0,) * tensor.dim(), wanted.shape)
        with torch.no_grad():
            for part in wanted.parts:
                part.tensor.copy_(tensor[part.box.within(whole)])
    if missing:
        first = sorted(missing)
        raise CheckpointError(
            f"the checkpoint has no {', '.join(map(repr, first[:4]))} ({len(first)} names)", where=where
        )
