"""Configs in the layout of InternEvo's repository: bases imported from packages, from any current folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from evomesh.config.loader import load_config
from evomesh.errors import ConfigError

RUNTIME = "cudnn_benchmark = True\nenable_tb = False\n"
MODEL = (
    'model_type = "INTERNLM2_PUBLIC"\nHIDDEN = 64\n'
    "model = dict(num_layers=2, hidden_size=HIDDEN, num_attention_heads=4, vocab_size=96, no_bias=True,\n"
    '             dtype="torch.float32")\nparallel = dict(zero1=8, tensor=1)\n'
)
DEMO = (
    "from internlm.utils.utils import read_base\n\n"
    "with read_base():\n"
    "    from configs._base_.default_runtime import *\n"
    "    from configs._base_.models.small import *\n\n"
    'JOB_NAME = "demo"\ndata = dict(seq_len=32, train_folder="x")\n'
)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with a config and its bases, as InternEvo's repository has them."""
    write(
        tmp_path / "repository",
        {
            "configs/_base_/default_runtime.py": RUNTIME,
            "configs/_base_/models/small.py": MODEL,
            "configs/demo.py": DEMO,
        },
    )
    return tmp_path / "repository"


@pytest.mark.parametrize("packages", [False, True], ids=["folders", "packages"])
@pytest.mark.parametrize(
    "current", ["repository", "repository/configs", ".", "other", "other_packages"]
)
def test_bases_are_found_from_any_current_folder(
    current: str,
    packages: bool,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also from a checkout whose own folder ``configs`` has files of the same names."""
    other = {"configs/_base_/default_runtime.py": "seed = 5\n", "configs/demo.py": ""}
    write(tmp_path / "other", other)
    inits = {"configs/__init__.py": "", "configs/_base_/__init__.py": ""}
    write(tmp_path / "other_packages", other | inits)
    if packages:
        write(repository, inits | {"configs/_base_/models/__init__.py": ""})
    monkeypatch.chdir(tmp_path / current)
    path_before = list(sys.path)
    loaded = load_config(str(repository / "configs/demo.py"))
    config = loaded.config
    assert (config.run.cudnn_benchmark, config.run.seed) == (True, 1024)
    assert (config.model.hidden_size, config.parallel.zero1.size) == (64, 8)
    assert loaded.origins["model.hidden_size"].endswith("_base_/models/small.py:3")
    assert not [name for name in sys.modules if name.startswith("configs")]
    assert sys.path == path_before


def test_an_override_reaches_what_a_base_computes_from_it(repository: Path) -> None:
    path = str(repository / "configs/demo.py")
    assert load_config(path, ["HIDDEN=128"]).config.model.hidden_size == 128


def test_a_base_may_have_bases(repository: Path) -> None:
    nested = (
        "from mmengine.config import read_base\nwith read_base():\n"
        "    from ..default_runtime import *\n    from .small import *\nmodel['num_layers'] = 3\n"
    )
    write(repository, {"configs/_base_/models/deep.py": nested})
    text = DEMO.replace("models.small", "models.deep")
    write(repository, {"configs/deep.py": text})
    config = load_config(str(repository / "configs/deep.py"), ["HIDDEN=32"]).config
    assert (config.model.num_layers, config.model.hidden_size) == (3, 32)


def test_several_base_files_and_a_read_base_together(repository: Path) -> None:
    files = {
        "configs/steps.py": "data = dict(total_steps=7, micro_num=3)\n",
        "configs/rates.py": "adam = dict(lr=0.5)\ndata = dict(micro_num=2)\n",
        "configs/both.py": '_base_ = ["steps.py", "rates.py"]\n' + DEMO,
    }
    write(repository, files)
    config = load_config(str(repository / "configs/both.py")).config
    data = config.data
    assert (data.total_steps, data.micro_num, data.seq_len) == (7, 2, 32)
    assert (config.adam.lr, config.model.num_layers) == (0.5, 2)


def test_a_folder_above_does_not_hide_an_installed_package(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mpmath", raising=False)  # installed with torch
    write(repository, {"mpmath/__init__.py": "__version__ = 'hidden'\n"})
    text = 'import mpmath\nJOB_NAME = mpmath.__version__\nmodel = dict(dtype="torch.float32")\n'
    write(repository, {"configs/version.py": text})
    loaded = load_config(str(repository / "configs/version.py"))
    assert loaded.config.run.job_name != "hidden"


def test_a_missing_base_says_where_it_was_looked_for(repository: Path) -> None:
    (repository / "configs/_base_/default_runtime.py").unlink()
    with pytest.raises(ConfigError) as caught:
        load_config(str(repository / "configs/demo.py"))
    problem = caught.value.problems[0]
    assert "configs._base_.default_runtime" in problem.found
    assert "one above it" in problem.expected
    assert problem.where.endswith("demo.py:4")
