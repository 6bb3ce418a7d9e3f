"""Every config that we ship loads."""

from __future__ import annotations

from pathlib import Path

import pytest

loader = pytest.importorskip("evomesh.config.loader")
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads(path: Path) -> None:
    loader.load_config(str(path))
