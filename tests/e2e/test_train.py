"""The training command on real files: what it prints, writes, resumes and refuses."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.covers import covers
from tests.support.golden import write_bin
from tests.support.interpreter import Interpreter
from tests.support.runs import losses, metrics, tensor_hashes, write_run

STEP_KEYS = [
    "tflops",
    "step",
    "loss",
    "tgs (tokens/gpu/second)",
    "lr",
    "loss_scale",
    "grad_norm",
    "micro_num",
    "num_consumed_tokens",
    "inf_nan_skip_batches",
    "num_samples_in_batch",
    "largest_length",
    "largest_batch",
    "smallest_batch",
    "adam_beta2",
    "fwd_bwd_time",
]
LINE = re.compile(
    r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})\t(\w+) (\S+\.py):(\d+) in (\w+) -- (tflops=.*)$",
    re.M,
)
FLOAT16 = """
model["dtype"] = "torch.float16"
grad_scaler = dict(fp16=dict(initial_scale=2.0**33, min_scale=1, growth_interval=4), max_scale=2.0**34, hysteresis=1)
"""
GRAD_PROFILING = """
grad_profiling = dict(
    grad_norm_profiling=True, zero_grad_profiling=True, vocab_grad_norm_profiling=True, interval_steps=8,
)
"""
BFLOAT16 = 'model["dtype"] = "torch.bfloat16"\nmodel["checkpoint"] = 0.5\n'


def train(
    interpreter: Interpreter, folder: Path, *options: str, expect: int = 0
) -> str:
    finished = interpreter.run(["evomesh", "train", "config.py", *options], cwd=folder)
    assert finished.returncode == expect, finished.stderr[-3000:]
    return finished.stdout + finished.stderr


@covers(
    "JOB_NAME",
    "data.total_steps",
    "data.train_folder",
    "data.valid_folder",
    "data.valid_every",
)
def test_a_run_prints_the_documents_line_and_records_the_same_numbers(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    write_run(tmp_path, 'data["valid_every"] = 10\n' + GRAD_PROFILING)
    output = train(interpreter, tmp_path)
    lines = [match.group(6) for match in LINE.finditer(output)]
    assert len(lines) == 20, output[-3000:]
    rows = [row for row in metrics(tmp_path) if "loss" in row]
    for step, (line, row) in enumerate(zip(lines, rows, strict=True)):
        fields = [part.split("=", 1) for part in line.split(",")]
        assert [key for key, _ in fields] == STEP_KEYS
        printed = dict(fields)
        assert int(printed["step"]) == row["step"] == step
        assert float(printed["loss"]) == row["loss"]
        assert float(printed["lr"]) == row["lr"]
        assert int(printed["num_consumed_tokens"]) == (step + 1) * 128
    assert rows[0]["lr"] == 5e-3  # two warm-up steps to 1e-2, the one used in this step
    assert abs(rows[0]["loss"] - math.log(256)) < 0.05
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.8
    validations = [row for row in metrics(tmp_path) if "val/en_loss" in row]
    assert [row["step"] for row in validations] == [9, 19]
    # Before the first step, as figures of it.
    assert [row["step"] for row in rows if "val_start/en_loss" in row] == [0]
    assert abs(rows[0]["val_start/en_loss"] - math.log(256)) < 0.05
    assert output.count("Validation on en: before the first step val/en_loss=") == 1
    assert {"val/en_acc", "val/en_plex", "val/code_loss"} <= set(validations[0])
    assert math.isclose(
        validations[0]["val/en_plex"], math.exp(validations[0]["val/en_loss"])
    )
    assert list(tmp_path.glob("RUN/tiny/*/**/events.out.tfevents*"))

    measured = [row for row in rows if "layer_grad_norm/layers.1" in row]
    assert [row["step"] for row in measured] == [0, 8, 16]
    for row in measured:
        layers = [row[key] for key in row if key.startswith("layer_grad_norm/")]
        assert math.isclose(math.hypot(*layers), row["grad_norm"], rel_tol=1e-6)
        assert row["layer_zero_grad/embedding"] % 32 == 0  # whole rows of tokens
    files = sorted(tmp_path.glob("RUN/tiny/*/grad_norm/*"))
    assert [int(path.stem.rpartition("-")[2]) for path in files] == [0, 8, 16]
    head = measured[-1]["layer_grad_norm/head"]
    assert math.isclose(np.linalg.norm(np.load(files[-1])), head, rel_tol=1e-5)


def last_row(path: Path) -> Any:
    return json.loads(path.read_text().splitlines()[-1])


@covers("data.valid_at_start", "data.valid_at_end", "data.stop_when")
def test_validation_at_both_ends_changes_no_step_and_ends_a_run_that_does_not_improve(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    dropout = 'model["drop_rate"] = 0.1\nenable_tb = False\ndata["total_steps"] = 5\n'
    plain, validated = tmp_path / "plain", tmp_path / "validated"
    write_run(plain, dropout)
    train(interpreter, plain)
    write_run(validated, dropout + 'data["valid_every"] = 2\n')
    train(interpreter, validated)
    assert losses(validated) == losses(plain)
    found = [row["step"] for row in metrics(validated) if "val/en_loss" in row]
    assert found == [1, 3, 4]

    # Nothing counts as a gain: the first validation is the best, two more end the run.
    write_run(validated, dropout + 'data["valid_every"] = 1\n')
    text = (validated / "config.py").read_text()
    text += 'data["valid_at_start"] = False\n'
    text += (
        'data["stop_when"] = dict(metric="val/en_loss", patience=2, min_delta=9.0)\n'
    )
    text += 'monitor = dict(trackers=[dict(type="jsonl")])\nrun_dir = "ended"\n'
    (validated / "config.py").write_text(text.replace('"local:ckpts"', '"local:other"'))
    output = train(interpreter, validated)
    # It is complete, for whoever watches it: status, alerts, trackers.
    (status,) = (validated / "ended/status").glob("*.jsonl")
    assert last_row(status)["phase"] == "done"
    assert last_row(validated / "ended/alerts.jsonl")["kind"] == "done"
    finish = {"event": "finish", "complete": True}
    assert last_row(validated / "ended/tracker.jsonl") == finish
    assert "stopped after 3 steps: val/en_loss has not improved on 5." in output
    assert "before the first step" not in output
    assert (validated / "other/step-00000003/commit.json").exists()
    again = train(interpreter, validated)
    assert "stopped after 3 steps" in again and "step=3," not in again

    wrong = train(
        *(interpreter, validated, "--set", "data.stop_when.metric=val/xx_loss"),
        expect=2,
    )
    assert "no validation of this run gives 'val/xx_loss'" in wrong
    assert "one of val/code_loss, val/code_acc" in wrong


@covers("data.skip_batches", "promise:skip-batches")
@pytest.mark.parametrize(
    "extra",
    [
        "",
        FLOAT16,
        BFLOAT16,
        'model["dtype"] = "torch.float64"\n',
        'model["dtype"] = "tf32"\n',
    ],
    ids=["float32", "float16", "bfloat16", "float64", "tf32"],
)
def test_stopped_and_resumed_equals_straight_to_the_bit(
    tmp_path: Path, interpreter: Interpreter, extra: str
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for folder in (straight, resumed):
        write_run(
            folder,
            extra + 'data["valid_every"] = 7\ndata["skip_batches"] = "3,12-13"\n',
        )
    train(interpreter, straight)
    train(interpreter, resumed, "--set", "data.total_steps=10")
    assert max(losses(resumed)) == 9
    output = train(interpreter, resumed)
    assert "step-00000010" in output
    # The resumed run used the same run folder.
    assert len(list(resumed.glob("RUN/tiny/*"))) == 1
    assert losses(resumed) == losses(straight)
    assert set(losses(straight)) == set(range(20)) - {3, 12, 13}
    hashes = tensor_hashes(straight / "ckpts/step-00000020")
    assert tensor_hashes(resumed / "ckpts/step-00000020") == hashes
    assert any(name.startswith("optim.exp_avg_sq.") for name in hashes)
    skipped = [
        row["inf_nan_skip_batches"]
        for row in metrics(straight)
        if "inf_nan_skip_batches" in row
    ]
    # The scale starts too high, so that steps are skipped.
    assert (skipped[-1] > 0) == (extra == FLOAT16)
    assert metrics(resumed)[-1].get("loss_scale") == metrics(straight)[-1].get(
        "loss_scale"
    )


def test_a_finished_run_started_again_does_nothing(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    write_run(tmp_path)
    train(interpreter, tmp_path, "--set", "data.total_steps=5")
    before = metrics(tmp_path)
    assert "nothing left to train" in train(
        interpreter, tmp_path, "--set", "data.total_steps=5"
    )
    assert metrics(tmp_path) == before


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)]
)
def test_a_signal_ends_with_a_checkpoint_and_the_resumed_run_is_the_same(
    tmp_path: Path, interpreter: Interpreter, number: int, code: int
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        write_run(
            folder,
            'data["total_steps"] = lr_scheduler["total_steps"] = 400\nckpt["checkpoint_every"] = 1000\n',
        )
    train(interpreter, straight)
    running = interpreter.start(["evomesh", "train", "config.py"], cwd=stopped)
    running.wait_for("step=7,")
    running.signal(number)
    finished = running.wait()
    assert finished.returncode == code, finished.stderr
    (saved,) = stopped.glob("ckpts/step-*/commit.json")
    last = max(losses(stopped))
    assert saved.parent.name == f"step-{last + 1:08d}"
    assert last < 399
    train(interpreter, stopped)
    assert losses(stopped) == losses(straight)


@covers("run_dir")
def test_the_documents_train_py(tmp_path: Path, interpreter: Interpreter) -> None:
    write_run(tmp_path)
    script = str(Path(__file__).parents[2] / "train.py")
    finished = interpreter.run(
        [script, "--config", "config.py", "--run-dir", "here"], cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    assert set(losses(tmp_path / "here")) == set(range(20))


@covers("ckpt.enable_save_ckpt", "promise:synthetic-data")
def test_synthetic_data_and_no_checkpoint(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    write_run(
        tmp_path,
        'data["train_folder"] = data["valid_folder"] = None\nckpt = dict(enable_save_ckpt=False)\n',
    )
    output = train(interpreter, tmp_path)
    assert "synthetic" in output
    assert not (tmp_path / "ckpts").exists()
    assert losses(tmp_path)[19] < losses(tmp_path)[0]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--set", "data.train_folder=nowhere"], ["nowhere", "train_folder"]),
        (["--set", "data.seq_len=4096"], ["8,192", "tokens"]),
        (["--set", "model.vocab_size=100"], ["data.bin", "100"]),
        (["--set", "model.hidden_size=33"], ["hidden_size", "33", "4"]),
        (["--set", "data.micro_bzs=1"], ["micro_bzs", "micro_bsz"]),
        (["--launcher", "slrum"], ["slrum", "slurm"]),
        (
            [
                "--set",
                "ckpt.auto_resume=False",
                "--set",
                'ckpt.load_ckpt_info={"path": "none", "content": ["model"]}',
            ],
            ["none"],
        ),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    tmp_path: Path, interpreter: Interpreter, options: list[str], parts: list[str]
) -> None:
    write_run(tmp_path)
    output = train(interpreter, tmp_path, *options, expect=2)
    for part in parts:
        assert part in output
    assert "Traceback" not in output
    assert not (tmp_path / "ckpts").exists()
    assert not (tmp_path / "RUN").exists()


def spoil_line(data: Path) -> None:
    lines = data.read_bytes().splitlines(keepends=True)
    data.write_bytes(
        b"".join([*lines[:-2], b"x" * (len(lines[-2]) - 1) + b"\n", lines[-1]])
    )


def spoil_id(data: Path) -> None:
    head, comma, tail = data.read_bytes().rpartition(b", ")
    _, bracket, rest = tail.partition(b"]")
    data.write_bytes(head + comma + b"9" * 3 + bracket + rest)


def spoil_offset(data: Path) -> None:
    path = Path(f"{data}.meta")
    with path.open("rb") as file:
        rows = np.load(file)
    rows[-2, 0] += 1
    with path.open("wb") as file:
        np.save(file, rows)


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (spoil_line, "{lines} byte {start}: the line is not JSON"),
        (spoil_id, "is 999, outside the vocabulary"),
        (spoil_offset, "offset {shifted} is not the start of a line"),
    ],
)
def test_bad_data_anywhere_in_a_file_ends_the_run_before_it_writes(
    tmp_path: Path,
    interpreter: Interpreter,
    spoil: Callable[[Path], None],
    part: str,
    split: str,
) -> None:
    write_run(tmp_path, 'data["valid_every"] = 10\n' + GRAD_PROFILING)
    data = tmp_path / "data" / split / "en/data.bin"
    lines = data.read_bytes().splitlines(keepends=True)
    start = sum(map(len, lines[:-2]))
    spoil(data)
    output = train(interpreter, tmp_path, expect=2)
    assert (
        part.format(lines=f"line {len(lines) - 1}", start=start, shifted=start + 1)
        in output
    )
    assert f"data/{split}/en/data.bin" in output
    assert "Traceback" not in output
    assert not (tmp_path / "ckpts").exists()
    assert not (tmp_path / "RUN").exists()


def test_a_bad_line_of_large_data_ends_the_run_when_it_is_read_and_costs_nothing_else(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):  # no data is small now
        write_run(
            folder,
            "from evomesh.data.token_files import bin_dataset\nbin_dataset.CHECKED_BYTES = 0\n",
        )
    train(interpreter, straight)
    data = stopped / "data/train/en/data.bin"
    whole = data.read_bytes()
    lines = whole.splitlines(keepends=True)
    data.write_bytes(
        b"".join([*lines[:30], b"x" * (len(lines[30]) - 1) + b"\n", *lines[31:]])
    )
    output = train(interpreter, stopped, expect=2)
    assert (
        "data/train/en/data.bin line 31 byte" in output
        and "the line is not JSON" in output
    )
    assert "Traceback" not in output
    assert 0 < len(losses(stopped)) < 20
    data.write_bytes(whole)
    train(interpreter, stopped)
    assert losses(stopped) == losses(straight)


@pytest.mark.parametrize("key", ["run_dir", "tensorboard_folder"])
def test_a_file_where_a_folder_should_be_made(
    tmp_path: Path, interpreter: Interpreter, key: str
) -> None:
    write_run(tmp_path, f'{key} = "taken/here"\n')
    (tmp_path / "taken").touch()
    output = train(interpreter, tmp_path, expect=2)
    assert f"{key} (taken/here" in output
    assert "taken is a file" in output
    assert not (tmp_path / "ckpts").exists()
    assert not (tmp_path / "RUN").exists()


def test_a_checkpoint_of_another_shape_names_the_key_then_the_first_tensor_and_both_shapes(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    write_run(tmp_path)
    train(interpreter, tmp_path, "--set", "data.total_steps=2")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    another = ["--set", "model.hidden_size=48"]
    output = train(interpreter, tmp_path, *another, expect=2)
    assert re.search(r"model\.hidden_size.*32.*48", output)
    output = train(
        interpreter,
        tmp_path,
        *another,
        "--set",
        "ckpt.allow_changed_model=True",
        expect=2,
    )
    assert {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")
    } == before  # nothing was written
    assert "embedding.weight" in output
    assert "256,32" in output.replace(" ", "")
    assert "256,48" in output.replace(" ", "")


@covers("max_consecutive_skips")
def test_a_run_of_nan_steps_stops_with_its_own_exit_code(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    """And warns first that another tokenizer made its data."""
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    write_run(
        tmp_path,
        "data['tokenizer_path'] = 'tokenizer.json'\n"
        "adam['lr'] = 1e30\nhybrid_zero_optimizer = dict(clip_grad_norm=0.0)\nmax_consecutive_skips = 3\n",
    )
    record = tmp_path / "data/train/en/data.bin.json"
    record.write_text('{"tokenizer": "a.model", "tokenizer_hash": "8888888888888"}')
    output = train(interpreter, tmp_path, expect=6)
    assert "data.bin: made with another tokenizer (a.model 888888888888)" in output
    assert "for 3 consecutive steps" in output


def test_a_save_folder_that_is_a_file(tmp_path: Path, interpreter: Interpreter) -> None:
    write_run(tmp_path, 'ckpt["save_ckpt_folder"] = "taken/ckpts"\n')
    (tmp_path / "taken").touch()
    output = train(interpreter, tmp_path, expect=2)
    assert "taken is a file" in output
    assert "a folder, or a name that is still free" in output
    assert "ckpt.save_ckpt_folder" in output
    assert "Traceback" not in output
    output = train(
        interpreter, tmp_path, "--set", "ckpt.save_ckpt_folder=taken", expect=2
    )
    assert "taken is a file" in output


def test_a_signal_breaks_a_long_step_off_and_the_resumed_run_repeats_it(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        write_run(
            folder,
            BFLOAT16
            + 'data |= dict(total_steps=5, micro_num=70, rampup_batch_size="35 35 2")\n',
        )
    train(interpreter, straight)
    running = interpreter.start(["evomesh", "train", "config.py"], cwd=stopped)
    # Into the middle of a step: the pause after the first one is longer than the others.
    running.wait_for("step=0,")
    started = time.monotonic()
    running.wait_for("step=1,")
    time.sleep(0.4 * (time.monotonic() - started))
    running.signal(signal.SIGTERM)
    finished = running.wait()
    assert finished.returncode == 75, finished.stderr
    off = re.search(
        r"step (\d) was interrupted between micro-batches",
        finished.stdout + finished.stderr,
    )
    assert off is not None, "the step ran to its end"
    step = int(off[1])
    assert set(losses(stopped)) == set(range(step))
    assert [path.parent.name for path in stopped.glob("ckpts/step-*/commit.json")] == [
        f"step-{step:08d}"
    ]
    train(interpreter, stopped)
    assert losses(stopped) == losses(straight)
    assert [row.get("grad_norm") for row in metrics(stopped)] == [
        row.get("grad_norm") for row in metrics(straight)
    ]
    last = "ckpts/step-00000005"
    assert tensor_hashes(stopped / last) == tensor_hashes(straight / last)


def test_a_full_disk_of_the_run_folder_does_not_stop_training(tmp_path: Path) -> None:
    """The limit of file sizes stands for a disk on which nothing more fits; pipes have no size."""
    full = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
    write_run(tmp_path, full + 'ckpt["enable_save_ckpt"] = False\n')
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "evomesh", "train", "config.py"]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    output = ended.stdout + ended.stderr
    assert ended.returncode == 0, output[-3000:]
    assert "step=19," in output
    assert output.count("cannot write metrics.jsonl") == 1
    assert output.count("cannot write the log file") == 1
    assert "Traceback" not in output and "Logging error" not in output
    (log,) = tmp_path.glob("RUN/*/*/metrics.jsonl")
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(len(steps)))


def test_a_run_folder_that_is_removed_does_not_stop_training(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    long = 'data["total_steps"] = lr_scheduler["total_steps"] = 400\nckpt["checkpoint_every"] = 1000\n'
    write_run(tmp_path, long)
    running = interpreter.start(["evomesh", "train", "config.py"], cwd=tmp_path)
    running.wait_for("step=3,")
    shutil.rmtree(tmp_path / "RUN")
    finished = running.wait()
    assert finished.returncode == 0, finished.stderr
    output = finished.stdout + finished.stderr
    assert "step=399," in output and "Traceback" not in output
    assert output.count("cannot write metrics.jsonl (the file was removed") == 1
    assert (tmp_path / "ckpts/step-00000400/commit.json").exists()


@pytest.mark.parametrize("reduction", ["token", "micro_batch"])
def test_a_step_without_a_target_ends_the_run_and_can_be_left_out(
    tmp_path: Path, interpreter: Interpreter, reduction: str
) -> None:
    """Half of the packs are masked; following the message step by step trains the others."""
    write_run(
        tmp_path,
        f'data |= dict(micro_bsz=1, micro_num=1, total_steps=6)\nloss = dict(reduction="{reduction}")\n',
    )
    shutil.rmtree(tmp_path / "data/train")
    ids = list(range(1, 33))
    documents = [ids if i % 2 else [-token for token in ids] for i in range(6)]
    write_bin(tmp_path / "data/train/en/a.bin", documents)
    skipped: list[str] = []

    def options() -> list[str]:
        steps = ",".join(skipped)
        return ["--run-dir", "run", "--set", f"data.skip_batches='{steps}'"]

    for _ in range(3):
        output = train(interpreter, tmp_path, *options(), expect=2)
        found = re.search(r"step (\d+): none of its 32 tokens is a target", output)
        assert found and f'data.skip_batches="{found[1]}"' in output
        skipped.append(found[1])
    train(interpreter, tmp_path, *options())
    assert sorted([*losses(tmp_path / "run"), *map(int, skipped)]) == list(range(6))
