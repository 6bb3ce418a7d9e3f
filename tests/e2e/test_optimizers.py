"""A run of each update rule, stopped and resumed, in the same layout to the bit and in another one alike."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.support.covers import covers
from tests.support.interpreter import Interpreter
from tests.support.runs import losses, metrics, tensor_hashes, write_run

COMMON = """
data |= dict(total_steps={steps}, micro_num={micro}, valid_every=3)
model |= dict(dtype="{dtype}")
lr_scheduler["total_steps"] = 6
optimizer = dict(type="{rule}", **{more})
parallel = dict({parallel})
adam["groups"] = {groups}
"""
STEPS, PACKS = 6, 4


def train(
    interpreter: Interpreter,
    folder: Path,
    rule: str,
    *,
    steps: int = STEPS,
    ranks: int = 1,
    parallel: str = "",
    dtype: str = "torch.bfloat16",
    more: str = "{}",
    groups: str = "[]",
) -> str:
    data_ranks = ranks if not parallel else 1
    extra = COMMON.format(
        steps=steps,
        micro=PACKS // data_ranks,
        rule=rule,
        parallel=parallel,
        dtype=dtype,
        more=more,
        groups=groups,
    )
    write_run(folder, extra)
    command = ["evomesh", "train", "config.py"]
    running = (
        interpreter.start_ranks(command, ranks, cwd=folder)
        if ranks > 1
        else [interpreter.start(command, cwd=folder)]
    )
    finished = [one.wait(100) for one in running]
    texts = [one.stdout + one.stderr for one in finished]
    assert [one.returncode for one in finished] == [0] * ranks, texts
    return "".join(texts)


@pytest.mark.parametrize("rule", ["muon", "lion", "schedule_free"])
def test_resumes_to_the_bit(
    tmp_path: Path, interpreter: Interpreter, rule: str
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(interpreter, straight, rule)
    train(interpreter, stopped, rule, steps=3)
    assert "resuming step 3" in train(interpreter, stopped, rule)
    assert losses(stopped) == losses(straight)
    last = "ckpts/step-00000006"
    assert tensor_hashes(stopped / last) == tensor_hashes(straight / last)
    names = tensor_hashes(straight / last)
    kind = "z" if rule == "schedule_free" else "momentum"
    assert f"optim.{kind}.layers.1.attention.wqkv.weight" in names


@covers("optimizer.ema.validation")
def test_an_average_beside_the_weights(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    """Resumed to the bit, validated; without it the training is the same."""
    straight, stopped, plain = (tmp_path / name for name in ("a", "b", "c"))
    ema = "dict(ema=dict(decay=0.9, every=2, validation=True))"
    train(interpreter, straight, "adamw", more=ema)
    train(interpreter, stopped, "adamw", more=ema, steps=3)
    train(interpreter, stopped, "adamw", more=ema)
    train(interpreter, plain, "adamw")
    assert losses(stopped) == losses(straight) == losses(plain)
    last = "ckpts/step-00000006"
    assert tensor_hashes(stopped / last) == tensor_hashes(straight / last)
    validated = [row for row in metrics(straight) if "val/en_loss" in row]
    assert [row["step"] for row in validated] == [2, 5]
    for row in validated:
        assert 0 < abs(row["val/en.ema_loss"] - row["val/en_loss"]) < 1


def test_muon_goes_on_in_other_layouts(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    """With two groups of parameters, of which each stage of a pipeline has one."""
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    groups = (
        '[dict(pattern="embedding*", lr_scale=0.5), dict(pattern="*.1.*", lr_scale=2)]'
    )
    run = partial(train, interpreter, rule="muon", dtype="torch.float64", groups=groups)
    table = run(straight)
    assert "1      embedding*" in table
    run(moved, steps=2, ranks=2, parallel="pipeline=2")
    run(moved, steps=4, ranks=2)
    run(moved)
    assert losses(moved) == pytest.approx(losses(straight), rel=1e-10)
    for row in metrics(straight):
        assert row["lr/group1"] == row["lr"] / 2 and row["lr/group2"] == row["lr"] * 2


def test_another_rule_is_refused_and_started_anew_on_request(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    train(interpreter, tmp_path, "adamw", steps=2, dtype="torch.float32")
    config = write_run(
        tmp_path, 'optimizer = dict(type="muon")\ndata["total_steps"] = 4\n'
    )
    refused = interpreter.start(["evomesh", "train", "config.py"], cwd=tmp_path).wait(
        60
    )
    assert refused.returncode == 2
    assert "optimizer.type is 'adamw' in the checkpoint" in refused.stderr
    with config.open("a") as file:
        file.write(
            'ckpt |= dict(save_ckpt_folder="local:new", auto_resume=False, load_ckpt_info=dict('
            'path="local:ckpts/2", content=("model", "scheduler", "sampler")))\n'
        )
    anew = interpreter.start(["evomesh", "train", "config.py"], cwd=tmp_path).wait(60)
    assert anew.returncode == 0, anew.stderr
