"""Small training runs through the command line, and what they left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.golden import write_folder

CONFIG = """
JOB_NAME = "tiny"
model_type = "LLAMA2"
model = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_kv_attention_heads=2, mlp_ratio=2.0, multiple_of=16,
    vocab_size=256, no_bias=True, qk_interleaved=False, dtype="torch.float32", max_position_embeddings=64,
)
data = dict(
    seq_len=32, micro_bsz=2, micro_num=2, total_steps=20, train_folder="data/train", valid_folder="data/valid",
)
adam = dict(lr=1e-2)
lr_scheduler = dict(total_steps=20, warmup_ratio=0.1, eta_min=1e-3)
ckpt = dict(save_ckpt_folder="local:ckpts", checkpoint_every=5)
"""


def write_run(folder: Path, extra: str = "") -> Path:
    """A config with its training and validation data in ``folder``; ``extra`` is appended to the config's text."""
    write_folder(folder / "data/train")
    write_folder(folder / "data/valid", documents=7)
    config = folder / "config.py"
    config.write_text(CONFIG + extra)
    return config


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All rows of the run's metrics.jsonl; ``folder`` is the working folder of the command, or the run folder."""
    (path,) = (
        [folder / "metrics.jsonl"]
        if (folder / "metrics.jsonl").exists()
        else folder.glob("RUN/*/*/metrics.jsonl")
    )
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss; a step that stands there twice is an error."""
    rows = [row for row in metrics(folder) if "loss" in row]
    found = {row["step"]: row["loss"] for row in rows}
    assert len(found) == len(rows), "a step was recorded twice"
    return found


def tensor_hashes(checkpoint: Path) -> dict[str, Any]:
    """Name -> hashes of its pieces, read from the index without the package's own reader."""
    (index,) = checkpoint.glob("*-index.jsonl")
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    return {row["name"]: [piece[-1] for piece in row["pieces"]] for row in rows}
