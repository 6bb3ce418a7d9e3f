"""Small datasets on disk, written by plain code that shares nothing with the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import golden

WriteBin = Callable[..., Path]


@pytest.fixture
def write_bin(tmp_path: Path) -> WriteBin:
    """Return ``write_bin(documents, name="train/en/a.bin", dtype="int64")``, which writes InternEvo's format."""

    def write(
        documents: list[list[int]], name: str = "train/en/a.bin", dtype: str = "int64"
    ) -> Path:
        return golden.write_bin(tmp_path / name, documents, meta_dtype=dtype)

    return write
