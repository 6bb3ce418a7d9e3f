"""The library with the fake device. It is built without importing torch, which must be loaded after it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")


def compiler() -> str | None:
    """Return the C++ compiler of this machine, if it has one."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def build(folder: Path) -> Path:
    """Compile the library into ``folder``; about two seconds of one core."""
    spec = importlib.util.find_spec("torch")
    program = compiler()
    assert spec is not None and spec.origin is not None and program is not None
    torch = Path(spec.origin).parent
    library = folder / "fake_cuda.so"
    command = [program, "-O0", "-std=c++20", "-shared", "-fPIC", str(SOURCE)]
    command += [f"-I{torch}/include", f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib"]
    command += ["-lc10", "-ltorch_cpu", "-o", str(library)]
    subprocess.run(command, check=True)
    return library
