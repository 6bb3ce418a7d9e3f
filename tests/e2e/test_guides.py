"""The commands of README.md and of the guides in docs/, typed in a folder that has what they name.

Each page has a fresh copy of a folder with a small run, its data and configs. The configs have the names of the pages'
7B models and are small. A block that no test can type says why in its title (``tests/support/pages.py``).
"""

from __future__ import annotations

import glob
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import Run
from tests.e2e.test_tutorials import TUTORIALS, pattern
from tests.support.page_commands import (
    commands_of,
    pages_with_commands,
    typed_lines,
)
from tests.support.pages import DOCS, Page
from tools import cluster_transcript, errors, layout_tables, reference, spike_transcript

ROOT = Path(__file__).parents[2]
# Written by a tool with what it printed, or typed by another test.
ELSEWHERE = {
    cluster_transcript.PAGE.path,
    spike_transcript.PAGE.path,
    layout_tables.PAGE.path,
    errors.PAGE.path,  # tests/contract/test_error_examples.py
    reference.PAGE.path,
    DOCS / "faq.md",  # tests/contract/test_faq.py
    *(DOCS / f"tutorials/{name}.md" for name in TUTORIALS),
}
GUIDES = [page for page in pages_with_commands() if page.path not in ELSEWHERE]
CONFIG = """
JOB_NAME = "demo"
model_type = "LLAMA2"
model = dict(
    num_layers=LAYERS, hidden_size=32, num_attention_heads=4, num_kv_attention_heads=2, mlp_ratio=4.0,
    multiple_of=16, vocab_size=400, no_bias=True, dtype="torch.float32", max_position_embeddings=64,
)
data = dict(
    seq_len=32, micro_bsz=1, micro_num=8, total_steps=50, train_folder="data/train", tokenizer_path="tokenizer.json",
)
adam = dict(lr=1e-2)
optimizer = dict(ema=dict(decay=0.9))
lr_scheduler = dict(type="constant")
ckpt = dict(save_ckpt_folder="local:llm_ckpts", checkpoint_every=10)
generation = dict(ckpt_folder="llm_ckpts", data_folder="prompts", output_folder="answers", max_length=20)
"""
CONFIGS = ("my.py", "configs/my.py", "configs/demo.py", "configs/7B_sft.py")
# What stands on the pages for a reader's files, and steps of a long run, and what is typed for them.
NAMES = {
    "CONFIG": "my.py",
    "FOLDER": "data/train",
    "TOKENIZER": "tokenizer.json",
    "HF": "OUT",
    "tokenizer.model": "tokenizer.json",
    "5000": "50",
    "1200": "12",
    "32000": "300",
    "500": "5",
    "104": "44",
}
XTUNER_CONFIG = "internlm2_7b_w_tokenized_dataset_copy.py"


def write_texts(home: Path) -> None:
    """Write texts for training, others for validation, and two prompts."""
    for name, lines in (("raw/part", 900), ("train", 900), ("val", 20), ("ask", 2)):
        texts = [json.dumps({"text": f"line {n} of {name}"}) for n in range(lines)]
        (home / f"{name}.jsonl").parent.mkdir(parents=True, exist_ok=True)
        (home / f"{name}.jsonl").write_text("\n".join(texts) + "\n")


@pytest.fixture(scope="module")
def prepared(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with texts, tokenizer, token files, configs, checkpoints and run folders."""
    home = tmp_path_factory.mktemp("guides") / "prepared"
    write_texts(home)
    train_tokenizer = "evomesh tokenizer train raw --vocab-size 300 --output other"
    run(*train_tokenizer.split(), "--chat", "chatml", cwd=home)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(home / "other" / name, home)
    tokenize = "evomesh tokenize {}.jsonl --tokenizer tokenizer.json --output {}"
    run(*tokenize.format("train", "data/train/en/pile.bin").split(), cwd=home)
    run(*tokenize.format("ask", "prompts/en/ask.bin --no-eos").split(), cwd=home)
    (home / "configs").mkdir()
    for name in CONFIGS:
        # As deep as the pipeline of docs/plan.md where it is not trained.
        layers = "8" if name == "configs/7B_sft.py" else "2"
        (home / name).write_text(CONFIG.replace("LAYERS", layers))
    run("evomesh", "train", "my.py", cwd=home)
    for name in ("RUN_A", "RUN_B"):
        shutil.copytree(home / "RUN", home / name)
    for name in ("demo", "demo_chat"):
        shutil.copytree(home / "llm_ckpts", home / "copy")
        shutil.move(home / "copy", home / "llm_ckpts" / name)
    return home


def words_of(line: str, page: Page, folder: Path) -> list[str]:
    """Return the words of a command without its optional parts, with files for what stands for them."""
    plain = re.sub(r"\[--?[^\]]*\]", "", line)
    names = NAMES
    if page.path.name == "xtuner.md":
        names = NAMES | {"CONFIG": XTUNER_CONFIG}
    for name, file in names.items():
        plain = re.sub(rf"\b{re.escape(name)}\b", file, plain)
    words = []
    for word in shlex.split(plain, comments=True):
        found = glob.glob(word, root_dir=folder) if "*" in word else []
        words += sorted(found) or [word.removeprefix(".venv/bin/")]
    if words[0] == "python":  # a script of the repository
        words[:2] = [str(ROOT / words[1])]
    return words


def typed_blocks(page: Page) -> list[str]:
    """Return the blocks that are typed here."""
    return [
        block.text for block in page.blocks if block.language == "sh" and not block.need
    ]


@pytest.mark.parametrize(
    "page", filter(typed_blocks, GUIDES), ids=lambda page: page.path.stem
)
def test_the_commands_of_a_page(
    page: Page, prepared: Path, run: Run, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(prepared, home)
    for block in typed_blocks(page):
        for line in typed_lines(block, is_shell=True):
            words = words_of(line, page, home)
            if words[1:3] == ["config", "copy"]:
                (home / words[-1]).unlink(missing_ok=True)
            redirect = words.index(">") if ">" in words else len(words)
            finds_differences = words[1:3] == ["ckpt", "diff"]
            printed = run(*words[:redirect], cwd=home, code=int(finds_differences))
            for file in words[redirect + 1 :]:
                (home / file).write_text(printed)


def test_outputs_beside_their_command(run: Run) -> None:
    """Those of the 7B configs in the repository, which only plan."""
    compared = 0
    for page in GUIDES:
        for block in page.blocks:
            if block.text.startswith("$ ") and not block.need:
                command, shown = block.text.split("\n", 1)
                words = shlex.split(command)[1:]
                printed = run(*words, cwd=ROOT, env={"COLUMNS": "200"})
                assert pattern(shown).fullmatch(printed), printed
                compared += 1
    assert compared


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.path.stem)
def test_each_command_is_in_a_block_that_is_typed_or_says_why_not(page: Page) -> None:
    typed = [
        line
        for block in page.blocks
        if block.language == "sh" or block.need or block.text.startswith("$ ")
        for line in typed_lines(block.text, is_shell=block.language == "sh")
    ]
    shown = [command.text for command in commands_of(page) if not command.is_mention]
    assert sorted(shown) == sorted(typed)
