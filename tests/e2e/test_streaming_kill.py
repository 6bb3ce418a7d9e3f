"""A streaming run killed in the middle of its shuffle buffer repeats every loss of the uninterrupted run."""

from __future__ import annotations

import json
import random
import signal
import zipfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.interpreter import Interpreter
from tests.support.runs import metrics, tensor_hashes, write_run

ROWS = 1500  # the buffer holds 1024 of them
STEPS = 120  # one takes about 12 rows
CONFIG = f"""
data |= dict(type="streaming", train_folder="text", valid_folder=None, tokenizer_path="tokenizer.json")
data["total_steps"] = lr_scheduler["total_steps"] = {STEPS}
ckpt |= dict(checkpoint_every=10, oss_snapshot_freq=0)
"""


def write(folder: Path) -> None:
    """A run on text, most of it in an archive."""
    write_run(folder, CONFIG)
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{n}": n for n in range(2, 256)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    draw = random.Random(3)
    texts = [
        " ".join(f"w{draw.randrange(2, 256)}" for _ in range(draw.randrange(1, 20)))
        for _ in range(ROWS)
    ]
    (folder / "text").mkdir()
    (folder / "text/b.txt").write_text("\n".join(texts[:500]))
    with zipfile.ZipFile(folder / "text/a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            rows = texts[500 + number * 250 : 750 + number * 250]
            archive.writestr(
                f"{number}.jsonl",
                "\n".join(json.dumps({"text": text}) for text in rows),
            )


def rows(folder: Path) -> dict[int, Any]:
    """Step -> what a resume must repeat, to the bit; steps that two lives recorded must be equal in both."""
    found: dict[int, Any] = {}
    for path in sorted(folder.glob("RUN/*/*/metrics.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if "loss" in row:
                kept = [
                    row[key]
                    for key in ("loss", "grad_norm", "lr", "num_consumed_tokens")
                ]
                assert found.setdefault(row["step"], kept) == kept, (
                    f"step {row['step']} differs between two lives"
                )
    return found


def test_killed_in_the_middle_of_the_buffer(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    write(straight)
    finished = interpreter.run(["evomesh", "train", "config.py"], cwd=straight)
    assert finished.returncode == 0, finished.stderr
    assert len(metrics(straight)) >= STEPS

    write(killed)
    for step in (25, 95):  # in the first buffer, and in the last of the first pass
        running = interpreter.start(["evomesh", "train", "config.py"], cwd=killed)
        running.wait_for(f"step={step},")
        running.signal(signal.SIGKILL)
        assert running.wait().returncode == -signal.SIGKILL
    finished = interpreter.run(["evomesh", "train", "config.py"], cwd=killed)
    assert finished.returncode == 0, finished.stderr
    assert "step=0," not in finished.stdout + finished.stderr
    assert rows(killed) == rows(straight)
    assert len(rows(killed)) == STEPS
    last = f"ckpts/step-{STEPS:08d}"
    assert tensor_hashes(killed / last) == tensor_hashes(straight / last)
