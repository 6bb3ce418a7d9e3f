"""What a command imports is what its start costs; modules are counted, not seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


class TestStart:
    @pytest.mark.parametrize(
        "arguments",
        [["--help"], ["train", "--help"], ["config", "--help"]],
        ids=" ".join,
    )
    def test_help_imports_none_of_the_large_packages(
        self, arguments: list[str]
    ) -> None:
        text, names = imported(*arguments)
        assert "Usage:" in text
        assert not names & {
            "torch",
            "numpy",
            "rich",
            "tokenizers",
            "evomesh.config.schema",
        }

    def test_config_check_does_without_torch(self) -> None:
        text, names = imported("config", "check", "configs/7B_sft.py")
        assert ": ok" in text
        assert "pydantic" in names and not names & {
            "torch",
            "tensorboard",
            "transformers",
        }

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
