"""The tutorial's flow on the command line, and training on streaming text, weights and a growing batch."""

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


def command(interpreter: Interpreter, folder: Path, *words: str, expect: int = 0) -> str:
    finished = interpreter.run(["evomesh", *words], cwd=folder)
    assert finished.returncode == expect, finished.stderr[-3000:]
    return finished.stdout + finished.stderr


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A run folder with a byte tokenizer and real text as jsonl, lying beside the type folders to be made."""
    write_run(tmp_path, f'model["vocab_size"] = {VOCAB}\n')
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    topics = [topic for _, topic in sorted(pydoc_data.topics.topics.items())]
    for part, chosen in (("train", topics[:30]), ("val", topics[30:34])):
        (tmp_path / "raw" / part).mkdir(parents=True)
        lines = "".join(json.dumps({"text": topic}) + "\n" for topic in chosen)
        (tmp_path / "raw" / part / "pile.jsonl").write_text(lines)
    return tmp_path


@covers("data.rampup_batch_size")
def test_jsonl_to_training(text: Path, interpreter: Interpreter) -> None:
    for part in ("train", "val"):
        source = f"raw/{part}/pile.jsonl"
        said = command(
            interpreter, text, "tokenize", source, "-o", f"raw/{part}/en/pile.bin", "-t", "tokenizer.json"
        )
        assert f"{30 if part == 'train' else 4} documents" in said
    said = command(
        interpreter, text, "data", "verify", "raw/train", "--valid", "raw/val", "-t", "tokenizer.json"
    )
    assert "no problems found" in said
    said = command(
        interpreter, text, "data", "inspect", "raw/train", "--seq-len", "64", "-t", "tokenizer.json"
    )
    assert "packs of 64 tokens" in said
    folders = ("--set", "data.train_folder=raw/train", "--set", "data.valid_folder=raw/val")
    growing = ("--set", "data.rampup_batch_size=1 1 5", "--set", "data.valid_every=10")
    output = command(interpreter, text, "train", "config.py", *folders, *growing)
    assert len(losses(text)) == 20
    rows = [line.split() for line in output.splitlines() if line.startswith("en/")]
    assert [row[:2] for row in rows] == [["en/pile.bin", "en"]]  # the raw file beside it is no type
    consumed = [row["num_consumed_tokens"] for row in metrics(text) if "loss" in row]
    assert consumed == [64 * (step + 1) if step < 5 else 64 * 5 + 128 * (step - 4) for step in range(20)]
    assert "val/en_loss" in output
    # pack 0 of the config is what show prints
    shown = command(interpreter, text, "data", "show", "raw/train", "--config", "config.py", "--json")
    pack = json.loads(shown.strip().splitlines()[-1])
    assert set(pack) == {"tokens", "cu_seqlens", "indexes", "labels", "type_ids"}


def test_refused_before_anything_is_written(text: Path, interpreter: Interpreter) -> None:
    said = command(
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
    assert "no such file: raw/train/no.jsonl" in said
    assert not (text / "x").exists()
    said = command(interpreter, text, "train", "config.py", "--set", "data.train_folder=raw/train", expect=2)
    assert "no .bin file below raw/train" in said
    assert not (text / "RUN").exists()


@covers("data.type", "data.tokenizer_path")
def test_streaming_stops_and_resumes_to_the_bit(text: Path, interpreter: Interpreter) -> None:
    options = ["--set", "data.type=streaming", "--set", "data.train_folder=raw/train"]
    options += ["--set", "data.tokenizer_path=tokenizer.json", "--set", "data.valid_every=0"]
    straight = text / "straight"
    for folder in (straight, text / "resumed"):
        write_run(folder, f'model["vocab_size"] = {VOCAB}\n')
        (folder / "raw").symlink_to(text / "raw")
        (folder / "tokenizer.json").symlink_to(text / "tokenizer.json")
    command(interpreter, straight, "train", "config.py", *options)
    command(interpreter, text / "resumed", "train", "config.py", *options, "--set", "data.total_steps=10")
    command(interpreter, text / "resumed", "train", "config.py", *options)
    assert losses(text / "resumed") == losses(straight)
    assert len(losses(straight)) == 20
