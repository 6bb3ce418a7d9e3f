"""The first hour on a GPU in one command: is it right, how fast is it, and one Markdown table of all of it.

Run: make gpu          (or: python benchmarks/gpu.py [PART ...] [--minutes 10] [--output gpu.md])

Each part of `gpu_parts.py` runs in a separate process for at most so many minutes, and each row reaches the screen
and the file when it is measured, so that a machine which is lent for a while leaves what it had time for:

    tests     tests/gpu
    layouts   two ranks, compiled blocks, against one process: losses and gradient norms. On one GPU they share it
    steps     whole training steps: tokens/s and the share of the best matrix product measured in the same run
    profile   `evomesh train --profile`: where a step's time goes
    generate  tokens/s against transformers with the same weights; keys in rows, in pages, and with a graph
    serve     tokens/s of eight clients against one

It needs Python 3.11, torch 2.11, the package's other dependencies, and what some parts import beside them (NEEDS).
Where there is no package index, bring them: `make wheels` on a machine that has one fills wheels/, and what is missing
here is installed from there into .gpu_site/, next to the Python that is used and not into it. A part whose packages
cannot be had is not run, the others are. Without a GPU, small shapes run on the CPU, as the table's first line reports.

Exit code 1: a part failed, or a row is not what it has to be.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "wheels"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# Of each version of Python: compiled modules are made for one.
SITE = ROOT / ".gpu_site" / PYTHON
PARTS = ("tests", "layouts", "steps", "profile", "generate", "serve")
# What a part imports beside the package's own dependencies, by the names of distributions.
NEEDS = {
    "tests": ("pytest", "pytest-timeout", "packaging"),
    "generate": ("transformers",),
    "serve": ("fastapi", "uvicorn", "prometheus-client", "httpx"),
}
HEADS = ("part", "case", "result", "compared with", "ratio")


def normalized(name: str) -> str:
    """A distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_installed(name: str) -> bool:
    return installed_version(name) is not None


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: "2.11.0+cu130" -> (2, 11, 0)."""
    public = version.partition("+")[0]
    return tuple(int(number) for number in re.findall(r"\d+", public))


def unmet_requirements() -> list[str]:
    """The package's own dependencies that this Python lacks or has too old, each with what it is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    unmet = []
    for line in project["dependencies"]:
        name, _, least = line.partition(">=")
        version = installed_version(name)
        if version is None:
            unmet.append(name)
        elif release(version) < release(least):
            unmet.append(f"{name} {least} (it has {version})")
    return unmet


def missing_for(part: str) -> list[str]:
    """What a part imports and this Python lacks."""
    return [name for name in NEEDS.get(part, ()) if not is_installed(name)]


def missing_wheels() -> list[str]:
    """Distributions that lie in WHEELS and that this Python lacks.

    A wheel for what this Python has could hide a build that belongs to its torch.
    """
    names = {wheel.name.partition("-")[0] for wheel in WHEELS.glob("*.whl")}
    return sorted(name for name in names if not is_installed(name))


def how_to_bring() -> str:
    return (
        f"install them, or run `make wheels FOR={PYTHON}` where there is a package index and copy "
        f"{WHEELS.name}/ to {WHEELS}"
    )


def install_missing_wheels() -> None:
    """Make what is missing importable from SITE; stops the program where the package itself cannot be imported."""
    sys.path.insert(0, str(SITE))
    if names := missing_wheels():
        # Isolated: settings of pip that are meant for other installations count for nothing.
        options = ["--isolated", "--quiet", "--disable-pip-version-check", "--no-deps"]
        options += ["--no-index", "--find-links", str(WHEELS), "--target", str(SITE)]
        pip = [sys.executable, "-m", "pip", "install", *options, *names]
        if subprocess.run(pip, check=False).returncode:
            sys.exit(
                f"{WHEELS} has wheels that {sys.executable} cannot install, see above: they may be for another "
                f"Python than {PYTHON} or another kind of machine; {how_to_bring()}"
            )
        importlib.invalidate_caches()
    if unmet := unmet_requirements():
        sys.exit(f"{sys.executable} lacks {', '.join(unmet)}: {how_to_bring()}")


def table_line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def heading() -> str:
    """Device, versions and date, and the head of the table."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gibibytes = properties.total_memory / 2**30
        device = f"{torch.cuda.device_count()} x {properties.name}, {gibibytes:.0f} GiB, CUDA {torch.version.cuda}"
    else:
        device = "NO GPU: small shapes on the CPU, which say nothing about one"
    lines = [
        "# First hour on a GPU",
        "",
        f"{device}; torch {torch.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} CPU cores; "
        f"{time.strftime('%Y-%m-%d')}",
        "",
        table_line(*HEADS),
        table_line(*["---"] * len(HEADS)),
    ]
    return "\n".join(lines)


def part_command(part: str) -> list[str]:
    script = Path(__file__).with_name("gpu_parts.py")
    return [sys.executable, str(script), part]


def lines_of_part(part: str, command: list[str], minutes: float) -> Iterator[str]:
    """Yield what the part prints as it prints it, and at last a row about how it ended if that was not well."""
    paths = [str(SITE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    # As the evomesh command sets it: threads that wait do not take the cores of others.
    environment = {"GOMP_SPINCOUNT": "3000"} | os.environ
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }
    # A separate session, so that the end of the time reaches the part's ranks and servers too.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    timer = threading.Timer(minutes * 60, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            yield line.rstrip()
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == -signal.SIGKILL:
        yield table_line(part, "rest", f"STOPPED after {minutes:g} minutes", "", "")
    elif code:
        yield table_line(part, "rest", f"FAILED with exit code {code}", "", "")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all"
    )
    parser.add_argument("--minutes", type=float, default=10, help="for each part")
    parser.add_argument("--output", type=Path, default=ROOT / "gpu.md")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return args


def end_in_order(signum: int, frame: object) -> None:
    """Raise SystemExit where a signal would end this process at once, so that the part ends too."""
    sys.exit(128 + signum)


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, end_in_order)
    install_missing_wheels()
    is_bad = False
    with args.output.open("w", encoding="utf-8") as file:

        def show(line: str) -> None:
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        show(heading())
        for part in args.parts or PARTS:
            if missing := missing_for(part):
                names = ", ".join(missing)
                show(table_line(part, "all", f"NOT RUN: lacks {names}", "", ""))
                print(f"for {part}: {how_to_bring()}")
                is_bad = True
                continue
            for line in lines_of_part(part, part_command(part), args.minutes):
                # What else a part prints, a warning say, is for the screen alone.
                if line.startswith("| "):
                    show(line)
                    is_bad |= "FAILED" in line
                else:
                    print(line, flush=True)
    print(f"\nthe table is in {args.output}")
    sys.exit(int(is_bad))


if __name__ == "__main__":
    main()
