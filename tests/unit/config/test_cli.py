"""``evomesh config``: what it prints and how fast."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomesh.cli.config import app
from evomesh.config.warning_lines import warning_lines
from evomesh.errors import UserError
from tests.support.covers import covers

ROOT = Path(__file__).parents[3]
SEVEN_B = str(ROOT / "configs" / "7B_sft.py")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_check() -> None:
    out = run("check", SEVEN_B, "--set", "data.train_folder=x")
    assert out.endswith("7B_sft.py: ok, 9 warnings\n")
    synthetic, line, unsaved, missing, _ = out.splitlines()
    assert synthetic.startswith("warning: data.valid_folder ")
    assert missing.startswith("warning: data.train_folder: cannot read the folder x: ")
    assert (
        unsaved.startswith("warning: ckpt.") and "nothing of the run is kept" in unsaved
    )
    assert "6 settings have no effect or need attention: ckpt.load_ckpt_info, " in line
    assert line.endswith(f"; why: evomesh config check {SEVEN_B} -v")
    in_full = run("check", SEVEN_B, "--set", "data.train_folder=x", "-v")
    assert len(in_full.splitlines()) == 10
    assert "grad_scaler" in line and "only float16 needs a loss scale" in in_full
    with pytest.raises(UserError, match=r"did you mean data\.seq_len"):
        run("check", SEVEN_B, "--set", "data.seq_le=1")


def test_a_warning_of_an_option_has_a_line_among_many() -> None:
    option = "--deepspeed zero2_offload: nothing is offloaded"
    of_keys = [f"{key}: no effect" for key in ("a.b", "c", "a.b", "d.e.f")]
    lines = warning_lines([*of_keys, option], "my.py")
    assert lines == [
        option,
        "3 settings have no effect or need attention: a.b, c, d.e.f; why: evomesh config check my.py -v",
    ]
    assert warning_lines([*of_keys[:2], option], "my.py") == [*of_keys[:2], option]


def test_a_few_warnings_are_printed_in_full(tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text("model = dict(dtype='torch.float32')\n")
    assert "SYNTHETIC data" in run("check", str(config))


def test_a_config_of_xtuner_is_copied_by_its_own_command(tmp_path: Path) -> None:
    name = "internlm2_7b_w_tokenized_dataset"
    with pytest.raises(UserError, match=f"evomesh xtuner copy-cfg {name}"):
        run("copy", name, str(tmp_path))


OWN = """
from evomesh.models.registry import model_initializer

def build_mine(config, *, device, gain: float, sizes: tuple[int, ...] = (), name: str | None = None):
    raise AssertionError("a check builds nothing")

model_initializer.register_module("MINE", build_mine)
model_type = "MINE"
model = dict(num_layers=2, hidden_size=32, num_attention_heads=4, dtype="torch.float32")
data = dict(train_folder="x")
"""


def test_check_of_a_model_of_ones_own(tmp_path: Path) -> None:
    config = tmp_path / "own.py"
    config.write_text(OWN + 'model |= dict(gain=1, sizes=[1, 2], name="x")\n')
    assert ": ok" in run("check", str(config))
    config.write_text(OWN + 'model |= dict(gian=1, sizes=[1, "2"], name=3)\n')
    with pytest.raises(UserError) as caught:
        run("check", str(config))
    text = str(caught.value)
    assert f"{config}: 4 problems in the config" in text
    assert (
        "model.gian: unknown key 'gian' for model type 'MINE'" in text
        and "did you mean 'gain'" in text
    )
    assert "needs 'gain'" in text
    assert "model.sizes: found [1, '2']" in text and "tuple[int, ...]" in text
    assert "model.name: found 3" in text
    config.write_text(OWN.replace('model_type = "MINE"', 'model_type = "MINNE"'))
    with pytest.raises(
        UserError, match=r"unknown model type 'MINNE'(.|\n)*did you mean 'MINE'"
    ):
        run("check", str(config))


def test_show() -> None:
    rows = [
        line.split()
        for line in run(
            "show", SEVEN_B, "--gpus", "8", "--set", "adam.lr=3e-4"
        ).splitlines()
    ]
    cells = {row[0]: row[1:] for row in rows if row}
    assert cells["adam.lr"] == ["0.0003", "--set"]
    assert cells["seed"] == ["1024", "default"]
    assert cells["data.seq_len"][0] == "2048"
    assert cells["data.seq_len"][1].startswith(SEVEN_B + ":")
    assert cells["parameters"] == ["7,321,948,160"]
    assert cells["tokens"][-1:] != []
    assert "data-parallel size      8" in run("show", SEVEN_B, "--gpus", "8")


@pytest.mark.parametrize(
    ("parallel", "gpus", "dp"),
    [
        ("dict(tensor=dict(size=2,mode='msp'),pipeline=4)", 8, 1),
        ("dict(tensor=dict(size=2,mode='isp'),weight=4)", 4, 2),
        ("dict(tensor=dict(size=4,mode='isp'),weight=6,pipeline=2)", 24, 3),
        ("dict(zero1=8)", 1, 1),
    ],
)
def test_show_without_gpus_takes_the_fewest_of_the_layout(
    parallel: str, gpus: int, dp: int
) -> None:
    sets = ["--set", f"parallel={parallel}", "--set", "model.num_attention_heads=24"]
    sets += ["--set", "model.hidden_size=1536", "--set", "model.mlp_ratio=4.0"]
    derived = json.loads(run("show", SEVEN_B, *sets, "--json"))["derived"]
    assert (derived["gpus"], derived["data-parallel size"]) == (gpus, dp)
    assert derived["tokens per step"] == 2048 * 2 * 4 * dp
    text = run("show", SEVEN_B, *sets)
    assert "for the fewest gpus of this layout; --gpus sets another number" in text


def test_show_json() -> None:
    document = json.loads(run("show", SEVEN_B, "--gpus", "8", "--json"))
    assert document["derived"]["parameters"] == 7_321_948_160
    assert document["derived"]["tokens per step"] == 131_072
    assert document["config"]["data"]["seq_len"] == 2048
    assert document["origins"]["adam.no_decay"] == "default"


@covers("promise:copy-cfg")
def test_list_and_copy(tmp_path: Path) -> None:
    assert "7B_sft" in run("list")
    run("copy", "7B_sft", str(tmp_path))
    assert (tmp_path / "7B_sft.py").read_bytes() == Path(SEVEN_B).read_bytes()
    run("copy", "7B_sft", str(tmp_path / "mine.py"))
    for name, dest in (
        ("7B_sft", str(tmp_path)),
        ("7B_sff", "x.py"),
        ("7B_sft", str(tmp_path / "no" / "x.py")),
    ):
        with pytest.raises(UserError):
            run("copy", name, dest)


def test_a_copy_of_a_config_with_a_base_works(tmp_path: Path) -> None:
    run("copy", "7B_llama2", str(tmp_path / "mine.py"))
    assert (tmp_path / "_base_" / "7B.py").exists()
    original, copied = (
        json.loads(run("show", path, "--json"))
        for path in (str(ROOT / "configs/7B_llama2.py"), str(tmp_path / "mine.py"))
    )
    assert copied["config"] == original["config"]
    run("copy", "7B_internlm2", str(tmp_path))  # the same base
    (tmp_path / "_base_" / "7B.py").write_text("seed = 1\n")
    with pytest.raises(UserError, match="already exists, with different content"):
        run("copy", "7B_isp_sft", str(tmp_path))
    assert not (tmp_path / "7B_isp_sft.py").exists()


def test_an_override_reaches_a_name_of_the_base() -> None:
    shown = json.loads(
        run(
            "show", str(ROOT / "configs/7B_llama2.py"), "--set", "SEQ_LEN=512", "--json"
        )
    )
    assert shown["config"]["data"]["seq_len"] == 512


@pytest.mark.slow
@covers("promise:config-check-is-fast")
def test_check_is_fast() -> None:
    """Processor time, best of three, interpreter start included: what the wall shows on a machine at rest."""
    code = f"from evomesh.cli.config import app; app(['check', {SEVEN_B!r}])"
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        )
        assert done.returncode == 0
    assert min(times) < 1.0


def test_show_lr_prints_the_schedule_at_its_borders(tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(
        "data = dict(total_steps=100)\nadam = dict(lr=1e-3)\n"
        "lr_scheduler = dict(type='wsd', warmup_steps=10)\n"
    )
    lines = run("show", str(config), "--lr").splitlines()
    rows = [line.split() for line in lines]
    assert ["0", "0.0001"] in rows and ["95", "0.0005"] in rows
    assert lines[-1].startswith("wsd, 100 steps")
    document = json.loads(run("show", str(config), "--lr", "--json"))
    assert document["lr"]["99"] == pytest.approx(1e-4)
    with pytest.raises(UserError, match=r"data\.epochs"):
        run("show", str(config), "--lr", "--set", "data.epochs=1")
