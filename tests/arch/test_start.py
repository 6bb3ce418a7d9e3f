"""What a command imports is what its start costs; modules are counted, not seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.golden import write_bin
from tests.support.runs import metrics, write_run

pytestmark = pytest.mark.slow

COMMAND = """
import sys
from evomesh.cli.main import main
sys.argv = ["evomesh", *sys.argv[1:]]
try:
    main()
finally:
    print("IMPORTED", *sys.modules)
"""


def imported(*arguments: str, cwd: Path = Path()) -> tuple[str, set[str]]:
    command = [sys.executable, "-c", COMMAND, *arguments]
    env = os.environ | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=cwd, env=env
    )
    text, _, names = done.stdout.rpartition("IMPORTED ")
    return text, set(names.split())


# Packages and modules whose import takes longer than the rest of a command.
LARGE = {
    "boto3", "datasets", "evomesh.config.schema", "fastapi", "gradio", "numpy", "rich",
    "tensorboard", "tokenizers", "torch", "transformers",
}  # fmt: skip
# Command -> which of them it may import.
MAY_IMPORT: dict[str, set[str]] = {
    "--help": set(),
    "train --help": set(),
    "run --help": set(),
    "config --help": set(),
    "config list": set(),
    "batch --gpus 8 --micro-num 4 --micro-bsz 1 --seq-len 2048": {
        "evomesh.config.schema"
    },
    "config check configs/7B_sft.py": {"evomesh.config.schema"},
    "config show configs/demo.py": {"evomesh.config.schema"},
    "slurm configs/demo.py --gpus-per-node 1": {"evomesh.config.schema"},
    "data verify {tokens}": {"numpy"},
    "data repair {tokens}": {"numpy"},
}


class TestStart:
    @pytest.mark.parametrize("command", MAY_IMPORT)
    def test_a_command_imports_no_other_large_package(
        self, command: str, tmp_path: Path
    ) -> None:
        write_bin(tmp_path / "a.bin", [[1, 2, -3]])
        words = command.format(tokens=tmp_path / "a.bin").split()
        text, names = imported(*words)
        assert text  # it did its work
        assert "evomesh.cli.app" in names
        assert names & LARGE <= MAY_IMPORT[command]

    def test_a_run_on_one_process_brings_in_neither_compiler_nor_dtensor(
        self, tmp_path: Path
    ) -> None:
        config = write_run(tmp_path)
        settings = [
            "data.total_steps=1",
            "lr_scheduler.warmup_ratio=0",
            "enable_tb=False",
        ]
        _, names = imported(
            "train",
            str(config),
            *[part for one in settings for part in ("--set", one)],
            cwd=tmp_path,
        )
        assert len(metrics(tmp_path)) == 1
        assert not names & {
            "torch._dynamo",
            "torch.distributed.tensor",
            "torch.distributed.fsdp",
            "transformers",
        }
