"""The whole system in one test: text -> token file -> training, killed and resumed -> two ranks -> export -> answers.

Every step is a command that a user types. The text counts from 0 to 9 again and again, so a model that learned it
has one right answer.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.interpreter import Interpreter
from tests.support.runs import losses

DIGITS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
STEPS = 40
KILL_AFTER = "step=12,"
CONFIG = f"""
JOB_NAME = "tiny"
model_type = "LLAMA2"
model = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_kv_attention_heads=2, mlp_ratio=2.0, multiple_of=16,
    vocab_size=16, no_bias=True, qk_interleaved=False, dtype="torch.float32", max_position_embeddings=64,
)
data = dict(
    seq_len=32, micro_bsz=2, micro_num=2, total_steps={STEPS}, train_folder="data", tokenizer_path="tokenizer.json"
)
adam = dict(lr=2e-2)
lr_scheduler = dict(total_steps={STEPS}, warmup_ratio=0.1, eta_min=1e-3)
ckpt = dict(save_ckpt_folder="local:ckpts", checkpoint_every=5)
"""


def write_inputs(folder: Path) -> None:
    """Write a tokenizer of ten digits, a text file of counting lines and a config."""
    folder.mkdir()
    words = ["<unk>", "<s>", "</s>", *DIGITS]
    tokenizer = Tokenizer(
        models.WordLevel(
            {word: number for number, word in enumerate(words)}, unk_token="<unk>"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    lines = [
        " ".join(DIGITS[(start + i) % 10] for i in range(40)) for start in range(10)
    ] * 20
    (folder / "counting.txt").write_text("\n".join(lines) + "\n")
    (folder / "config.py").write_text(CONFIG)


class Commands:
    """Runs commands in one folder and returns their output."""

    def __init__(self, interpreter: Interpreter, folder: Path) -> None:
        self.interpreter, self.folder = interpreter, folder

    def __call__(self, *words: str) -> str:
        finished = self.interpreter.run(["evomesh", *words], cwd=self.folder)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    def train_and_kill(self) -> None:
        """Start a training run and kill it with SIGKILL when step ``KILL_AFTER`` was logged."""
        running = self.interpreter.start(
            ["evomesh", "train", "config.py"], cwd=self.folder
        )
        running.wait_for(KILL_AFTER)
        running.signal(signal.SIGKILL)
        running.wait()

    def train_on_two_ranks(self, *words: str) -> None:
        """Train on two processes as torchrun would start them."""
        ranks = self.interpreter.start_ranks(
            ["evomesh", "train", *words, "--launcher", "torch"], 2, cwd=self.folder
        )
        for rank in ranks:
            finished = rank.wait()
            assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module")
def prepared(
    interpreter: Interpreter, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a token file made by ``evomesh tokenize``."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    write_inputs(folder)
    run = Commands(interpreter, folder)
    run(
        "tokenize",
        "counting.txt",
        "--output",
        "data/en/counting.bin",
        "--tokenizer",
        "tokenizer.json",
    )
    return folder


@pytest.fixture(scope="module")
def trained(interpreter: Interpreter, prepared: Path) -> Path:
    """The same folder after a training run that nothing interrupted."""
    Commands(interpreter, prepared)("train", "config.py")
    return prepared


def copy_inputs(source: Path, target: Path) -> Path:
    """Copy everything but checkpoints and logs."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("ckpts", "RUN"))
    return target


def test_a_killed_run_resumes_to_the_bit(
    interpreter: Interpreter, trained: Path, tmp_path: Path
) -> None:
    folder = copy_inputs(trained, tmp_path / "killed")
    run = Commands(interpreter, folder)
    run.train_and_kill()
    run("train", "config.py")
    assert losses(folder) == losses(trained)
    assert len(losses(folder)) == STEPS


def test_two_tensor_parallel_ranks_continue_what_one_process_began(
    interpreter: Interpreter, trained: Path, tmp_path: Path
) -> None:
    longer = ["--set", f"data.total_steps={STEPS + 3}"]
    one = copy_inputs(trained, tmp_path / "one")
    two = copy_inputs(trained, tmp_path / "two")
    shutil.copytree(trained / "ckpts", one / "ckpts")
    Commands(interpreter, one)("train", "config.py", *longer)
    Commands(interpreter, trained)(
        "ckpt", "reshard", "ckpts", str(two / "ckpts"), "--gpus", "2", "--tensor", "2"
    )
    Commands(interpreter, two).train_on_two_ranks(
        "config.py", *longer, "--set", "parallel.tensor.size=2"
    )
    assert list(losses(two)) == [STEPS, STEPS + 1, STEPS + 2]
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_the_model_counts_and_so_does_its_export(
    interpreter: Interpreter, trained: Path
) -> None:
    run = Commands(interpreter, trained)
    answer = run(
        "generate", "--ckpt", "ckpts", "--prompt", "3 4 5", "--max-new-tokens", "5"
    )
    assert answer.split()[-5:] == ["6", "7", "8", "9", "0"]
    run("convert", "to-hf", "ckpts", "exported")
    exported = transformers.AutoModelForCausalLM.from_pretrained(trained / "exported")
    tokenizer = Tokenizer.from_file(str(trained / "exported/tokenizer.json"))
    prompt = torch.tensor([tokenizer.encode("3 4 5").ids])
    completion = exported.generate(prompt, max_new_tokens=5, do_sample=False)[0]
    assert tokenizer.decode(completion.tolist()).split() == [
        "3",
        "4",
        "5",
        "6",
        "7",
        "8",
        "9",
        "0",
    ]
