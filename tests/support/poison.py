"""A run whose data has one poisoned document: garbage repeated, among counting sequences that a model soon knows."""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.golden import write_bin
from tests.support.runs import CONFIG

LENGTH = 32  # tokens of each document and of a pack: a document is a pack
DOCUMENTS = 192
COUNTED = 24  # the ids of the counting sequences
POISONED = "en/data.bin", 32  # file and row
STEP = 27  # that reads it, in micro-batch 2
GARBAGE = [251, 7, 199, 251]
STEPS = 40
EXTRA = f"""
data = dict(seq_len={LENGTH}, micro_bsz=1, micro_num=4, total_steps={STEPS}, train_folder="data/train")
lr_scheduler = dict(total_steps={STEPS}, warmup_ratio=0.1, eta_min=1e-3)
"""


def write_poisoned_run(folder: Path, extra: str = "") -> Path:
    """Write a config with its training data into ``folder``; ``extra`` is appended to the config's text.

    The document at ``POISONED`` is read once, in ``STEP``.
    """
    draw = random.Random(0)
    documents = []
    for _ in range(DOCUMENTS):
        start = draw.randrange(COUNTED)
        documents.append([(start + k) % COUNTED + 1 for k in range(LENGTH)])
    file, row = POISONED
    documents[row] = (GARBAGE * LENGTH)[:LENGTH]
    write_bin(folder / "data/train" / file, documents)
    config = folder / "config.py"
    config.write_text(CONFIG + EXTRA + extra)
    return config
