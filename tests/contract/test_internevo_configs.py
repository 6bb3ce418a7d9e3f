"""Every config of InternEvo's repository is accepted, or refused for the reasons its row gives; accepted ones run."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.config.layout import smallest_world
from evomesh.config.loader import load_config
from evomesh.config.size import parameter_count
from evomesh.errors import ConfigError, UserError
from evomesh.plan.trace import trace
from tests.contract.internevo_configs import COMMON, KEY_SETS, TUTORIAL, KeySet

ALL = (*KEY_SETS, TUTORIAL)
ACCEPTED = [keys for keys in ALL if not keys.outcome]


def write(keys: KeySet, folder: Path) -> str:
    path = folder / "config.py"
    lines = [f"{name} = {value!r}\n" for name, value in keys.values.items()]
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def test_there_is_a_row_for_each_of_the_39_configs() -> None:
    assert len({keys.name for keys in KEY_SETS}) == len(KEY_SETS) == 39


@pytest.mark.parametrize("keys", ALL, ids=lambda keys: keys.name)
def test_check_accepts_it_or_says_why_not(keys: KeySet, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["config", "check", write(keys, tmp_path)])
    if not keys.outcome:
        assert result.exit_code == 0, result.exception
        return
    error = result.exception
    assert isinstance(error, UserError)
    problems = error.problems if isinstance(error, ConfigError) else [error]
    found = {problem.where.partition(" ")[0]: problem for problem in problems}
    assert found.keys() == keys.outcome.keys()
    for key, word in keys.outcome.items():
        problem = found[key]
        assert word in f"{problem.found} {problem.expected}"
        assert problem.fix or problem.expected


@pytest.mark.parametrize("keys", ACCEPTED, ids=lambda keys: keys.name)
def test_a_step_of_its_layout_is_traced(keys: KeySet, tmp_path: Path) -> None:
    """With as few layers as the layout has stages, and one micro-batch for each."""
    path = write(keys, tmp_path)
    parallel = load_config(path).config.parallel
    layers = parallel.pipeline.size
    sets = [f"model.num_layers={layers}", f"data.micro_num={layers}"]
    config = load_config(path, sets).config
    world = 2 * smallest_world(parallel)
    found = trace(config, world, world - 1)
    assert (found.grid.dp.size, found.grid.pp.size) == (
        world // parallel.pipeline.size // parallel.tensor.size,
        parallel.pipeline.size,
    )
    operations = {(call.operation, call.axis) for call in found.traffic.calls}
    assert (("send", "pp") in operations) == (parallel.pipeline.size > 1)
    if parallel.tensor.mode == "isp":
        sizes = (parallel.tensor.size, parallel.weight.size)
        weights = "tp" if sizes[0] == sizes[1] else "wp"  # equal axes are one group
        assert (("all_to_all", "tp") in operations) == (sizes[0] > 1)
        assert (("reduce_scatter", weights) in operations) == (sizes[1] > 1)


# Published numbers of parameters; the second is that of InternEvo's log.
PARAMETERS = {
    "7B_llama2.py": 7_241_732_096,
    "7B_sft.py": 7_321_948_160,
    "7B_qwen2.py": 7_615_616_512,
    "7B_internlm2.py": 7_737_708_544,
    "70B_sft_llama2.py": 68_976_648_192,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_its_model_has_the_published_size(name: str, tmp_path: Path) -> None:
    (keys,) = (keys for keys in KEY_SETS if keys.name == name)
    config = load_config(write(keys, tmp_path)).config
    assert parameter_count(config.model) == PARAMETERS[name]


def test_rows_do_not_share_their_sections() -> None:
    assert "total_steps" not in COMMON["lr_scheduler"]
