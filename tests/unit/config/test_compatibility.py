"""Each key of the compatibility table does what its row says."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.config.loader import known_keys, load_config
from evomesh.config.reading.spellings import SECTIONS
from evomesh.config.record import config_to_dict
from evomesh.errors import ConfigError
from tests.contract.config_keys import ROWS, CompatibilityRow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "base.py"
    path.write_text(
        'data = dict(train_folder="x")\nmodel = dict(dtype="torch.float32")\n'
    )
    return path


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_row(row: CompatibilityRow, base: Path) -> None:
    sets = [*row.along, f"{row.key}={row.example!r}"]
    if row.outcome in ("refusal", "later"):
        with pytest.raises(ConfigError) as caught:
            load_config(str(base), sets)
        about = [p for p in caught.value.problems if "--set" in p.where]
        assert len(about) == len(caught.value.problems) == 1
        assert ("not available yet" in about[0].found) == (row.outcome == "later")
        return
    loaded = load_config(str(base), sets)
    named = [
        words for words in loaded.warnings if words.startswith(f"{row.key} (--set)")
    ]
    before = load_config(str(base), list(row.along))
    if row.outcome == "warning":
        assert len(named) == 1
        assert "no effect" in named[0]
    else:
        assert config_to_dict(before.config) != config_to_dict(loaded.config)


def test_every_key_has_a_row() -> None:
    rows = {row.key for row in ROWS}
    assert len(rows) == len(ROWS)
    groups = {
        key
        for key in known_keys()
        if any(other.startswith(key + ".") for other in known_keys())
    }
    assert set(known_keys()) - rows - groups == set()
    assert rows <= set(known_keys()) | set(SECTIONS)
