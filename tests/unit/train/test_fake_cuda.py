"""A training step makes no tensor on the wrong device and reads values on the host once, on a fake CUDA device.

The device is a library of a few lines, since torch's build without CUDA knows no such
device (``tests/support/fake_cuda``); autograd, FSDP2 and fused kernels run as on CUDA.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.fake_cuda.build import build, compiler
from tests.support.fake_cuda.cases import BROKEN, CASES

pytestmark = pytest.mark.slow

GOOD = [case["name"] for case in CASES if "broken" not in case]
# Norm, objective, its z-loss, and the tally of two types: one copy in each of two steps.
ONE_READ_A_STEP = [[3 + 3 * 2]] * 2
BATCH_TENSORS = 5


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return what each case did, from one process for all."""
    library = ""
    if torch.backends.cuda.is_built():
        if not torch.cuda.is_available():
            pytest.skip("autograd of torch's CUDA build asks for a real device")
    else:
        if compiler() is None:
            pytest.skip("no C++ compiler builds the fake device")
        library = str(build(tmp_path_factory.mktemp("fake_cuda")))
    command = [sys.executable, "-m", "tests.support.fake_cuda.steps", library]
    root = Path(__file__).parents[3]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line[0] == "{"]
    return {row.pop("name"): row for row in rows}


@pytest.mark.parametrize("name", GOOD)
def test_one_read_and_every_tensor_on_the_device(
    found: dict[str, dict[str, Any]], name: str
) -> None:
    case = found[name]
    assert "error" not in case, case["error"]
    assert case == {"reads": ONE_READ_A_STEP, "copies": 2 * BATCH_TENSORS}


@pytest.mark.parametrize("name", BROKEN)
def test_what_a_step_must_not_do_is_found(
    found: dict[str, dict[str, Any]], name: str
) -> None:
    case = found[name]
    if name == "a second copy to the host":
        assert case["reads"] == [[], [9], [], [9]]
    else:
        assert BROKEN[name] in case["error"]
