"""Examples of error codes that have a command: what is typed prints what the page shows, and the code."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.error_codes.catalog import find_page
from evomesh.error_codes.words import printed
from evomesh.errors import UserError
from tests.support.runs import write_run

# Codes whose example is typed in the folder below. docs/faq.md has more of them, which test_faq.py types.
TYPED = [
    "EVO-CLI-001", "EVO-CLI-002", "EVO-CLI-003", "EVO-CLI-004", "EVO-CLI-005", "EVO-CLI-006", "EVO-CLI-008",
    "EVO-CLI-010", "EVO-CONFIG-004", "EVO-CONFIG-006", "EVO-CONFIG-007", "EVO-CONFIG-010", "EVO-CONFIG-016",
    "EVO-DATA-001", "EVO-DATA-002", "EVO-DATA-008", "EVO-DATA-009", "EVO-DATA-010", "EVO-DATA-011", "EVO-DATA-014",
    "EVO-DATA-023", "EVO-DATA-024", "EVO-TOKEN-002", "EVO-TOKEN-005", "EVO-TOKEN-006", "EVO-CKPT-001", "EVO-CKPT-018",
    "EVO-STORE-001", "EVO-HF-001", "EVO-HF-009", "EVO-HF-011", "EVO-PLAN-001", "EVO-RUN-001",
    "EVO-CLUSTER-001", "EVO-CLUSTER-002", "EVO-CLUSTER-003", "EVO-CLUSTER-005", "EVO-GEN-002", "EVO-CLI-009",
    "EVO-GEN-001", "EVO-MODEL-001", "EVO-TRAIN-006", "EVO-DATA-017", "EVO-DATA-018", "EVO-PARALLEL-010",
]  # fmt: skip


def write_byte_tokenizer(path: Path) -> None:
    """Write a tokenizer of bytes with an end of text and ChatML's marks, but no beginning."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: number for number, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(path))
    settings = json.dumps({"eos_token": "</s>"})
    (path.parent / "tokenizer_config.json").write_text(settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run and the faulty files that the examples name."""
    path = tmp_path_factory.mktemp("examples")
    write_run(path)
    (path / "empty").mkdir()
    (path / "folder").mkdir()
    (path / "model").mkdir()
    write_byte_tokenizer(path / "tok.json")
    (path / "text.txt").write_text("hello world\n")
    (path / "gbk.txt").write_bytes("\u4e2d\u6587\n".encode("gbk"))
    (path / "config.json").write_text("{}")
    (path / "demo.py").write_text("")
    return path


# Command -> the file that it meets: some examples share a name.
FILES = {
    "EVO-DATA-009": ("text.jsonl", '{"text": "a"}\n{"text":\n'),
    "EVO-DATA-010": ("text.jsonl", '{"content": "a"}\n'),
    "EVO-DATA-014": (
        "chats.jsonl",
        json.dumps({"messages": [{"role": "bot", "content": "a"}]}),
    ),
    "EVO-HF-009": (
        "model/config.json",
        json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}),
    ),
    "EVO-HF-011": (
        "model/config.json",
        json.dumps({"model_type": "llama"}),
    ),
}


@pytest.mark.parametrize("code", TYPED)
def test_example(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", "/nowhere")
    if code in FILES:
        name, text = FILES[code]
        Path(name).write_text(text)
    page = find_page(code)
    assert page
    command, *lines = page.example.splitlines()
    result = CliRunner().invoke(app, shlex.split(command)[2:])
    output = result.output
    if isinstance(result.exception, UserError):
        output += printed(result.exception, "en")
    output = output.replace(f"{folder}/", "")
    assert f"explain: evomesh explain {code}" in output
    for line in lines:
        assert f"\n{line}" in f"\n{output}", output
