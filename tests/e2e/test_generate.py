"""``evomesh generate`` on a checkpoint that the training command wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.support.interpreter import Finished, Interpreter
from tests.support.runs import write_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, interpreter: Interpreter) -> Path:
    """A folder with a trained tiny model and a tokenizer of single bytes, ids 0..255."""
    folder = tmp_path_factory.mktemp("trained")
    alphabet = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_run(folder, 'data["tokenizer_path"] = "tokenizer.json"\n')
    assert interpreter.run(["evomesh", "train", "config.py"], cwd=folder).returncode == 0
    return folder


def generate(trained: Path, interpreter: Interpreter, *options: str) -> Finished:
    return interpreter.run(["evomesh", "generate", "--ckpt", "ckpts", *options], cwd=trained)


def test_text_goes_on_from_the_prompt(trained: Path, interpreter: Interpreter) -> None:
    done = generate(trained, interpreter, "--prompt", "abc", "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("abc")
    again = generate(trained, interpreter, "--prompt", "abc", "--max-new-tokens", "12")
    assert again.stdout == done.stdout
    older = interpreter.run(
        ["evomesh", "generate", "--ckpt", "ckpts/5", "--prompt", "abc", "--max-new-tokens", "12"], cwd=trained
    )
    assert older.returncode == 0, older.stderr
    assert older.stdout != done.stdout  # an earlier step is another model


def test_a_seed_means_the_same_draws(trained: Path, interpreter: Interpreter) -> None:
    drawn = ["--prompt", "abc", "--max-new-tokens", "20", "--temperature", "1.5", "--seed"]
    one, same, other = (generate(trained, interpreter, *drawn, seed).stdout for seed in ("1", "1", "2"))
    assert one == same != other


def test_a_users_own_model_trains_and_writes(trained: Path, tmp_path: Path, interpreter: Interpreter) -> None:
    example = Path(__file__).parents[2] / "examples/custom_model"
    shutil.copytree(example, tmp_path / "mine")
    small = ["--set", "data.total_steps=2", "--set", "ckpt.save_ckpt_folder=ck", "--set", "ckpt.enable_save_ckpt=True"]
    done = interpreter.run(["evomesh", "train", "config.py", *small], cwd=tmp_path / "mine")
    assert done.returncode == 0, done.stderr
    write = ["evomesh", "generate", "--ckpt", "ck", "--prompt", "abc", "--max-new-tokens", "5"]
    write += ["--tokenizer", str(trained / "tokenizer.json")]
    alone = interpreter.run(write, cwd=tmp_path / "mine")
    assert alone.returncode == 2
    assert "PARALLEL_BLOCKS" in alone.stderr
    registered = interpreter.run([*write, "--config", "config.py"], cwd=tmp_path / "mine")
    assert registered.returncode == 0, registered.stderr
    assert registered.stdout.startswith("abc")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "a", "--ckpt", "nowhere"], "nowhere"),
        (["--prompt", "a", "--top-p", "0"], "top_p"),
        (["--prompt", "a", "--device", "gpu"], "--device: 'gpu' cannot be used"),
        (["--prompt", "a", "--tokenizer", "missing.json"], "missing.json"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    trained: Path, interpreter: Interpreter, options: list[str], part: str
) -> None:
    done = generate(trained, interpreter, *options)
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr
