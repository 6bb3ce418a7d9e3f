"""Weights in a folder of another system, one tensor at a time: safetensors, or torch's pickles without running any."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evomesh.checkpoint.format import CheckpointError
from evomesh.storage.urls import split_url

BUFFERS = ("rotary_emb.inv_freq", "rope.freqs")  # recomputed from the config wherever they turn up
ROW_CUT = (".wo.weight", ".w2.weight")  # of Meta's files; all other matrices but the embedding are cut by rows


class WeightFolder(Protocol):
    """Attributes:
    path: the folder.
    shapes: every tensor, read from the headers alone.
    """

    path: Path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str) -> Tensor:
        """One whole tensor, in the dtype it is stored in."""
        ...


def local_folder(url: str) -> Path:
    """The local folder that a path names, or the one in which the hub's cache holds the model of that id.

    Raises:
        CheckpointError: neither, or a store that is not local.
    """
    scheme, place = split_url(url)
    if scheme != "local":
        raise CheckpointError(
            f"{url!r} is not on a local disk", expected="a local folder", fix="copy the model folder here first"
        )
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{place.replace('/', '--')}"
    main = cache / "refs" / "main"
    if main.is_file() and (cache / "snapshots" / main.read_text().strip()).is_dir():
        return cache / "snapshots" / main.read_text().strip()
    raise CheckpointError(
        f"{url!r} is neither a folder nor a model in the local Hugging Face cache ({cache.parent})",
        fix="give an existing folder, or download the model into the cache first",
    )


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: absent, or no JSON object.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = ", ".join(sorted(entry.name for entry in path.parent.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"no {path.name} (the folder holds: {near})", where=str(path.parent)) from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"not JSON ({error})", where=str(path)) from None
    if not isinstance(record, dict):
        raise CheckpointError(f"a JSON {type(record).__name__}", where=str(path), expected="a JSON object")
    return record


class HfFolder:
    """``model.safetensors`` or ``pytorch_model.bin``, whole or in the shards that an index names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[str, Any] = {}

    @cached_property
    def files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        for stem in ("model.safetensors", "pytorch_model.bin"):
            index = self.path / f"{stem}.index.json"
            if index.is_file():
                return self._indexed(index)
            if (self.path / stem).is_file():
                return dict.fromkeys(self._names(stem), stem)
        near = ", ".join(sorted(entry.name for entry in self.path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"no weights (the folder holds: {near})",
            where=str(self.path),
            expected="model.safetensors, pytorch_model.bin, or shards with an index",
        )

    def _indexed(self, index: Path) -> dict[str, str]:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise CheckpointError("no weight_map", where=str(index), expected="tensor names with their files")
        for file in sorted(set(files.values())):
            if Path(file).name != file or not (self.path / file).is_file():
                raise CheckpointError(f"names the shard {file!r}, which is not in the folder", where=str(index))
            absent = sorted({name for name, at in files.items() if at == file} - set(self._names(file)))
            if absent:
                raise CheckpointError(f"says {file} holds {absent[0]!r}; it does not", where=str(index))
        return {name: file for name, file in files.items() if not name.endswith(BUFFERS)}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._shape(name, file) for name, file in self.files.items()}

    def read(self, name: str) -> Tensor:
        file = self.files[name]
        source = self._source(file)
        tensor: Tensor = source.get_tensor(name) if file.endswith(".safetensors") else source[name]
        return tensor

    def _names(self, file: str) -> list[str]:
        return [name for name in self._source(file).keys() if not name.endswith(BUFFERS)]  # noqa: SIM118

    def _shape(self, name: str, file: str) -> tuple[int, ...]:
        source = self._source(file)
        return tuple(source.get_slice(name).get_shape() if file.endswith(".safetensors") else source[name].shape)

    def _source(self, file: str) -> Any:
        if file not in self._open:
            path = self.path / file
            if file.endswith(".safetensors"):
                try:
                    self._open[file] = safe_open(str(path), "pt")
                except (SafetensorError, OSError) as error:
                    raise CheckpointError(f"not a whole safetensors file ({error})", where=str(path)) from None
            else:
                self._open[file] = load_pickle(path)
        return self._open[file]


def load_pickle(path: Path) -> dict[str, Tensor]:
    """A state dict, left on disk until it is used; only tensors are unpickled, never code.

    Raises:
        CheckpointError: damaged, or it holds more than tensors.
    """
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: not a zip file
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"cannot be read as tensors alone ({reason})", where=str(path)) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError("holds more than named tensors", where=str(path), expected="a state dict")
    return state


class MetaFolder:
    """``consolidated.00.pth`` ...: one file a tensor-parallel rank, put together again tensor by tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = sorted(path.glob("consolidated.*.pth"))
        if not files:
            raise CheckpointError("no consolidated.*.pth", where=str(path))
        numbers = [int(file.name.split(".")[1]) for file in files]
        if numbers != list(range(len(files))):
            raise CheckpointError(f"files {numbers}: one is missing", where=str(path), expected="00, 01, ...")
        self._parts = [load_pickle(file) for file in files]
        self._hidden = self._parts[0]["norm.weight"].numel() if "norm.weight" in self._parts[0] else 0
        for file, part in zip(files, self._parts, strict=True):
            if set(part) != set(self._parts[0]):
                raise CheckpointError("holds other tensors than consolidated.00.pth", where=str(file))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
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

    def read(self, name: str) -> Tensor:
        dim = self._dim(name)
        return self._parts[0][name] if dim is None else torch.cat([part[name] for part in self._parts], dim)
