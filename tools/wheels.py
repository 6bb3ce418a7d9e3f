"""Download wheels of the package's dependencies, all but torch's, for a machine without a package index.

Run: make wheels [FOR=3.12]       (or: python tools/wheels.py FOLDER [--python 3.12] [--extra hf serve] [--only NAME])

The other machine brings its own build of torch, made for its GPU. The versions are those installed here, which
`constraints.txt` pins; which packages, their own metadata say. `make gpu` there takes what is missing from the folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def requirements_of(name: str, extras: set[str]) -> list[Requirement]:
    """What an installed distribution asks for on this platform, with these of its extras."""
    found = []
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        environments = [{"extra": extra} for extra in extras | {""}]
        if marker is None or any(marker.evaluate(each) for each in environments):
            found.append(requirement)
    return found


def needed(root: str, extras: set[str]) -> dict[str, str]:
    """Version by name of everything that ``root`` needs, but for torch and what only torch needs."""
    versions: dict[str, str] = {}
    waiting = [(root, extras)]
    while waiting:
        name, wanted = waiting.pop()
        for requirement in requirements_of(name, wanted):
            key = canonicalize_name(requirement.name)
            if key == "torch" or key in versions:
                continue
            try:
                versions[key] = distribution(key).version
            except PackageNotFoundError:
                continue  # of an extra that is not installed here
            waiting.append((key, set(requirement.extras)))
    versions.pop(canonicalize_name(root), None)
    return versions


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
    args = parser.parse_args()
    versions = needed("evomesh", set(args.extra))
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
    sizes = [wheel.stat().st_size for wheel in args.folder.glob("*.whl")]
    print(
        f"{len(sizes)} wheels for Python {args.python}, {sum(sizes) / 1e6:.0f} MB, in {args.folder}"
    )


if __name__ == "__main__":
    main()
