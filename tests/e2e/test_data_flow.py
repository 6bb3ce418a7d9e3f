"""The tutorial on the command line, and training on streaming text and with a growing batch."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.support.covers import covers
from tests.support.interpreter import Interpreter
from tests.support.runs import losses, metrics, write_run

VOCAB = 256 + 2


def evomesh(
    interpreter: Interpreter, folder: Path, *words: str, expect: int = 0
) -> str:
    """Run a command in ``folder``, check its exit code and return its output."""
    finished = interpreter.run(["evomesh", *words], cwd=folder)
    assert finished.returncode == expect, finished.stderr[-3000:]
    return finished.stdout + finished.stderr


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Make a run folder with a byte tokenizer, and with text as jsonl next to the type folders of its token files."""
    write_run(tmp_path, f'model["vocab_size"] = {VOCAB}\n')
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [],
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
        ),
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    topics = [topic for _, topic in sorted(pydoc_data.topics.topics.items())]
    for part, chosen in (("train", topics[:30]), ("val", topics[30:34])):
        (tmp_path / "raw" / part).mkdir(parents=True)
        lines = "".join(json.dumps({"text": topic}) + "\n" for topic in chosen)
        (tmp_path / "raw" / part / "pile.jsonl").write_text(lines)
    return tmp_path


@covers("data.rampup_batch_size")
def test_the_tutorial_goes_from_jsonl_to_training(
    text: Path, interpreter: Interpreter
) -> None:
    for part in ("train", "val"):
        source = f"raw/{part}/pile.jsonl"
        output = evomesh(
            interpreter,
            text,
            "tokenize",
            source,
            "-o",
            f"raw/{part}/en/pile.bin",
            "-t",
            "tokenizer.json",
        )
        assert f"{30 if part == 'train' else 4} documents" in output
    output = evomesh(
        interpreter,
        text,
        "data",
        "verify",
        "raw/train",
        "--valid",
        "raw/val",
        "-t",
        "tokenizer.json",
    )
    assert "no problems found" in output
    output = evomesh(
        interpreter,
        text,
        "data",
        "inspect",
        "raw/train",
        "--seq-len",
        "64",
        "-t",
        "tokenizer.json",
    )
    assert "packs of 64 tokens" in output
    folders = (
        "--set",
        "data.train_folder=raw/train",
        "--set",
        "data.valid_folder=raw/val",
    )
    growing = ("--set", "data.rampup_batch_size=1 1 5", "--set", "data.valid_every=10")
    output = evomesh(interpreter, text, "train", "config.py", *folders, *growing)
    assert len(losses(text)) == 20
    rows = [line.split() for line in output.splitlines() if line.startswith("en/")]
    # The raw file beside it is not data.
    assert [row[:2] for row in rows] == [["en/pile.bin", "en"]]
    consumed = [row["num_consumed_tokens"] for row in metrics(text) if "loss" in row]
    assert consumed == [
        64 * (step + 1) if step < 5 else 64 * 5 + 128 * (step - 4) for step in range(20)
    ]
    assert "val/en_loss" in output
    # `data show` prints pack 0 under the packing of the config.
    shown = evomesh(
        interpreter,
        text,
        "data",
        "show",
        "raw/train",
        "--config",
        "config.py",
        "--json",
    )
    pack = json.loads(shown.strip().splitlines()[-1])
    assert set(pack) == {"tokens", "cu_seqlens", "indexes", "labels", "type_ids"}


def test_bad_paths_are_refused_before_anything_is_written(
    text: Path, interpreter: Interpreter
) -> None:
    output = evomesh(
        interpreter,
        text,
        "tokenize",
        "raw/train/no.jsonl",
        "-o",
        "x/en/a.bin",
        "-t",
        "tokenizer.json",
        expect=2,
    )
    assert "no such file: raw/train/no.jsonl" in output
    assert not (text / "x").exists()
    output = evomesh(
        interpreter,
        text,
        "train",
        "config.py",
        "--set",
        "data.train_folder=raw/train",
        expect=2,
    )
    assert "no .bin file below raw/train" in output
    assert not (text / "RUN").exists()


@covers("data.type", "data.tokenizer_path")
def test_streaming_stops_and_resumes_to_the_bit(
    text: Path, interpreter: Interpreter
) -> None:
    options = ["--set", "data.type=streaming", "--set", "data.train_folder=raw/train"]
    options += [
        "--set",
        "data.tokenizer_path=tokenizer.json",
        "--set",
        "data.valid_every=0",
    ]
    straight = text / "straight"
    for folder in (straight, text / "resumed"):
        write_run(folder, f'model["vocab_size"] = {VOCAB}\n')
        (folder / "raw").symlink_to(text / "raw")
        (folder / "tokenizer.json").symlink_to(text / "tokenizer.json")
    evomesh(interpreter, straight, "train", "config.py", *options)
    evomesh(
        interpreter,
        text / "resumed",
        "train",
        "config.py",
        *options,
        "--set",
        "data.total_steps=10",
    )
    evomesh(interpreter, text / "resumed", "train", "config.py", *options)
    assert losses(text / "resumed") == losses(straight)
    assert len(losses(straight)) == 20
