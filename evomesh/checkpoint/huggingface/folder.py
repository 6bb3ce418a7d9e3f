"""Folders of other systems: where they lie, and which file holds which tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from evomesh.checkpoint.hub_cache import local_folder
from evomesh.checkpoint.huggingface.files import PickleFile, SafetensorsFile, WeightFile, load_pickle
from evomesh.checkpoint.native.boxes import Box, Coordinates
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.storage.base import Storage, join
from evomesh.storage.local import LocalStorage
from evomesh.storage.urls import open_storage, split_url

BUFFERS = ("rotary_emb.inv_freq", "rope.freqs")  # recomputed from the config wherever they turn up
ROW_CUT = (
    ".wo.weight",
    ".w2.weight",
)  # of Meta's files; all other matrices but the embedding are cut by rows


class WeightFolder(Protocol):
    """Attributes:
    path: the folder.
    shapes: every tensor, read from the headers alone.
    """

    path: str

    @property
    def shapes(self) -> dict[str, Coordinates]: ...

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """One tensor, or only a box of it, in the dtype it is stored in."""
        ...


def open_folder(url: str) -> HfFolder:
    """The folder at a path, in a store, or in the hub's local cache under that id.

    Raises:
        CheckpointError: none of them.
    """
    if split_url(url)[0] == "local":
        return HfFolder(LocalStorage(), str(local_folder(url)))
    storage, path = open_storage(url)
    if not storage.list(path):
        raise CheckpointError("no such folder", where=url, expected="a Hugging Face model folder")
    return HfFolder(storage, path)


def read_json(storage: Storage, folder: str, name: str) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: absent, or no JSON object.
    """
    path = join(folder, name)
    try:
        record = json.loads(storage.read(path))
    except FileNotFoundError:
        near = ", ".join(storage.list(folder)[:8]) or "nothing"
        raise CheckpointError(f"no {name} (the folder holds: {near})", where=folder) from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"not JSON ({error})", where=path) from None
    if not isinstance(record, dict):
        raise CheckpointError(f"a JSON {type(record).__name__}", where=path, expected="a JSON object")
    return record


class HfFolder:
    """``model.safetensors`` or ``pytorch_model.bin``, whole or in the shards that an index names, in any storage."""

    def __init__(self, storage: Storage, path: str) -> None:
        self.storage, self.path = storage, path
        self._open: dict[str, WeightFile] = {}

    def json(self, name: str) -> dict[str, Any]:
        return read_json(self.storage, self.path, name)

    @cached_property
    def files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        names = self.storage.list(self.path)
        for stem in ("model.safetensors", "pytorch_model.bin"):
            if f"{stem}.index.json" in names:
                return self._indexed(f"{stem}.index.json", names)
            if stem in names:
                return dict.fromkeys(self._names(stem), stem)
        raise CheckpointError(
            f"no weights (the folder holds: {', '.join(names[:8]) or 'nothing'})",
            where=self.path,
            expected="model.safetensors, pytorch_model.bin, or shards with an index",
        )

    def _indexed(self, index: str, names: list[str]) -> dict[str, str]:
        files, where = self.json(index).get("weight_map"), join(self.path, index)
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise CheckpointError("no weight_map", where=where, expected="tensor names with their files")
        for file in sorted(set(files.values())):
            if file not in names:
                raise CheckpointError(f"names the shard {file!r}, which is not in the folder", where=where)
            absent = sorted({name for name, at in files.items() if at == file} - set(self._names(file)))
            if absent:
                raise CheckpointError(f"says {file} holds {absent[0]!r}; it does not", where=where)
        return {name: file for name, file in files.items() if not name.endswith(BUFFERS)}

    @cached_property
    def shapes(self) -> dict[str, Coordinates]:
        return {name: self._file(file).shapes[name] for name, file in self.files.items()}

    def read(self, name: str, box: Box | None = None) -> Tensor:
        return self._file(self.files[name]).read(name, box or Box.whole(self.shapes[name]))

    def _names(self, file: str) -> list[str]:
        return [name for name in self._file(file).shapes if not name.endswith(BUFFERS)]

    def _file(self, file: str) -> WeightFile:
        if file not in self._open:
            kind = SafetensorsFile if file.endswith(".safetensors") else PickleFile
            self._open[file] = kind(self.storage, join(self.path, file))
        return self._open[file]


class MetaFolder:
    """``consolidated.00.pth`` ...: one file a tensor-parallel rank, put together again tensor by tensor."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        files = sorted(path.glob("consolidated.*.pth"))
        if not files:
            raise CheckpointError("no consolidated.*.pth", where=self.path)
        numbers = [int(file.name.split(".")[1]) for file in files]
        if numbers != list(range(len(files))):
            raise CheckpointError(f"files {numbers}: one is missing", where=self.path, expected="00, 01, ...")
        self._parts = [load_pickle(file, str(file)) for file in files]
        self._hidden = self._parts[0]["norm.weight"].numel() if "norm.weight" in self._parts[0] else 0
        for file, part in zip(files, self._parts, strict=True):
            if set(part) != set(self._parts[0]):
                raise CheckpointError("holds other tensors than consolidated.00.pth", where=str(file))

    @cached_property
    def shapes(self) -> dict[str, Coordinates]:
        return {name: tuple(self._shape(name)) for name in self._parts[0] if not name.endswith(BUFFERS)}

    def _dim(self, name: str) -> int | None:
        first = self._parts[0][name]
        if first.dim() < 2 or len(self._parts) == 1:
            return None
        if name == "tok_embeddings.weight":  # Llama 1 and 2 cut its columns, Llama 3 its rows
            return 0 if first.shape[1] == self._hidden else 1
        return 1 if name.endswith(ROW_CUT) else 0

    def _shape(self, name: str) -> Iterator[int]:
        cut = self._dim(name)
        for dim, size in enumerate(self._parts[0][name].shape):
            yield sum(part[name].shape[dim] for part in self._parts) if dim == cut else size

    def read(self, name: str, box: Box | None = None) -> Tensor:
        dim = self._dim(name)
        value = self._parts[0][name] if dim is None else torch.cat([part[name] for part in self._parts], dim)
        return value if box is None else value[box.within(Box.whole(self.shapes[name]))]
