"""Readers of foreign weights, by ``ckpt_type``: a table that users add to.

A loader takes the path from the config and the run's model section, and yields tensors under our global names, whole
ones or such as read a part when asked; ``fill`` copies what this rank holds of each.

    from evomesh.checkpoint.loaders import checkpoint_loaders

    @checkpoint_loaders.register("numpy")
    def load_numpy(path: str, model: dict[str, object]) -> Iterator[tuple[str, Tensor]]:
        for file in Path(path).glob("*.npy"):
            yield file.stem, torch.from_numpy(numpy.load(file))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from evomesh.checkpoint import internevo
from evomesh.checkpoint.boxes import Box, Ints
from evomesh.checkpoint.format import CheckpointError
from evomesh.checkpoint.hf_load import load_hf, load_llama
from evomesh.checkpoint.plan import Local


class Lazy(Protocol):
    """A tensor that is still on disk."""

    @property
    def shape(self) -> Ints: ...

    def read(self, box: Box | None = None) -> Tensor:
        """The tensor, or a box of it."""
        ...


Loader = Callable[[str, dict[str, Any]], Iterator[tuple[str, Tensor | Lazy]]]


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
    """InternEvo's model files; the heads are those of model_config.pt, else of the run.

    Raises:
        CheckpointError: files are missing or broken, or their shapes do not tell w2 from w3.
    """
    section = internevo.model_section(path) or {}
    known = {**config, **section}
    heads = int(known["num_attention_heads"])
    return internevo.read_model(path, internevo.Heads(heads, int(known.get("num_kv_attention_heads") or heads)))


checkpoint_loaders = LoaderTable({"internevo": load_internevo, "hf": load_hf, "hf_llama": load_hf, "llama": load_llama})


def fill(local: Mapping[str, Local], source: Iterator[tuple[str, Tensor | Lazy]], where: str) -> None:
    """Copies the parts this rank holds, casting to their dtype; of lazy tensors it reads no more.

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
        whole = Box((0,) * len(wanted.shape), wanted.shape)
        with torch.no_grad():
            for part in wanted.parts:
                if isinstance(tensor, Tensor):
                    part.tensor.copy_(tensor[part.box.within(whole)])
                else:
                    part.tensor.copy_(tensor.read(part.box))
    if missing:
        first = sorted(missing)
        raise CheckpointError(
            f"the checkpoint has no {', '.join(map(repr, first[:4]))} ({len(first)} names)", where=where
        )
