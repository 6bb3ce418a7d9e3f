"""A run from XTuner's config: its packs, its order, its loss and its files, against the rules of its tools."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.support.covers import covers
from tests.support.deepspeed import Zero
from tests.support.interpreter import Interpreter
from tests.support.runs import metrics
from tests.support.xtuner import ROOT, TINY_MODEL, token_files, write_config

LENGTH = 64
DOCUMENT = 24
FILES = {"cn/a/x.bin": 20, "en/b/y.bin": 17}
ACCUMULATION = 3
FLOAT32 = ["--cfg-options", "optim_wrapper.dtype=float32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, token files and the config c.py for them."""
    folder = tmp_path_factory.mktemp("xtuner")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        key: value for key, value in TINY_MODEL.items() if key != "architectures"
    }
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).save_pretrained(
        folder / "tiny"
    )
    token_files(folder / "data", FILES, DOCUMENT)
    write_config(
        folder / "c.py",
        ('"internlm/internlm2-7b"', '"tiny"'),
        ("/path/to/sft/data/folder", "data"),
        ("max_length = 32768", f"max_length = {LENGTH}"),
        ("accumulative_counts = 1\n", f"accumulative_counts = {ACCUMULATION}\n"),
        ("save_steps = 500", f"save_steps = {ACCUMULATION}"),
        ("save_total_limit = 2", "save_total_limit = -1"),
    )
    return folder


@pytest.fixture(scope="module")
def trained(place: Path, interpreter: Interpreter) -> Path:
    done = interpreter.run(
        ["evomesh", "xtuner", "train", "c.py", *FLOAT32], cwd=place, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "one pass is 13 packs = 4.33333 steps" in done.stdout + done.stderr
    return place / "work_dirs" / "c"


def packs_of_xtuner(data: Path) -> list[list[np.ndarray]]:
    """Return the packs of all files as fragments of documents: each file shuffled by 1024, cut every LENGTH tokens."""
    packs = []
    for name in FILES:
        documents = [
            json.loads(line)["tokens"]
            for line in (data / name).read_text().splitlines()
        ]
        order = list(range(len(documents)))
        np.random.RandomState(1024).shuffle(order)
        stream = [
            (token, document) for document in order for token in documents[document]
        ]
        for start in range(0, len(stream) - LENGTH + 1, LENGTH):
            part = stream[start : start + LENGTH]
            bounds = [i for i in range(1, LENGTH) if part[i][1] != part[i - 1][1]]
            packs.append(np.split(np.array([token for token, _ in part]), bounds))
    return packs


def loss_of_xtuner(model: torch.nn.Module, packs: list[list[np.ndarray]]) -> float:
    """Return the mean over targets; documents do not see each other, but the last token of one predicts the next's."""
    losses = []
    for fragments in packs:
        logits = torch.cat(
            [model(torch.tensor(part)[None]).logits[0] for part in fragments]
        )
        targets = torch.tensor(np.concatenate(fragments))
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[:-1], targets[1:], reduction="none"
            )
        )
    return float(torch.cat(losses).mean())


@covers("promise:xtuner-train")
def test_packs_order_and_loss_are_xtuners(place: Path, trained: Path) -> None:
    packs = packs_of_xtuner(place / "data")
    order = np.arange(len(packs))
    np.random.RandomState(1024).shuffle(order)  # InternRepoSampler, pass 0
    rows = metrics(trained)
    assert len(rows) == len(packs) // ACCUMULATION
    model = AutoModelForCausalLM.from_pretrained(place / "tiny")
    with torch.no_grad():
        first = loss_of_xtuner(model, [packs[i] for i in order[:ACCUMULATION]])
        other = loss_of_xtuner(model, [packs[i] for i in range(ACCUMULATION)])
    assert rows[0]["loss"] == pytest.approx(first, rel=1e-5)
    assert abs(first - other) > 0.01  # so that another order would show


def test_rate_and_files(trained: Path) -> None:
    rows = metrics(trained)
    middle = 6e-6 + (4e-5 - 6e-6) * (1 + math.cos(math.pi / 2)) / 2
    assert rows[0]["lr"] == pytest.approx(4e-5) and rows[2]["lr"] == pytest.approx(
        middle
    )
    steps = sorted(path.name for path in trained.glob("step-*"))
    assert steps == [f"step-0000000{step}" for step in range(1, 5)]


def test_the_other_template_trains_the_same(
    place: Path, trained: Path, interpreter: Interpreter
) -> None:
    """The config for InternEvo's files stands on the one beside it, and their format is the same."""
    base = place / "internlm2_7b_w_tokenized_dataset.py"
    base.write_text((place / "c.py").read_text())
    write_config(place / "evo.py", name="internlm2_7b_w_internevo_dataset")
    command = ["evomesh", "xtuner", "train", "evo.py", "--work-dir", "evo", *FLOAT32]
    done = interpreter.run(command, cwd=place, timeout=200)
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in metrics(place / "evo")]
    assert losses == [row["loss"] for row in metrics(trained)]


def test_resume_and_then_a_longer_run(
    place: Path, trained: Path, interpreter: Interpreter
) -> None:
    """Two passes in one run are one pass, then the second by --resume."""
    longer = [
        "--cfg-options",
        "optim_wrapper.dtype=float32",
        "max_epochs=2",
        "param_scheduler=None",
    ]
    whole = ["evomesh", "xtuner", "train", "c.py", "--work-dir", "whole", *longer]
    parts = [
        "evomesh",
        "xtuner",
        "train",
        "c.py",
        "--work-dir",
        "parts",
        "--resume",
        *longer,
    ]
    for command in (whole, [*parts, "data.total_steps=3"], parts):
        done = interpreter.run(command, cwd=place, timeout=200)
        assert done.returncode == 0, done.stderr
    assert "resuming step 3" in done.stdout + done.stderr
    losses = [row["loss"] for row in metrics(place / "whole")]
    resumed = {row["step"]: row["loss"] for row in metrics(place / "parts")}
    assert len(losses) == 13 * 2 // ACCUMULATION
    assert [resumed[step] for step in range(len(losses))] == losses


@covers("promise:xtuner-checkpoints")
def test_a_run_of_xtuner_is_resumed(place: Path, interpreter: Interpreter) -> None:
    """Its weights, and the packs that follow its steps; DeepSpeed's folder, as a run with ZeRO 2 leaves it."""
    model = AutoModelForCausalLM.from_pretrained(place / "tiny")
    state = {f"llm.{name}": value for name, value in model.state_dict().items()}
    Zero([state], steps=2).write(place / "theirs" / "iter_6.pth")
    command = ["evomesh", "xtuner", "train", "c.py", "--work-dir", "theirs", "--resume"]
    done = interpreter.run(
        [*command, *FLOAT32, "data.total_steps=3"], cwd=place, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "moments start anew" in done.stdout + done.stderr
    packs = packs_of_xtuner(place / "data")
    order = np.arange(len(packs))
    np.random.RandomState(1024).shuffle(order)
    with torch.no_grad():
        third = loss_of_xtuner(model, [packs[i] for i in order[6:9]])
    (row,) = metrics(place / "theirs")
    assert row["step"] == 2
    assert row["loss"] == pytest.approx(third, rel=1e-5)


def test_export_by_xtuners_path_and_split(
    place: Path, trained: Path, interpreter: Interpreter
) -> None:
    script = str(ROOT / "xtuner" / "tools" / "model_converters" / "pth_to_hf.py")
    done = interpreter.run([script, "c.py", str(trained), "hf"], cwd=place, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (place / "hf" / "xtuner_config.py").read_bytes() == (
        place / "c.py"
    ).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(place / "hf")
    command = [
        "evomesh",
        "xtuner",
        "convert",
        "split",
        "hf",
        "parts_hf",
        "--max-shard-size",
        "20KB",
    ]
    done = interpreter.run(command, cwd=place, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(list((place / "parts_hf").glob("*.safetensors"))) > 3
    again = AutoModelForCausalLM.from_pretrained(place / "parts_hf").state_dict()
    assert all(
        torch.equal(again[name], tensor) for name, tensor in model.state_dict().items()
    )


def test_order_file_by_xtuners_path(place: Path, interpreter: Interpreter) -> None:
    script = str(ROOT / "xtuner" / "tools" / "get_data_order.py")
    options = ["--data-folder", "data/", "--save-folder", "."]
    done = interpreter.run([script, *options], cwd=place)
    assert done.returncode == 0, done.stderr
    assert (place / "data_order.txt").read_text().split() == list(FILES)


def test_the_data_commands(place: Path, interpreter: Interpreter) -> None:
    shown = interpreter.run(["evomesh", "xtuner", "log-dataset", "c.py"], cwd=place)
    assert shown.returncode == 0 and "pack 0 of 13, 64 tokens" in shown.stdout
    checked = interpreter.run(
        ["evomesh", "xtuner", "check-custom-dataset", "c.py"], cwd=place
    )
    assert checked.returncode == 0 and "no problems found" in checked.stdout


CONVERSATIONS = [
    [
        {"role": "user", "content": f"question {n}"},
        {"role": "assistant", "content": f"answer {n}"},
    ]
    for n in range(40)
]


@pytest.fixture(scope="module")
def raw(place: Path) -> Path:
    """A folder raw/ with conversations as XTuner's tools take them, and a tokenizer with InternLM2's chat tokens."""
    folder = place / "raw"
    (folder / "set" / "processed").mkdir(parents=True)
    lines = "".join(json.dumps(messages) + "\n" for messages in CONVERSATIONS)
    (folder / "set" / "processed" / "a.jsonl").write_text(lines)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["question answer"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    )
    return folder


def tokens_of(path: Path) -> list[list[int]]:
    return [json.loads(line)["tokens"] for line in path.read_text().splitlines()]


def test_raw_conversations_are_tokenized_before_training(
    place: Path, raw: Path, interpreter: Interpreter
) -> None:
    """The config's own way and both scripts write the same token files; the answers alone are targets."""
    sizes: dict[str, Any] = {
        key: value for key, value in TINY_MODEL.items() if key != "architectures"
    }
    LlamaForCausalLM(LlamaConfig(**sizes | {"vocab_size": 260})).save_pretrained(
        raw / "model"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(raw / name, raw / "model" / name)
    write_config(
        place / "raw.py",
        ('"internlm/internlm2-7b"', '"raw/model"'),
        ("/path/to/sft/data/folder", "raw/set"),
        ("max_length = 32768", "max_length = 64"),
        name="internlm2_7b_w_untokenized_dataset",
    )
    train = ["evomesh", "xtuner", "train", "raw.py", *FLOAT32, "data.total_steps=2"]
    ranks = interpreter.start_ranks(train, 2, cwd=place)
    refused = [rank.wait() for rank in ranks]
    assert [rank.returncode for rank in refused] == [2, 2]
    assert any("evomesh xtuner tokenize raw.py" in rank.stderr for rank in refused)
    done = interpreter.run(train, cwd=place, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(metrics(place / "work_dirs" / "raw")) == 2

    tools = ROOT / "xtuner" / "tools"
    common = ["--tokenizer-path", "raw/model"]
    ftdp = ["--processed-dir", "raw", "--tokenized-dir", "ftdp"]
    plain = [
        "--data-folder",
        "raw/set",
        "--save-folder",
        "plain",
        "--file-type",
        ".jsonl",
        "--is-ftdp",
    ]
    plain += ["--prompt-template", "internlm2_chat"]
    for script, options in (
        ("tokenize_ftdp_datasets", ftdp),
        ("process_untokenized_datasets", plain),
    ):
        done = interpreter.run(
            [str(tools / f"{script}.py"), *options, *common], cwd=place
        )
        assert done.returncode == 0, done.stderr
    made = tokens_of(place / "work_dirs/raw/tokenized/raw/dataset0.bin")
    assert tokens_of(place / "ftdp/chatml_llamav13_32k/train/cn/set/a.bin") == made
    assert tokens_of(place / "plain/processed/a.bin") == made
    tokenizer = Tokenizer.from_file(str(raw / "tokenizer.json"))
    assert len(made) == len(CONVERSATIONS)
    positive = [token for token in made[7] if token > 0]
    assert tokenizer.decode(positive, skip_special_tokens=False) == "answer 7<|im_end|>"
    whole = tokenizer.decode(
        [abs(token) for token in made[7]], skip_special_tokens=False
    )
    assert whole.startswith(
        "<s><|im_start|>user\nquestion 7<|im_end|>\n<|im_start|>assistant\n"
    )
