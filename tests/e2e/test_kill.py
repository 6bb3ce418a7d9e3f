"""kill -9 at random moments: no committed checkpoint is lost, and every loss is that of the uninterrupted run.

EVOMESH_KILLS and EVOMESH_KILLS_RANKS set how many kills of one process, and of one of four; EVOMESH_SEED when.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from evomesh.checkpoint.native import find
from evomesh.checkpoint.native.verify import verify
from evomesh.storage.base import Storage
from evomesh.storage.local import LocalStorage
from evomesh.storage.urls import open_storage
from tests.support.covers import covers
from tests.support.interpreter import Interpreter, Running
from tests.support.moto_store import moto_store
from tests.support.runs import losses, tensor_hashes, write_run

KILLS = int(os.environ.get("EVOMESH_KILLS", "40"))
KILLS_RANKS = int(os.environ.get("EVOMESH_KILLS_RANKS", "10"))
SEED = int(os.environ.get("EVOMESH_SEED", "7"))
STEPS = 80
COMMON = f"""
model |= dict(num_layers=1, hidden_size=16, num_attention_heads=2, num_kv_attention_heads=1)
data["total_steps"] = lr_scheduler["total_steps"] = {STEPS}
data["valid_every"] = 25
ckpt |= dict(checkpoint_every=4, oss_snapshot_freq=2, keep_last=2)
"""
VARIANTS = {
    "float32": "",
    "bfloat16": 'model["dtype"] = "torch.bfloat16"\n',
    "float16": """
model["dtype"] = "torch.float16"
data |= dict(rampup_batch_size="1 1 30", skip_batches="11,40-41")
grad_scaler = dict(fp16=dict(initial_scale=2.0**33, min_scale=1, growth_interval=4), max_scale=2.0**34, hysteresis=1)
""",
}


def start(interpreter: Interpreter, folder: Path, ranks: int) -> Sequence[Running]:
    command = ["evomesh", "train", "config.py"]
    if ranks == 1:
        return [interpreter.start(command, cwd=folder)]
    return interpreter.start_ranks([*command, "--launcher", "torch"], ranks, cwd=folder)


def finish(running: Sequence[Running]) -> None:
    for one in running:
        finished = one.wait(300)
        assert finished.returncode == 0, finished.stderr[-3000:]


def rows(folder: Path) -> dict[int, str]:
    """Step -> all that the run recorded of it which a resume must repeat, as text, so that equal means bit-equal.

    A step that stands there twice must be the same both times. The last line may be torn by a kill.
    """
    found: dict[int, str] = {}
    for path in folder.glob("RUN/*/*/metrics.jsonl"):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            kept = {
                key: row.get(key)
                for key in (
                    "loss",
                    "grad_norm",
                    "lr",
                    "loss_scale",
                    "num_consumed_tokens",
                )
            }
            text = json.dumps(kept)
            assert found.setdefault(row["step"], text) == text, (
                f"step {row['step']} differs between two lives"
            )
    return found


def verify_all(folder: Path) -> int:
    """Every committed checkpoint verifies; the newest step."""
    return verify_in(LocalStorage(), str(folder / "ckpts"))


def verify_in(storage: Storage, root: str) -> int:
    committed = [c for c in find.all_candidates(storage, root) if c.committed]
    for choice in committed:
        verify(choice, "data")
    return max((c.step for c in committed), default=0)


def killed_until_done(
    interpreter: Interpreter, folder: Path, ranks: int, kills: int, draw: random.Random
) -> int:
    """Kills the run up to ``kills`` times at random moments and lets it finish; the number of kills that hit."""
    hits, safe = 0, 0
    while hits < kills:
        running = start(interpreter, folder, ranks)
        # Mostly while it trains and saves, sometimes while it starts.
        if draw.random() < 0.8:
            running[0].wait_for("step=", timeout=120)
        time.sleep(draw.uniform(0, 0.3))
        try:
            running[draw.randrange(ranks)].signal(signal.SIGKILL)
        except ProcessLookupError:
            break
        for one in running:
            one.kill()  # what a launcher does to the other ranks
        newest = verify_all(folder)
        assert newest >= safe, (
            f"a committed checkpoint was lost: step {safe}, now {newest}"
        )
        hits, safe = hits + 1, newest
        if newest >= STEPS:
            break
    finish(start(interpreter, folder, ranks))
    return hits


def run_kills(
    tmp_path: Path,
    interpreter: Interpreter,
    ranks: int,
    kills: int,
    variants: Sequence[str],
) -> None:
    draw = random.Random(SEED)
    references: dict[str, tuple[dict[int, str], object]] = {}
    done = lives = 0
    while done < kills:
        name = variants[lives % len(variants)]
        if name not in references:
            straight = tmp_path / f"straight-{name}"
            write_run(straight, COMMON + VARIANTS[name])
            finish(start(interpreter, straight, ranks))
            assert max(losses(straight)) == STEPS - 1
            references[name] = (
                rows(straight),
                tensor_hashes(straight / f"ckpts/step-{STEPS:08d}"),
            )
        folder = tmp_path / f"killed-{lives}"
        write_run(folder, COMMON + VARIANTS[name])
        share = min(kills - done, -(-kills // len(variants)))
        done += killed_until_done(interpreter, folder, ranks, share, draw)
        curve, weights = references[name]
        assert rows(folder) == curve
        assert tensor_hashes(folder / f"ckpts/step-{STEPS:08d}") == weights
        lives += 1
    print(
        f"{done} kills over {lives} runs on {ranks} ranks: 0 committed checkpoints lost, 0 losses different"
    )


@covers("ckpt.oss_snapshot_freq")
@pytest.mark.timeout(900)
def test_one_process(tmp_path: Path, interpreter: Interpreter) -> None:
    run_kills(tmp_path, interpreter, 1, KILLS, list(VARIANTS))


@pytest.mark.timeout(900)
def test_four_ranks(tmp_path: Path, interpreter: Interpreter) -> None:
    run_kills(tmp_path, interpreter, 4, KILLS_RANKS, ["bfloat16"])


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty bucket on a server in this process, which no kill reaches."""
    for name in ("S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, "k")
    with moto_store("runs") as address:
        yield f"s3:http://{address}/runs"


@covers("ckpt.async_upload_tmp_folder")
@pytest.mark.timeout(900)
def test_staged_upload(tmp_path: Path, interpreter: Interpreter, bucket: str) -> None:
    """Kill the run while a file is in ``async_upload_tmp_folder``, once for a checkpoint and once for a snapshot."""
    straight, folder, stage = (
        tmp_path / "straight",
        tmp_path / "killed",
        tmp_path / "stage",
    )
    short = (
        COMMON
        + 'data["total_steps"] = lr_scheduler["total_steps"] = 24\nckpt["oss_snapshot_freq"] = 2\n'
    )
    write_run(straight, short)
    finish(start(interpreter, straight, 1))
    upload = f"save_ckpt_folder={f'{bucket}/one'!r}, async_upload=True, async_upload_tmp_folder={str(stage)!r}"
    write_run(folder, f"{short}ckpt |= dict({upload})\n")
    storage, root = open_storage(f"{bucket}/one")
    keys = {"S3_ACCESS_KEY_ID": "k", "S3_SECRET_ACCESS_KEY_ID": "k"}
    safe = 0
    for place in ("rank0", "rank0-snapshot"):
        running = interpreter.start(
            ["evomesh", "train", "config.py"], cwd=folder, env=keys
        )
        deadline = time.monotonic() + 120
        running.wait_for("committed", timeout=120)
        while not list(stage.glob(f"*-{place}/*.safetensors")):
            assert time.monotonic() < deadline, (
                f"nothing was ever staged in {place}\n{running.stderr[-3000:]}"
            )
        running.signal(signal.SIGKILL)
        running.kill()
        newest = verify_in(storage, root)
        assert newest >= max(safe, 1), "a committed checkpoint was lost"
        safe = newest
    finished = interpreter.run(
        ["evomesh", "train", "config.py"], cwd=folder, env=keys, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert verify_in(storage, root) == 24
    assert rows(folder) == rows(straight)
    assert not [path for path in stage.rglob("*") if path.is_file()]
    (index,) = (
        name
        for name in storage.list(f"{root}/step-00000024")
        if name.endswith("-index.jsonl")
    )
    entries = [
        json.loads(line)
        for line in storage.read(f"{root}/step-00000024/{index}").splitlines()
    ]
    found = {
        entry["name"]: [piece[-1] for piece in entry["pieces"]] for entry in entries
    }
    assert found == tensor_hashes(straight / "ckpts/step-00000024")
