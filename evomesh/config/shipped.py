"""The configs that come along: beside the package in a checkout, in the environment's share folder when installed."""

from __future__ import annotations

import sys
from pathlib import Path


def shipped_configs() -> list[Path]:
    """Their files, by name."""
    for folder in (
        Path(__file__).resolve().parents[2] / "configs",
        Path(sys.prefix) / "share" / "evomesh" / "configs",
    ):
        if (folder / "7B_sft.py").exists():
            return sorted(path for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return []
