"""Data sets written by the letter of the documents, without the package's own writer."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_bin(
    path: Path, documents: Sequence[Sequence[int]], *, meta_dtype: str = "int64"
) -> Path:
    """Writes ``path`` (one ``{"tokens": [...]}`` a line) and ``path.meta`` (npy [N, 2]: byte offset, token count)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, offset = [], 0
    with path.open("wb") as file:
        for document in documents:
            line = json.dumps({"tokens": list(document)}).encode() + b"\n"
            file.write(line)
            rows.append((offset, len(document)))
            offset += len(line)
    with Path(f"{path}.meta").open("wb") as file:
        np.save(file, np.array(rows, dtype=meta_dtype).reshape(-1, 2))
    return path


def write_folder(
    root: Path,
    *,
    documents: int = 64,
    vocab_size: int = 256,
    types: Sequence[str] = ("en", "code"),
) -> Path:
    """A train folder with one file a type: arithmetic sequences, so that a small model can learn them."""
    draw = random.Random(0)
    for name in types:
        rows = []
        for _ in range(documents):
            start, step = draw.randrange(vocab_size), draw.randrange(1, 4)
            rows.append(
                [
                    1 + (start + step * i) % (vocab_size - 1)
                    for i in range(draw.randrange(20, 60))
                ]
            )
        write_bin(root / name / "data.bin", rows)
    return root
