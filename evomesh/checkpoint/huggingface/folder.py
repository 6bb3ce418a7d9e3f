"""Read model folders of other systems: find out which file holds which tensor."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from evomesh.checkpoint.hub_cache import local_folder
from evomesh.checkpoint.huggingface.files import (
    PickleFile,
    SafetensorsFile,
    WeightFile,
    load_pickle,
)
from evomesh.checkpoint.native.boxes import Box, Coordinates
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.storage.base import Storage, join
from evomesh.storage.local import LocalStorage
from evomesh.storage.urls import open_storage, split_url

# Not parameters: ignored wherever they occur, since the config determines them.
BUFFERS = ("rotary_emb.inv_freq", "rope.freqs")
# Meta's files shard these matrices along dim 1, all others but the embedding along dim
# 0.
META_ROW_PARALLEL = (".wo.weight", ".w2.weight")


class WeightFolder(Protocol):
    """A folder of named tensors.

    Attributes:
        reads_boxes: whether a box of a tensor costs no more than its bytes.
    """

    path: str
    reads_boxes: bool

    @property
    def shapes(self) -> dict[str, Coordinates]:
        """Return the shapes of all tensors, read from the headers alone."""
        ...

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """Read one tensor, or only a box of it, in its stored dtype."""
        ...


def open_folder(url: str) -> HfFolder:
    """Open the folder at a path, in a store, or in the hub's local cache under the id ``url``.

    Raises:
        CheckpointError: there is none.
    """
    if split_url(url)[0] == "local":
        return HfFolder(LocalStorage(), str(local_folder(url)))
    storage, path = open_storage(url)
    if not storage.list(path):
        raise CheckpointError(
            "no such folder",
            where=url,
            expected="a Hugging Face model folder",
            code="EVO-HF-001",
        )
    return HfFolder(storage, path)


def read_json(storage: Storage, folder: str, name: str) -> dict[str, Any]:
    """Read the JSON object in the file ``name`` of a folder.

    Raises:
        CheckpointError: the file is absent, or not a JSON object.
    """
    path = join(folder, name)
    try:
        record = json.loads(storage.read(path))
    except FileNotFoundError:
        raise CheckpointError(
            f"no {name} (the folder holds: {_listed_files(storage.list(folder))})",
            where=folder,
            code="EVO-HF-001",
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"not JSON ({error})", where=path, code="EVO-HF-002"
        ) from None
    if not isinstance(record, dict):
        raise CheckpointError(
            f"a JSON {type(record).__name__}",
            where=path,
            expected="a JSON object",
            code="EVO-HF-011",
        )
    return record


def _listed_files(names: list[str]) -> str:
    return ", ".join(names[:8]) or "nothing"


class HfFolder:
    """A Hugging Face folder in any storage.

    It holds ``model.safetensors`` or ``pytorch_model.bin``, or shards with an index.
    """

    reads_boxes = True

    def __init__(self, storage: Storage, path: str) -> None:
        self.storage = storage
        self.path = path
        self._open_files: dict[str, WeightFile] = {}

    def json(self, name: str) -> dict[str, Any]:
        """Read the JSON object in one file of the folder."""
        return read_json(self.storage, self.path, name)

    @cached_property
    def files(self) -> dict[str, str]:
        """Return tensor name -> file name."""
        names = self.storage.list(self.path)
        for stem in ("model.safetensors", "pytorch_model.bin"):
            # As transformers does: a whole file comes before shards, which may be left
            # of an earlier save.
            if stem in names:
                return dict.fromkeys(self._tensor_names(stem), stem)
            index = f"{stem}.index.json"
            if index in names:
                return self._read_index(index, names)
        raise CheckpointError(
            f"no weights (the folder holds: {_listed_files(names)})",
            where=self.path,
            expected="model.safetensors, pytorch_model.bin, or shards with an index",
            code="EVO-HF-002",
        )

    def _read_index(self, index: str, names: list[str]) -> dict[str, str]:
        """Read tensor name -> file name from an index.

        The shards must agree with it.

        Args:
            names: of all files in the folder; no other file is opened, whatever path the
                index gives.
        """
        where = join(self.path, index)
        weight_map = self._weight_map(index)
        names_by_file: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            names_of_file = names_by_file.setdefault(file, set())
            names_of_file.add(name)

        lost = sorted(names_by_file.keys() - set(names))
        if lost:
            shards = "the shard" if len(lost) == 1 else f"{len(lost)} shards:"
            more = ", ..." if len(lost) > 8 else ""
            shown = ", ".join(map(repr, lost[:8])) + more
            raise CheckpointError(
                f"lists {shards} {shown}, which the folder does not have",
                where=where,
                expected="every file that the index names, in this folder",
                fix="copy or download the folder again",
                code="EVO-HF-002",
            )
        # A shard may hold more than the index lists, never less.
        for file, listed in sorted(names_by_file.items()):
            stored = self._tensor_names(file)
            absent = sorted(listed.difference(stored))
            if absent:
                raise CheckpointError(
                    f"lists {absent[0]!r} in {file}, which does not hold it",
                    where=where,
                    code="EVO-HF-002",
                )
        self._refuse_duplicates(sorted(names_by_file), where)
        without_buffers = {}
        for name, file in weight_map.items():
            if not name.endswith(BUFFERS):
                without_buffers[name] = file
        return without_buffers

    def _weight_map(self, index: str) -> dict[str, str]:
        weight_map: Any = self.json(index).get("weight_map")
        is_map = isinstance(weight_map, dict)
        if not is_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(
                "has no weight_map",
                where=join(self.path, index),
                expected="a file name for each tensor name",
                code="EVO-HF-002",
            )
        checked: dict[str, str] = weight_map
        return checked

    def _refuse_duplicates(self, files: list[str], where: str) -> None:
        """Refuse shards of which two hold one tensor: which of them a reader takes is chance."""
        holder: dict[str, str] = {}
        for file in files:
            for name in self._tensor_names(file):
                if name in holder:
                    raise CheckpointError(
                        f"{name!r} is in {holder[name]} and in {file}",
                        where=where,
                        expected="each tensor in one shard",
                        fix="save the folder again",
                        code="EVO-HF-002",
                    )
                holder[name] = file

    @cached_property
    def shapes(self) -> dict[str, Coordinates]:
        """Return the shapes of all tensors, read from the headers alone."""
        shapes = {}
        for name, file_name in self.files.items():
            file = self._file(file_name)
            shapes[name] = file.shapes[name]
        return shapes

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """Read one tensor, or only a box of it, in its stored dtype."""
        file = self._file(self.files[name])
        if box is None:
            box = Box.whole(self.shapes[name])
        return file.read(name, box)

    def _tensor_names(self, file: str) -> list[str]:
        return [name for name in self._file(file).shapes if not name.endswith(BUFFERS)]

    def _file(self, file: str) -> WeightFile:
        if file not in self._open_files:
            kind = SafetensorsFile if file.endswith(".safetensors") else PickleFile
            self._open_files[file] = kind(self.storage, join(self.path, file))
        return self._open_files[file]


class MetaFolder:
    """``consolidated.00.pth`` ...: one file per tensor-parallel rank, merged tensor by tensor."""

    reads_boxes = False

    def __init__(self, path: Path) -> None:
        self.path = str(path)

        # 1. One file per tensor-parallel rank, numbered without gaps.
        files = sorted(path.glob("consolidated.*.pth"))
        if not files:
            raise CheckpointError(
                "no consolidated.*.pth", where=self.path, code="EVO-HF-002"
            )
        numbers = [int(file.name.split(".")[1]) for file in files]
        expected_numbers = list(range(len(files)))
        if numbers != expected_numbers:
            raise CheckpointError(
                f"files {numbers}: one is missing",
                where=self.path,
                expected="00, 01, ...",
                code="EVO-HF-002",
            )

        # 2. All have tensors of the same names: each its shard, or a whole copy.
        self._ranks = [load_pickle(file, str(file)) for file in files]
        first = self._ranks[0]
        names = set(first)
        for file, state in zip(files, self._ranks, strict=True):
            if set(state) != names:
                raise CheckpointError(
                    "holds other tensors than consolidated.00.pth",
                    where=str(file),
                    code="EVO-HF-002",
                )
        norm = first.get("norm.weight")
        self._hidden_size = 0 if norm is None else norm.numel()

    @cached_property
    def shapes(self) -> dict[str, Coordinates]:
        """Return the shapes of all unsharded tensors."""
        shapes = {}
        for name in self._ranks[0]:
            if not name.endswith(BUFFERS):
                shapes[name] = self._unsharded_shape(name)
        return shapes

    def _shard_dim(self, name: str) -> int | None:
        """Return the dim along which a tensor is sharded, None when it is replicated."""
        first = self._ranks[0][name]
        if first.dim() < 2 or len(self._ranks) == 1:
            return None
        # Llama 1 and 2 shard its columns, Llama 3 its rows.
        if name == "tok_embeddings.weight":
            return 0 if first.shape[1] == self._hidden_size else 1
        return 1 if name.endswith(META_ROW_PARALLEL) else 0

    def _unsharded_shape(self, name: str) -> Coordinates:
        dim = self._shard_dim(name)
        shape = list(self._ranks[0][name].shape)
        if dim is not None:
            shape[dim] = sum(state[name].shape[dim] for state in self._ranks)
        return tuple(shape)

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """Read one tensor, or only a box of it, in its stored dtype."""
        value = self._merge(name)
        if box is None:
            return value
        whole = Box.whole(self.shapes[name])
        return value[box.within(whole)]

    def _merge(self, name: str) -> Tensor:
        shards = [state[name] for state in self._ranks]
        dim = self._shard_dim(name)
        return shards[0] if dim is None else torch.cat(shards, dim)
