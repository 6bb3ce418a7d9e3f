"""Readers of foreign weights, by ``ckpt_type``: a table that users add to.

A loader takes the path from the config and the run's model section, and yields tensors under our global names, whole
ones or such as read a part when asked; ``fill`` copies what this rank holds of each, and refuses names of no parameter.

    from evomesh.checkpoint.loaders import checkpoint_loaders

    @checkpoint_loaders.register("numpy")
    def load_numpy(path: str, model: dict[str, object]) -> Iterator[tuple[str, Tensor]]:
        for file in Path(path).glob("*.npy"):
            yield file.stem, torch.from_numpy(numpy.load(file))
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from evomesh.checkpoint.hub_cache import local_folder
from evomesh.checkpoint.huggingface.load import load_hf, load_llama
from evomesh.checkpoint.internevo.model import HeadCounts, read_model, read_model_section
from evomesh.checkpoint.internevo.optimizer import read_counters, read_optimizer
from evomesh.checkpoint.native.boxes import Box, Coordinates
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.plan import LocalTensor
from evomesh.checkpoint.native.read import listed, several


class LazyTensor(Protocol):
    """A tensor that is still on disk."""

    @property
    def shape(self) -> Coordinates: ...

    def read(self, box: Box | None = None) -> Tensor:
        """The tensor, or a box of it."""
        ...


Loader = Callable[[str, dict[str, Any]], Iterator[tuple[str, Tensor | LazyTensor]]]


class LoaderRegistry:
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
    folder = str(local_folder(path))
    return read_model(folder, _head_counts(folder, config))


def load_internevo_state(
    path: str, config: dict[str, Any], optimizer: bool, counters: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What else InternEvo's folder holds: whole optimizer tensors under our names, and the state beside them.

    Args:
        config: the run's model section, as ``load_internevo`` takes it.
        optimizer: read the optimizer's files.
        counters: read counters, schedule and data position.
    Raises:
        CheckpointError: a wanted file is missing, or what it holds cannot be proved to mean what ours does.
    """
    folder = str(local_folder(path))
    tensors: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    if optimizer:
        tensors, state = read_optimizer(folder, _head_counts(folder, config))
    if counters:
        state |= read_counters(folder)
    return tensors, state


def _head_counts(folder: str, config: dict[str, Any]) -> HeadCounts:
    known = {**config, **(read_model_section(folder) or {})}
    heads = int(known["num_attention_heads"])
    return HeadCounts(heads, int(known.get("num_kv_attention_heads") or heads))


checkpoint_loaders = LoaderRegistry(
    {"internevo": load_internevo, "hf": load_hf, "hf_llama": load_hf, "llama": load_llama}
)


def fill(
    local: Mapping[str, LocalTensor],
    source: Iterable[tuple[str, Tensor | LazyTensor]],
    where: str,
    elsewhere: Collection[str] = (),
) -> None:
    """Copies the parts this rank holds, casting to their dtype; of lazy tensors it reads no more.

    Args:
        elsewhere: names that other ranks hold, a pipeline's other stages; this rank leaves them alone.
    Raises:
        CheckpointError: wanted tensors did not come, some came that no rank wants, or shapes differ; all are named.
    """
    missing, unknown, differing = set(local), [], []
    for name, tensor in source:
        wanted = local.get(name)
        if wanted is None:
            unknown += [] if name in elsewhere else [name]
            continue
        missing.discard(name)
        if tuple(tensor.shape) != wanted.shape:
            differing.append(
                f"{name}: the checkpoint has {list(tensor.shape)}, the model wants {list(wanted.shape)}"
            )
        elif not differing:
            _copy(wanted, tensor)
    if differing:
        raise CheckpointError(several(differing), where=where)
    if missing:
        raise CheckpointError(f"the checkpoint has no {listed(sorted(missing))}", where=where)
    if unknown:
        raise CheckpointError(
            f"the checkpoint holds {listed(sorted(unknown))} that this run has no place for",
            where=where,
            fix="use the model section of the run that wrote it",
        )


def _copy(wanted: LocalTensor, tensor: Tensor | LazyTensor) -> None:
    whole = Box((0,) * len(wanted.shape), wanted.shape)
    with torch.no_grad():
        for part in wanted.parts:
            part.tensor.copy_(
                tensor[part.box.within(whole)] if isinstance(tensor, Tensor) else tensor.read(part.box)
            )
