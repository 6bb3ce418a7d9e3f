"""The configs that come along with the package, or lie beside it in a checkout."""

from __future__ import annotations

from pathlib import Path


def shipped_configs() -> list[Path]:
    """Their files, by name."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return sorted(path for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return []
