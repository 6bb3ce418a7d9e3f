"""``evomesh slurm`` with stubs of Slurm's commands on the PATH."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.errors import UserError
from tests.support.runs import CONFIG

SINFO = "#!/bin/sh\necho 'llm*|2-00:00:00|4|gpu:a100:8(S:0-1)'\necho 'cpu|infinite|9|(null)'\n"
SBATCH = "#!/bin/sh\ncat > submitted.sh\necho '4711;east'\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.py").write_text(CONFIG + "parallel = dict(tensor=2)\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    add("sinfo", SINFO)
    return tmp_path


def add(name: str, text: str) -> None:
    file = Path("bin") / name
    file.write_text(text)
    file.chmod(0o755)


def slurm(*options: str) -> str:
    done = CliRunner().invoke(app, ["slurm", "config.py", *options])
    if done.exception is not None:
        raise done.exception
    return done.output


def test_prints_and_writes_a_script() -> None:
    printed = slurm("--gpus", "16", "--partition", "llm", "--set", "adam.lr=1e-3")
    assert "#SBATCH --nodes=2\n" in printed and "#SBATCH --job-name=tiny\n" in printed
    assert slurm("--nodes", "2", "-p", "llm", "--set", "adam.lr=1e-3") == printed
    said = slurm("--gpus", "16", "-p", "llm", "--set", "adam.lr=1e-3", "-o", "job.sh")
    assert said == "job.sh: submit it with: sbatch job.sh\n"
    assert Path("job.sh").read_text() == printed


def test_submits() -> None:
    add("sbatch", SBATCH)
    said = slurm("--submit")
    assert said.startswith("submitted: job 4711\n")
    assert "tail -F tiny-4711.out" in said and "scancel 4711" in said
    assert Path("submitted.sh").read_text() == slurm()


def test_a_sweep_saves_below_the_configs_folder() -> None:
    script = slurm("--sweep", "adam.lr=1e-3,2e-3")
    assert "#SBATCH --array=0-1\n" in script and "save_folder=local:ckpts\n" in script


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "12"], "12 GPUs are not whole nodes of 8\n  expected: a multiple of --gpus-per-node: 8 or 16"),
        (["--gpus", "16", "--nodes", "3"], "16 GPUs are 2 nodes of 8, not 3"),
        (["--gpus-per-node", "5"], "tensor.size"),
        (["-p", "lmm"], "--partition: this cluster has no partition 'lmm'\n  expected: one of llm, cpu"),
        (["-p", "cpu"], "the nodes of partition 'cpu' have 0 GPUs at most"),
        (["--time", "1d"], "--time: '1d' is not a time limit"),
        (["--time", "5"], "the ranks would save 300 s before a time limit of 300 s"),
        (["--starter", "mpirun"], "unknown starter 'mpirun'"),
        (["--sweep", "adam.lr=1e-3,fast"], "adam.lr"),
        (["--sbatch", "exclude"], "'exclude' is not an option of sbatch"),
        (["--submit"], "sbatch is not on the PATH"),
    ],
)  # fmt: skip
def test_refuses(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without /usr/bin: this machine may be part of a real cluster.
    add("sinfo", SINFO)
    monkeypatch.setenv("PATH", f"{Path.cwd()}/bin")
    with pytest.raises(UserError) as error:
        slurm(*options)
    assert message in str(error.value) and error.value.exit_code == 2


def test_what_sbatch_refuses_is_passed_on() -> None:
    add("sbatch", "#!/bin/sh\necho 'sbatch: error: Invalid account' >&2\nexit 1\n")
    with pytest.raises(UserError, match="sbatch refused the job: sbatch: error: Inv"):
        slurm("--submit")


def test_warns_of_groups_across_nodes_and_of_lives_that_start_anew() -> None:
    add("sinfo", "#!/bin/sh\nexit 1\n")  # no cluster: nothing to check against
    said = slurm(
        "--nodes", "2", "--gpus-per-node", "3", "--set", "ckpt.save_ckpt_folder=None"
    )
    assert "does not divide the 3 GPUs of a node" in said
    assert "starts from step 0" in said


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("ckpt.enable_save_ckpt=False", "is not written to"),
        ("ckpt.auto_resume=False", "starts where this one does"),
    ],
)
def test_a_job_that_would_begin_again_is_warned_of(setting: str, words: str) -> None:
    said = slurm("--set", setting)
    assert said.startswith("warning: ckpt.") and words in said.partition("\n")[0]
    assert "warning" not in slurm("--set", setting, "--no-requeue")
    assert "warning" not in slurm()


def test_nodes_of_another_size_are_offered() -> None:
    with pytest.raises(UserError, match="12 GPUs are not whole nodes of 8") as caught:
        slurm("--gpus", "12")
    assert "--gpus-per-node 6" in str(caught.value)


def test_the_check_of_a_config_says_that_nothing_is_saved() -> None:
    check = ["config", "check", "config.py"]
    said = CliRunner().invoke(app, [*check, "--set", "ckpt.enable_save_ckpt=False"])
    assert "nothing of the run is kept" in said.output and said.exit_code == 0
    assert "kept" not in CliRunner().invoke(app, check).output
