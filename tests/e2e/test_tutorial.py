"""Every command of train_your_internlm, typed in its order in a checkout that has its layout.

Sizes, the number of ranks and the dataset are overridden by environment variables alone.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from tests.e2e.conftest import Run
from tests.support.covers import covers

ROOT = Path(__file__).parents[2]
TUTORIAL = Path(__file__).parent / "tutorial"
SIZES = {
    "SEQ_LEN": "64",
    "HIDDEN_SIZE": "32",
    "NUM_ATTENTION_HEAD": "2",
    "NUM_LAYER": "2",
    "VOCAB_SIZE": "512",
    "TOTAL_STEPS": "6",
    "EVERY": "4",
    "ZERO1_SIZE": "2",
}


@pytest.fixture
def tutorial(tmp_path: Path) -> Path:
    """Set up the tutorial's repository: this project as ``InternLM``, and its own files beside it.

    The dataset is a local folder of one jsonl file, and the tokenizer is trained
    on it under the name that the tutorial uses.
    """
    checkout = tmp_path / "InternLM"
    for name in ("tools", "configs", "requirements"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
    for name in ("train.py", "constraints.txt"):
        shutil.copy(ROOT / name, checkout / name)
    (tmp_path / "data").mkdir()
    shutil.copy(TUTORIAL / "get_dataset.py", tmp_path / "data")
    for name in ("7b_pretrain_config.py", "test.py"):
        shutil.copy(TUTORIAL / name, tmp_path)

    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    rows = [{"text": text, "meta": {"pile_set_name": "Pile-CC"}} for text in texts * 2]
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    (tmp_path / "sentences.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "sentences.txt"),
        model_prefix=str(checkout / "tools" / "V7_sft"),
        vocab_size=512,
        byte_fallback=True,
        minloglevel=2,
    )
    return tmp_path


@pytest.mark.timeout(600)
@covers("promise:tutorial-end-to-end")
def test_the_tutorial_from_dataset_to_text(tutorial: Path, run: Run) -> None:
    env = SIZES | {"DATASET": str(tutorial / "dataset")}

    # 1. Dataset: 1 % of it is held out.
    run("data/get_dataset.py", cwd=tutorial, env=env)
    sizes = {}
    for part, file in (
        ("train", "small-the_pile.train"),
        ("val", "small-the_pile.val"),
    ):
        lines = (tutorial / "data" / part / f"{file}.jsonl").read_text().splitlines()
        sizes[part] = len(lines)
    total = sum(sizes.values())
    assert sizes["val"] == -(-total // 100)

    # 2. Token files, one document per line.
    for part in ("train", "val"):
        said = run(
            "InternLM/tools/tokenizer.py",
            f"--text_input_path=./data/{part}/small-the_pile.{part}.jsonl",
            f"--bin_output_path=./data/{part}/en/small-the_pile.{part}.bin",
            cwd=tutorial,
        )
        assert f"small-the_pile.{part}.bin.meta ({sizes[part]} documents)" in said

    # 3. Training, by torchrun as it is installed.
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
        *("./InternLM/train.py", "--config=./7b_pretrain_config.py"),
    ]
    done = subprocess.run(
        command,
        cwd=tutorial,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout + done.stderr
    assert re.search(r"step=5\b", lines)
    assert "val/en_loss" in lines
    assert list((tutorial / "logs").rglob("events.out.tfevents*"))

    # 4. Export of one checkpoint, typed inside InternLM.
    checkout = tutorial / "InternLM"
    (tutorial / "ckpts/7b_pretrain/hf").parent.mkdir(parents=True, exist_ok=True)
    said = run(
        "tools/transformers/convert2hf.py",
        "--src_folder=../ckpts/7b_pretrain/4",
        "--tgt_folder=../ckpts/7b_pretrain/hf",
        *("--tokenizer", "tools/V7_sft.model"),
        cwd=checkout,
    )
    assert "largest logit difference" in said

    # 5. Text from transformers itself.
    text = run("test.py", cwd=tutorial)
    assert "The statement is" in text
