"""Put the shipped configs into a wheel; all other settings of the build are in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs/ into the package, where `evomesh config list` finds them without a checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout has them
            return
        copied = Path(self.build_lib) / "evomesh" / "shipped_configs"
        shutil.rmtree(copied, ignore_errors=True)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree("configs", copied, ignore=ignored)


setup(cmdclass={"build_py": BuildWithConfigs})
