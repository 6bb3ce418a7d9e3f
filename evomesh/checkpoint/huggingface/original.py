"""Remember which Hugging Face folder a checkpoint was imported from, and find it again.

Only an unchanged folder is found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomesh.checkpoint.huggingface.folder import HfFolder
from evomesh.storage.base import join
from evomesh.storage.local import LocalStorage

KEY = "imported_from"  # of the state of a checkpoint that ``convert from-hf`` wrote


@dataclass(frozen=True)
class Original:
    """The folder that a checkpoint was imported from.

    Attributes:
        dtype: what the import rounded the weights to.
    """

    path: Path
    dtype: str


def describe_original(folder: HfFolder, dtype: str) -> dict[str, Any]:
    """Return the state of a checkpoint that is imported from a folder; {} if that is in a store."""
    if not isinstance(folder.storage, LocalStorage):
        return {}
    path = str(Path(folder.path).resolve())
    record = {"folder": path, "dtype": dtype, "fingerprint": _fingerprint(folder)}
    return {KEY: record}


def find_original(state: Mapping[str, Any]) -> Original | None:
    """Return the folder that a checkpoint with this state was imported from.

    None unless it is still as it was.
    """
    record = state.get(KEY)
    if not isinstance(record, Mapping):
        return None
    path = Path(str(record.get("folder")))
    config = path / "config.json"
    if not config.is_file():
        return None
    folder = HfFolder(LocalStorage(), str(path))
    if _fingerprint(folder) != record.get("fingerprint"):
        return None
    dtype = str(record.get("dtype"))
    if dtype == "tf32":
        dtype = "float32"
    return Original(path, dtype)


def _fingerprint(folder: HfFolder) -> str:
    """Return a hash of config.json and of the names, sizes and times of the weight files."""
    # Not of their bytes: reading 140 GB to find out whether to compare would take longer
    # than the comparison.
    config = folder.storage.read(join(folder.path, "config.json"))
    digest = hashlib.sha256(config)
    for name in sorted(set(folder.files.values())):
        status = Path(folder.path, name).stat()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
