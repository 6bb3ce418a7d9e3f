"""``model.from_hf``: a config without sizes trains the model of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.config.hugging_face import read_model_folder
from evomesh.config.loader import LoadedConfig, load_config
from evomesh.errors import ConfigError
from tests.support.covers import covers

FOLDER = Path(__file__).parents[2] / "support" / "llama_sizes"


def load(tmp_path: Path, *sets: str, model: str = "") -> LoadedConfig:
    path = tmp_path / "config.py"
    path.write_text(
        f'data = dict(train_folder="x")\nmodel = dict(from_hf={str(FOLDER)!r}, {model})\n'
    )
    return load_config(str(path), sets)


@covers("model.from_hf")
def test_family_and_sizes_are_the_folders(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    assert loaded.config.model == read_model_folder(FOLDER)
    assert (loaded.config.model.model_type, loaded.config.model.dtype) == (
        "LLAMA2",
        "bfloat16",
    )
    assert not any("dtype" in warning for warning in loaded.warnings)


def test_a_config_may_repeat_the_folder_and_choose_what_it_leaves_open(
    tmp_path: Path,
) -> None:
    repeated = "mlp_ratio=1.5, multiple_of=32, hidden_size=64, rope_base=500000.0, dtype='torch.float32'"
    model = load(tmp_path, "model.checkpoint=0.5", model=repeated).config.model
    assert (model.mlp_width, model.dtype, model.checkpoint) == (96, "float32", 0.5)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.rope_base=10000.0", "10000.0, but .* has 500000.0"),
        ("model.num_layers=3", "found 3, but .* has 2"),
        ("model_type=QWEN3", "'QWEN3'.*, but .* has 'LLAMA2'"),
        ("model.mlp_ratio=4.0", "a feed-forward width of 256, but .* has 96"),
        (
            "model.rope_scaling={'type': 'linear', 'factor': 2.0}",
            "linear.*, but .* has .*llama3",
        ),
        ("model.from_hf=no/such/folder", "no/such/folder"),
    ],
)
def test_a_contradiction_is_refused_with_both_values(
    setting: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load(tmp_path, setting)
    assert len(caught.value.problems) == 1
