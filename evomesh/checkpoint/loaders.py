"""Loaders of foreign weights by ``ckpt_type``: a registry to which users add custom ones.

A loader takes the path from the config and the run's model section. It yields tensors
under the global names of evomesh, in memory or lazy; ``fill`` copies what this rank
holds of each and refuses names of no parameter.

    from evomesh import register_loader

    @register_loader("numpy")
    def load_numpy(path: str, model: dict[str, object]) -> Iterator[tuple[str, Tensor]]:
        for file in Path(path).glob("*.npy"):
            yield file.stem, torch.from_numpy(numpy.load(file))
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from evomesh.checkpoint.deepspeed.load import load_xtuner, load_xtuner_state
from evomesh.checkpoint.hub_cache import local_folder
from evomesh.checkpoint.huggingface.load import load_huggingface, load_llama
from evomesh.checkpoint.internevo.model import (
    HeadCounts,
    read_model,
    read_model_section,
)
from evomesh.checkpoint.internevo.optimizer import read_counters, read_optimizer
from evomesh.checkpoint.lazy_replicas import (
    LazyRead,
    LazyTensor,
    copy_checked,
    read_alone,
    read_together,
)
from evomesh.checkpoint.native.agreement import run_on_all_ranks
from evomesh.checkpoint.native.boxes import Box
from evomesh.checkpoint.native.plan import LocalTensor
from evomesh.checkpoint.native.read import (
    refuse_differing,
    refuse_missing,
    refuse_unwanted,
)
from evomesh.parallel.exchange import Exchange

Loader = Callable[[str, dict[str, Any]], Iterator[tuple[str, Tensor | LazyTensor]]]


class LoaderRegistry:
    """Loaders by ``ckpt_type``."""

    def __init__(self, loaders: dict[str, Loader]) -> None:
        self._loaders = loaders

    def register(self, name: str) -> Callable[[Loader], Loader]:
        """Return a decorator that adds a loader under the ``ckpt_type`` ``name``."""

        def add(loader: Loader) -> Loader:
            self._loaders[name.lower()] = loader
            return loader

        return add

    def get(self, name: str) -> Loader | None:
        return self._loaders.get(name.lower())

    def names(self) -> list[str]:
        return sorted(self._loaders)


def load_internevo(path: str, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of InternEvo's model files; the heads are those of model_config.pt, else of the run.

    Raises:
        CheckpointError: files are missing or broken, or their shapes do not tell w2 from w3.
    """
    folder = str(local_folder(path))
    return read_model(folder, _head_counts(folder, config))


def load_foreign_state(
    kind: str, path: str, config: dict[str, Any], optimizer: bool, counters: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what a foreign run holds beside its weights: see ``load_internevo_state``; of XTuner's the counters.

    Args:
        kind: "internevo" or "xtuner".
    """
    if kind == "xtuner":
        return {}, load_xtuner_state(path) if counters else {}
    return load_internevo_state(path, config, optimizer, counters)


def load_internevo_state(
    path: str, config: dict[str, Any], optimizer: bool, counters: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what else InternEvo's folder holds: whole optimizer tensors under evomesh's names, and the state.

    Args:
        config: the run's model section, as ``load_internevo`` takes it.
        optimizer: read the optimizer's files.
        counters: read counters, schedule and data position.
    Raises:
        CheckpointError: a wanted file is missing, or its content cannot be proved to mean what evomesh's does.
    """
    folder = str(local_folder(path))
    tensors: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    if optimizer:
        heads = _head_counts(folder, config)
        tensors, state = read_optimizer(folder, heads)
    if counters:
        state |= read_counters(folder)
    return tensors, state


def _head_counts(folder: str, config: dict[str, Any]) -> HeadCounts:
    known = {**config, **(read_model_section(folder) or {})}
    heads = int(known["num_attention_heads"])
    return HeadCounts(heads, int(known.get("num_kv_attention_heads") or heads))


checkpoint_loaders = LoaderRegistry(
    {
        "internevo": load_internevo,
        "hf": load_huggingface,
        "hf_llama": load_huggingface,
        "hf_model": load_huggingface,
        "llama": load_llama,
        "xtuner": load_xtuner,
    }
)


def register_loader(name: str) -> Callable[[Loader], Loader]:
    """Return a decorator that makes ``ckpt_type=name`` load checkpoints with the decorated function."""
    return checkpoint_loaders.register(name)


def fill(
    local: Mapping[str, LocalTensor],
    source: Iterable[tuple[str, Tensor | LazyTensor]],
    where: str,
    elsewhere: Collection[str] = (),
) -> None:
    """Copy the parts that this rank holds, cast to their dtype; of a lazy tensor nothing else is read.

    Args:
        where: the folder, for errors.
        elsewhere: names that other ranks want, those of other pipeline stages; this rank ignores them.

    Raises:
        CheckpointError: wanted tensors are missing, some are wanted by no rank, or shapes differ (all are named); or
            NaN or infinity in the first tensor that has any.
    """
    for read in fill_from_memory(local, source, where, elsewhere):
        read_alone(read, where)


def fill_on_all_ranks(
    local: Mapping[str, LocalTensor],
    source: Callable[[], Iterable[tuple[str, Tensor | LazyTensor]]],
    where: str,
    elsewhere: Collection[str],
    exchange: Exchange,
) -> None:
    """Do on every rank what ``fill`` does; ranks that want the same of a file read it once, together.

    Raises:
        CheckpointError: that of the first rank that has one, on every rank.
    """
    reads = run_on_all_ranks(
        exchange, lambda: fill_from_memory(local, source(), where, elsewhere)
    )
    run_on_all_ranks(exchange, lambda: read_together(reads, where, exchange))


def fill_from_memory(
    local: Mapping[str, LocalTensor],
    source: Iterable[tuple[str, Tensor | LazyTensor]],
    where: str,
    elsewhere: Collection[str] = (),
) -> list[LazyRead]:
    """Do what ``fill`` does with tensors in memory, and return those that are still to be read."""
    missing = set(local)
    unknown: list[str] = []
    differing: list[str] = []
    unread: list[LazyRead] = []
    for name, tensor in source:
        wanted = local.get(name)
        if wanted is None:
            unknown.append(name)
            continue
        missing.discard(name)
        if tuple(tensor.shape) != wanted.shape:
            shapes = f"the checkpoint has {list(tensor.shape)}, the model wants {list(wanted.shape)}"
            differing.append(f"{name}: {shapes}")
        elif not isinstance(tensor, Tensor):
            unread.append(LazyRead(wanted, tensor))
        elif not differing:
            _copy(wanted, tensor, where)
    refuse_differing(differing, where)
    refuse_missing(sorted(missing), unknown, where)
    refuse_unwanted(unknown, elsewhere, where)
    return unread


def _copy(wanted: LocalTensor, tensor: Tensor, where: str) -> None:
    """Copy this rank's parts of a tensor, and check that they are finite."""
    whole = Box.whole(tuple(tensor.shape))
    for part in wanted.parts:
        copy_checked(wanted.name, part, tensor[part.box.within(whole)], where)
