"""The first hour on a GPU in one command: is it right, how fast is it, and one Markdown table of all of it.

Run: make gpu          (or: python benchmarks/gpu.py [PART ...] [--minutes 10] [--output gpu.md])

Each part of `gpu_parts.py` runs in a separate process for at most so many minutes, and each row reaches the screen
and the file when it is measured, so that a machine which is lent for a while leaves what it had time for:

    tests     tests/gpu
    layouts   two ranks, compiled blocks, against one process: losses and gradient norms. On one GPU they share it
    steps     whole training steps: tokens/s and the share of the best matrix product measured in the same run
    profile   `evomesh train --profile`: where a step's time goes
    generate  tokens/s against transformers with the same weights
    serve     tokens/s of eight clients against one

It needs Python 3.11, torch 2.11 and the package's other dependencies. Where there is no package index, bring them:
`make wheels` on a machine that has one fills wheels/, and what is missing here is installed from there into
.gpu_site/, next to the Python that is used and not into it. Without a GPU, small shapes run on the CPU, as the
table's first line reports.

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
SITE = ROOT / ".gpu_site"
PARTS = ("tests", "layouts", "steps", "profile", "generate", "serve")
HEADS = ("part", "case", "result", "compared with", "ratio")


def normalized(name: str) -> str:
    """A distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def missing_requirements() -> list[str]:
    """The package's own dependencies that this Python lacks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=!~\[; ]", line)[0] for line in project["dependencies"]]
    return [name for name in names if not is_installed(name)]


def install_missing_wheels() -> None:
    """Make what is missing importable from SITE; stops the program where it cannot be had."""
    sys.path.insert(0, str(SITE))
    if not missing_requirements():
        return
    # A wheel for what this Python has could hide a build that belongs to its torch.
    wheels = [
        wheel
        for wheel in sorted(WHEELS.glob("*.whl"))
        if not is_installed(wheel.name.partition("-")[0])
    ]
    if wheels:
        options = ["--quiet", "--no-index", "--no-deps", "--target", str(SITE)]
        pip = [sys.executable, "-m", "pip", "install", *options, *map(str, wheels)]
        subprocess.run(pip, check=True)
        importlib.invalidate_caches()
    if still_missing := missing_requirements():
        sys.exit(
            f"{sys.executable} lacks {', '.join(still_missing)}: install them, or run `make wheels "
            f"FOR={sys.version_info.major}.{sys.version_info.minor}` where there is a package index and copy "
            f"{WHEELS.name}/ to {WHEELS}"
        )


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
    environment = os.environ | {
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


def main() -> None:
    args = arguments()
    install_missing_wheels()
    is_bad = False
    with args.output.open("w", encoding="utf-8") as file:

        def show(line: str) -> None:
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        show(heading())
        for part in args.parts or PARTS:
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
