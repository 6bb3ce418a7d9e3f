"""benchmarks/gpu.py and tools/wheels.py: what `make gpu` leaves when its time is up, what a bare machine is given."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks import gpu
from tools import wheels

ROOT = Path(__file__).resolve().parents[2]


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


@pytest.mark.slow
def test_rows_of_a_part_that_takes_too_long_are_kept_and_its_processes_end() -> None:
    """The child inherits the pipe: if it outlived the part, reading would last as long as it does."""
    program = "echo '| steps | first | 1 |'; sleep 250 & wait"
    lines = list(gpu.lines_of_part("steps", ["sh", "-c", program], minutes=0.05))
    assert lines == [
        "| steps | first | 1 |",
        "| steps | rest | STOPPED after 0.05 minutes |  |  |",
    ]


@pytest.mark.slow
def test_a_part_ends_with_the_command_that_runs_it(tmp_path: Path) -> None:
    """Its processes are a separate session, which a signal to the command does not reach."""
    program = (
        "import sys; from benchmarks import gpu; gpu.install_missing_wheels = lambda: None; "
        "gpu.heading = lambda: ''; gpu.part_command = lambda part: ['sh', '-c', 'echo $$; exec sleep 250']; "
        f"sys.argv[1:] = ['steps', '--output', {str(tmp_path / 'gpu.md')!r}]; gpu.main()"
    )
    command = subprocess.Popen(
        python(program),
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert command.stdout is not None
    assert command.stdout.readline() == "\n"  # the heading
    part = int(command.stdout.readline())
    command.terminate()
    assert command.wait() == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(part, 0)


@pytest.mark.slow
def test_a_part_that_fails_says_so() -> None:
    [line] = gpu.lines_of_part("serve", python("raise SystemExit(3)"), minutes=1)
    assert line == "| serve | rest | FAILED with exit code 3 |  |  |"


def direct_requirements() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {
        gpu.normalized(re.split(r"[<>=]", line)[0]) for line in project["dependencies"]
    }


def pinned_versions() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if re.fullmatch(r"[\w.-]+==\S+", line)]
    return {gpu.normalized(name): version for name, version in pins}


def test_wheels_are_those_of_the_package_without_torch() -> None:
    """Every version is the one of constraints.txt, and nothing that only torch needs is among them."""
    versions = wheels.needed({"evomesh": set()}, wheels.Target("3.12"))
    del versions["setuptools"]  # tensorboard's; pip brings its own where it is missing
    assert direct_requirements() - {"torch"} <= set(versions)
    assert not {"torch", "triton", "sympy", "networkx"} & set(versions)
    assert "pydantic-core" in versions  # needed by one that is needed
    assert versions.items() <= pinned_versions().items()


def test_what_is_left_out_brings_nothing() -> None:
    versions = wheels.needed(
        {"transformers": set(), "pytest": set()},
        wheels.Target("3.12"),
        ["transformers", "iniconfig"],
    )
    assert "pluggy" in versions
    assert not {"transformers", "regex", "iniconfig", "tokenizers"} & set(versions)


@pytest.mark.parametrize(("python", "is_asked_for"), [("3.11", True), ("3.12", False)])
def test_what_is_needed_is_that_of_the_other_python(
    monkeypatch: pytest.MonkeyPatch, python: str, is_asked_for: bool
) -> None:
    class Installed:
        version = "1.0"
        requires = ('extra-name; python_version < "3.12"', "always>=2")

    monkeypatch.setattr(wheels, "distribution", lambda name: Installed)
    asked = wheels.requirements_of("any", set(), wheels.Target(python))
    names = {requirement.name for requirement in asked}
    assert ("extra-name" in names) is is_asked_for
    assert "always" in names


def test_a_wheel_of_another_version_is_removed(tmp_path: Path) -> None:
    """`make wheels` after a new pin: with both, pip would take the newer one."""
    for name in (
        "hf_xet-1.7.0-cp38.whl",
        "hf_xet-1.8.0-cp38.whl",
        "torch-2.11.0-x.whl",
    ):
        (tmp_path / name).touch()
    wheels.remove_other_versions(tmp_path, {"hf-xet": "1.8.0"})
    kept = {wheel.name for wheel in tmp_path.iterdir()}
    assert kept == {"hf_xet-1.8.0-cp38.whl", "torch-2.11.0-x.whl"}


@pytest.fixture
def lacks(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names that this Python seems to lack."""
    names: set[str] = set()
    version = gpu.installed_version

    def installed_version(name: str) -> str | None:
        return None if gpu.normalized(name) in names else version(name)

    monkeypatch.setattr(gpu, "installed_version", installed_version)
    return names


def test_what_this_python_has_is_not_missing(lacks: set[str]) -> None:
    assert gpu.unmet_requirements() == []
    lacks.add("orjson")
    assert gpu.unmet_requirements() == ["orjson"]


def test_a_torch_that_is_too_old_is_named_with_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = gpu.installed_version
    old = {"torch": "2.9.1+cu128"}
    monkeypatch.setattr(
        gpu, "installed_version", lambda name: old.get(name) or version(name)
    )
    assert gpu.unmet_requirements() == ["torch 2.11 (it has 2.9.1+cu128)"]


def test_every_dependency_is_a_least_version() -> None:
    """What `unmet_requirements` reads."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        assert re.fullmatch(r"[a-z0-9-]+>=[0-9.]+", line)


def test_without_wheels_the_command_that_makes_them_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacks: set[str]
) -> None:
    lacks |= {"orjson", "ijson"}
    monkeypatch.setattr(gpu, "WHEELS", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match=r"lacks orjson, ijson: .*make wheels FOR="):
        gpu.install_missing_wheels()


def test_only_wheels_of_what_is_missing_are_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacks: set[str]
) -> None:
    """Whatever the package's own dependencies are: pytest may be all that is missing."""
    lacks |= {"pytest-timeout"}
    for name in ("numpy-2.4.6-cp312.whl", "pytest_timeout-2.4.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(gpu, "WHEELS", tmp_path)
    assert gpu.missing_wheels() == ["pytest_timeout"]
    assert gpu.missing_for("tests") == ["pytest-timeout"]
    assert gpu.missing_for("steps") == []


@pytest.mark.slow
def test_wheels_of_another_python_are_named_as_such(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacks: set[str]
) -> None:
    lacks.add("orjson")
    (tmp_path / "orjson-3.13.0-cp39-cp39-win_amd64.whl").touch()
    monkeypatch.setattr(gpu, "WHEELS", tmp_path)
    monkeypatch.setattr(gpu, "SITE", tmp_path / "site")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match=rf"for another Python than {gpu.PYTHON}"):
        gpu.install_missing_wheels()


def test_a_part_without_its_packages_is_a_row_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    lacks: set[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lacks |= {"fastapi", "httpx"}
    output = tmp_path / "gpu.md"
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "serve", "steps", "--output", str(output)]
    )
    monkeypatch.setattr(gpu, "install_missing_wheels", lambda: None)
    monkeypatch.setattr(gpu, "heading", lambda: "head")
    monkeypatch.setattr(
        gpu, "lines_of_part", lambda part, command, minutes: [f"| {part} | ran |"]
    )
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    assert output.read_text().splitlines() == [
        "head",
        "| serve | all | NOT RUN: lacks fastapi, httpx |  |  |",
        "| steps | ran |",
    ]
    assert "make wheels" in capsys.readouterr().out


@pytest.mark.slow
def test_no_part_needs_what_only_another_part_needs() -> None:
    """Importing the parts with every module of NEEDS hidden: each would end all others otherwise."""
    modules = {name.replace("-", "_") for names in gpu.NEEDS.values() for name in names}
    hidden = modules - {"packaging"} | {"httpx", "pytest"}
    program = f"import sys; sys.modules.update(dict.fromkeys({sorted(hidden)!r})); import gpu_parts"
    done = subprocess.run(
        python(program),
        cwd=ROOT / "benchmarks",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
