"""``evomesh validate`` against the validation lines that the run itself has written: equal to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.errors import UserError
from tests.support.interpreter import Interpreter
from tests.support.runs import metrics, write_run

SHORT = """
data |= dict(total_steps=4, valid_every=2, valid_micro_num=3)
ckpt |= dict(checkpoint_every=2)
model |= dict(dtype="torch.bfloat16")
optimizer = dict(ema=dict(decay=0.9, validation=True))
"""
LAYOUTS = {
    "tensor": "parallel = dict(tensor=dict(size=2, mode='msp'), zero1=dict(size=1))",
    "pipeline": "model |= dict(num_chunks=1)\nparallel = dict(pipeline=dict(size=2))",
    "sharded weights": "parallel = dict(zero1=dict(size=2, fsdp=True))",
}


def figures_in(row: dict[str, Any], *, ema: bool = False) -> dict[str, float]:
    """The figures of the validation in a row of metrics.jsonl."""
    names = [name for name in row if name.startswith("val/")]
    return {name: row[name] for name in names if (".ema_" in name) == ema}


def ended(interpreter: Interpreter, ranks: int, folder: Path, *command: str) -> str:
    """The standard output of a command that ends well on all ranks."""
    words = ["evomesh", *command]
    running = interpreter.start_ranks(words, ranks, cwd=folder)
    finished = [one.wait(100) for one in running]
    errors = "\n".join(one.stdout + one.stderr for one in finished)
    assert [one.returncode for one in finished] == [0] * ranks, errors
    return "".join(one.stdout for one in finished)


class TestOneProcess:
    def test_figures_of_the_run(
        self,
        tmp_path: Path,
        interpreter: Interpreter,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        write_run(tmp_path, SHORT)
        done = interpreter.run(["evomesh", "train", "config.py"], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows = metrics(tmp_path)
        before = sorted(tmp_path.rglob("*"))

        monkeypatch.chdir(tmp_path)
        runner = CliRunner()

        def validate(*options: str) -> tuple[str, str]:
            result = runner.invoke(app, ["validate", "config.py", *options])
            assert result.exit_code == 0, result.exception
            return result.stdout, result.stderr

        def refused(*options: str) -> str:
            result = runner.invoke(app, ["validate", "config.py", *options])
            assert isinstance(result.exception, UserError)
            assert result.exception.exit_code == 2
            return str(result.exception)

        # 1. The newest checkpoint, an older one, the average, and weights of Hugging Face.
        newest, log = validate("--json")
        found = json.loads(newest)
        assert found["figures"] == figures_in(rows[3])
        assert len(found["figures"]) == 6
        assert found["step"] == 4 and found["ranks"] == 1
        assert "validating the weights of step 4 of ckpts/step-00000004" in log
        assert "validating: 4 batches (code 2, en 2)" in log
        averaged, _ = validate(
            "--ema", "--json", "--set", "data.train_folder=elsewhere"
        )
        assert json.loads(averaged)["figures"] == figures_in(rows[3], ema=True)
        (tmp_path / "empty").mkdir()
        before.append(tmp_path / "empty")
        table, _ = validate(
            "--checkpoint", "ckpts/2", "--set", "data.train_folder=empty"
        )
        title, columns, code, en = table.splitlines()
        assert title == "the weights of step 2 of ckpts/step-00000002"
        assert columns.split() == ["set", "loss", "perplexity", "accuracy", "bits/byte"]
        loss = f"{rows[1]['val/code_loss']:.6g}"
        assert code.split()[:2] == ["code", loss] and en.split()[-1] == "-"
        assert sorted(tmp_path.rglob("*")) == sorted(before)

        command = ["evomesh", "convert", "to-hf", "ckpts", "hf"]
        exported = interpreter.run(command, cwd=tmp_path)
        assert exported.returncode == 0, exported.stderr
        foreign, _ = validate("--checkpoint", "hf", "--json")
        assert json.loads(foreign)["figures"] == figures_in(rows[3])
        assert json.loads(foreign)["step"] is None

        # 2. What cannot be validated.
        errors = refused("--set", "data.valid_folder=None")
        assert "there is nothing to validate on: data.valid_folder is not set" in errors
        errors = refused("--set", "ckpt.save_ckpt_folder=local:new")
        assert "(new) has none, there is no ckpt.load_ckpt_info" in errors
        assert "--checkpoint PATH" in errors
        errors = refused("--set", "model.rope_base=500")
        assert "model.rope_base" in errors
        assert "--set ckpt.allow_changed_model=True" in errors


class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_figures_of_the_run(
        self, layout: str, tmp_path: Path, interpreter: Interpreter
    ) -> None:
        write_run(tmp_path, SHORT + LAYOUTS[layout])
        ended(interpreter, 2, tmp_path, "train", "config.py")
        text = ended(interpreter, 2, tmp_path, "validate", "config.py", "--json")
        rows = metrics(tmp_path)
        found = json.loads(text)
        assert found["figures"] == figures_in(rows[-1])
        assert len(found["figures"]) == 6
        assert found["ranks"] == 2
