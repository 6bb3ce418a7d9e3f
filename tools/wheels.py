"""Download wheels of the package's dependencies, all but torch's, for a machine without a package index.

Run: make wheels [FOR=3.12]       (or: python tools/wheels.py FOLDER [--python 3.12] [--extra hf serve] [--only NAME])

The other machine brings its own build of torch, made for its GPU. The versions are those installed here, which
`constraints.txt` pins; which packages, their own metadata say. `make gpu` there takes what is missing from the folder.

`make wheels` adds --for-gpu: what the parts of `make gpu` import beside the package's dependencies, but not what only
TensorBoard's page and downloads from the hub need. Some machines take 64 MiB at a time, and checkout and wheels
together are little less: leave out what the machine has (make wheels WITHOUT="numpy transformers"). Wheels of the same
packages in other versions are removed from the folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# Where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import NEEDS, ROOT

# Wheels name the oldest glibc they run on, and pip takes none but those that it is given.
PLATFORMS = (
    "manylinux_2_34",
    "manylinux_2_31",
    "manylinux_2_28",
    "manylinux_2_27",
    "manylinux_2_24",
    "manylinux_2_17",
    "manylinux2014",
    "manylinux1",
)
# Writing event files needs none of tensorboard's; hf-xet makes downloads from the hub faster.
NOT_FOR_GPU = (
    "grpcio",
    "pillow",
    "tensorboard-data-server",
    "werkzeug",
    "markdown",
    "setuptools",
    "hf-xet",
)


@dataclass(frozen=True)
class Target:
    """The Python of the other machine, by its two numbers, and what `uname -m` says there."""

    python: str
    machine: str = "x86_64"

    @property
    def marker_values(self) -> dict[str, str]:
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "platform_machine": self.machine,
        }


def requirements_of(name: str, extras: set[str], target: Target) -> list[Requirement]:
    """What an installed distribution asks for on the other machine, with these of its extras."""
    found = []
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        environments = [
            target.marker_values | {"extra": extra} for extra in extras | {""}
        ]
        if marker is None or any(marker.evaluate(each) for each in environments):
            found.append(requirement)
    return found


def needed(
    roots: Mapping[str, set[str]], target: Target, without: Sequence[str] = ()
) -> dict[str, str]:
    """Version by name of everything that ``roots`` need, but for torch and what only torch needs.

    Args:
        roots: names, each with its extras; evomesh itself is not among what is returned.
        without: names to leave out, and with them what only they need.
    """
    versions: dict[str, str] = {}
    left_out = {"torch", "evomesh", *without}
    waiting = [
        (canonicalize_name(name), extras)
        for name, extras in roots.items()
        if name not in without
    ]
    while waiting:
        name, extras = waiting.pop()
        if name != "evomesh":
            versions[name] = distribution(name).version
        for requirement in requirements_of(name, extras, target):
            key = canonicalize_name(requirement.name)
            if key in left_out or key in versions:
                continue
            try:
                distribution(key)
            except PackageNotFoundError:
                # Of an extra that is not installed here, or of another Python than this.
                print(f"left out: {key}, which {name} asks for and is not here")
                continue
            waiting.append((key, set(requirement.extras)))
    return versions


def remove_other_versions(folder: Path, versions: Mapping[str, str]) -> None:
    """Delete wheels of these packages in other versions: pip would take the newest."""
    for wheel in folder.glob("*.whl"):
        name, version = wheel.name.split("-")[:2]
        wanted = versions.get(canonicalize_name(name))
        if wanted is not None and Version(version) != Version(wanted):
            wheel.unlink()


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


def checkout_bytes() -> int:
    """Size of the files that git tracks; 0 in a folder without git."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the other machine")
    parser.add_argument(
        "--machine", default="x86_64", help="what `uname -m` says there"
    )
    parser.add_argument("--extra", nargs="*", default=[], help="extras of the package")
    parser.add_argument("--only", nargs="*", help="these alone, if the rest is there")
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="NAME", help="these the machine has"
    )
    parser.add_argument("--for-gpu", action="store_true", help="what `make gpu` needs")
    args = parser.parse_args()
    left_out = [canonicalize_name(name) for name in args.without]
    target = Target(args.python, args.machine)
    roots = {"evomesh": set(args.extra)}
    if args.for_gpu:
        roots |= {name: set() for names in NEEDS.values() for name in names}
        left_out += NOT_FOR_GPU
    versions = needed(roots, target, left_out)
    if args.only:
        chosen = [canonicalize_name(name) for name in args.only]
        versions = {name: versions[name] for name in chosen}
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    options += ["--python-version", args.python, "--dest", str(args.folder)]
    for platform in PLATFORMS:
        options += ["--platform", f"{platform}_{args.machine}"]
    pins = [f"{name}=={version}" for name, version in sorted(versions.items())]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, *pins], check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    remove_other_versions(args.folder, versions)
    sizes = [wheel.stat().st_size for wheel in args.folder.glob("*.whl")]
    print(
        f"{len(sizes)} wheels for Python {args.python}, {mib(sum(sizes))}, in {args.folder}; with the files of the "
        f"checkout {mib(sum(sizes) + checkout_bytes())}"
    )


if __name__ == "__main__":
    main()
