"""Small datasets on disk, written by plain code that shares nothing with the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

WriteBin = Callable[..., Path]


@pytest.fixture
def write_bin(tmp_path: Path) -> WriteBin:
    """``write_bin(documents, name="train/en/a.bin", dtype="int64")`` writes the documents' format."""

    def write(documents: list[list[int]], name: str = "train/en/a.bin", dtype: str = "int64") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, offset = [], 0
        with path.open("wb") as file:
            for tokens in documents:
                line = (json.dumps({"tokens": tokens}) + "\n").encode()
                file.write(line)
                rows.append((offset, len(tokens)))
                offset += len(line)
        with Path(f"{path}.meta").open("wb") as file:
            np.save(file, np.array(rows, dtype).reshape(-1, 2))
        return path

    return write
