"""Commands of InternEvo's guide and of the tutorial, typed as they stand there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from evomesh import __version__
from tests.e2e.conftest import Run
from tests.support.golden import write_folder

ROOT = Path(__file__).parents[2]
TEXT = "the cat sat on the mat\na dog saw the cat\n" * 30


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the tools of this repository, a text, and a sentencepiece model that is not in tools/ yet."""
    shutil.copytree(
        ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "raw.txt").write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "raw.txt"),
        model_prefix=str(tmp_path / "small"),
        vocab_size=19,
        minloglevel=2,
    )
    return tmp_path


@pytest.mark.parametrize("name", ["V7_sft.model", "tokenizer_internlm.model"])
def test_tokenizer_takes_the_model_beside_it_under_either_name(
    checkout: Path, run: Run, name: str
) -> None:
    shutil.copy(checkout / "small.model", checkout / "tools" / name)
    said = run(
        "tools/tokenizer.py",
        "--text_input_path",
        "raw.txt",
        "--bin_output_path",
        "cn/out.bin",
        cwd=checkout,
    )
    assert (
        "Successfully generated cn/out.bin.meta (60 documents)" in said
        and "JSON" not in said
    )
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(checkout / "small.model")
    )
    lines = (checkout / "cn/out.bin").read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == processor.encode(
        TEXT.splitlines()
    )


def test_tokenizer_without_a_model_says_where_to_find_it(
    checkout: Path, run: Run
) -> None:
    command = [
        "tools/tokenizer.py",
        "--text_input_path",
        "raw.txt",
        "--bin_output_path",
        "out.bin",
    ]
    said = run(*command, cwd=checkout, code=2)
    for words in (
        "tools/tokenizer_internlm.model",
        "internlm/internlm-7b",
        "evomesh tokenizer train",
    ):
        assert words in said
    assert not (checkout / "out.bin").exists()


def test_tokenizer_says_that_json_syntax_is_encoded(checkout: Path, run: Run) -> None:
    (checkout / "raw.jsonl").write_text(json.dumps({"text": "the cat"}) + "\n")
    options = ["--tokenizer_path", "small.model", "--bin_output_path", "out.bin"]
    said = run(
        "tools/tokenizer.py", "--text_input_path", "raw.jsonl", *options, cwd=checkout
    )
    assert "JSON syntax included" in said


def test_data_order_says_what_it_wrote(checkout: Path, run: Run) -> None:
    write_folder(checkout / "data")
    said = run(
        "tools/get_data_order.py",
        "--data-folder",
        "data",
        "--save-folder",
        "order",
        cwd=checkout,
    )
    assert said == "order/data_order.txt: the order of 2 files\n"
    assert (
        checkout / "order/data_order.txt"
    ).read_text() == "code/data.bin\nen/data.bin\n"


def test_alpaca_takes_the_template_that_its_fix_names(checkout: Path, run: Run) -> None:
    record = {"instruction": "the cat", "input": "", "output": "sat on the mat"}
    (checkout / "alpaca.json").write_text(json.dumps([record] * 20))
    command = ["tools/alpaca_tokenizer.py", "alpaca.json", "out", "tok"]
    run(
        *("evomesh", "tokenizer", "train", "raw.txt", "--output", "tok"),
        *("--vocab-size", "270", "--chat", "chatml"),
        cwd=checkout,
    )
    assert "--chat-template chatml" in run(*command, cwd=checkout, code=2)
    run(*command, "--chat-template", "chatml", cwd=checkout)
    assert (checkout / "out/train/en/dataset.bin.meta").exists()


def test_a_model_beyond_the_memory_is_refused_before_it_is_built(
    tmp_path: Path, run: Run
) -> None:
    config = ROOT / "configs/7B_sft.py"
    said = run(
        *("evomesh", "train", str(config), "--set", "model.num_layers=100000"),
        *("--set", "data.train_folder=None", "--set", "model.dtype=torch.float16"),
        cwd=tmp_path,
        code=2,
    )
    assert "TiB on this machine" in said and "Traceback" not in said
    assert said.count("settings have no effect or need attention") == 0


def test_version(tmp_path: Path, run: Run) -> None:
    assert run("evomesh", "--version", cwd=tmp_path) == f"evomesh {__version__}\n"


def test_the_tutorials_requirements_resolve_to_the_pinned_versions() -> None:
    """pip reads both files; with no index, it names what it would have to fetch, or finds all installed."""
    files = [
        word
        for name in ("torch", "runtime")
        for word in ("-r", f"requirements/{name}.txt")
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-index",
        "--no-build-isolation",
        *files,
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # The pinned torch of this environment satisfies it.
    assert "torch==" not in done.stdout
