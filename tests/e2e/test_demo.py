"""The command of `make train` with a tiny model: every stage finds what the last one wrote; again, it does nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from evomesh.demo.questions import Question
from tests.support.interpreter import Finished, Interpreter

pytestmark = pytest.mark.xdist_group("demo")  # one worker, which trains once

ROOT = Path(__file__).parents[2]
# A model and a number of steps that take a second.
SMALL = (
    "data.total_steps=2", "model.num_layers=1", "model.hidden_size=24", "model.num_attention_heads=1",
    "model.num_kv_attention_heads=1", "model.mlp_ratio=1", "model.multiple_of=8",
)  # fmt: skip


def command() -> list[str]:
    """Return the command of `make train`, with the small model."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(r"^train:.*\n\t(.*)\n\n", makefile, re.M)
    assert found is not None
    program, *arguments = found[1].split()
    assert program == "$(EVOMESH)"
    settings = [word for setting in SMALL for word in ("--set", setting)]
    return ["evomesh", *arguments, *settings]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, interpreter: Interpreter
) -> tuple[Path, Finished]:
    """A folder in which the command of `make train` has run, and its end."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder, interpreter.run(command(), cwd=folder, timeout=300)


def report_of(finished: Finished) -> str:
    return finished.stdout[finished.stdout.index("training loss:") :]


def test_the_report_has_bits_per_byte_and_the_share_of_right_modules(
    trained: tuple[Path, Finished], questions: list[Question]
) -> None:
    _, report = trained
    # Two steps teach nothing, and the report ends with an error.
    assert report.returncode == 1, report.stderr
    assert "did not learn as much as it should" in report.stderr
    assert re.search(r"│ code +│.*│ +\d\.\d{3} │", report.stdout)
    assert "bits per byte" in report.stdout
    held_out = [question for question in questions if question.is_held_out]
    guessed = sum(question.module == "tkinter" for question in held_out)
    share = f"{guessed / len(held_out):.1%}"
    assert re.search(rf"│ +{len(held_out)} │ +0\.0% │ +{share} │", report.stdout)


def test_no_held_out_question_is_in_the_training_data(
    trained: tuple[Path, Finished], questions: list[Question]
) -> None:
    folder, _ = trained
    names: dict[str, set[str]] = {}
    for split in ("train", "valid"):
        lines = (folder / f"demo_data/raw/chat/{split}.jsonl").read_text().splitlines()
        asked = [json.loads(line)["messages"][0]["content"] for line in lines]
        names[split] = set(asked)
        assert (folder / f"demo_data/chat/{split}/docstrings/stdlib.bin").exists()
    held_out = {one.text for one in questions if one.is_held_out}
    assert names["valid"] == held_out
    assert not names["train"] & held_out


def test_what_is_finished_is_not_done_again(
    trained: tuple[Path, Finished], interpreter: Interpreter
) -> None:
    folder, first = trained
    commits = sorted(folder.glob("llm_ckpts/*/*/commit.json"))
    assert [path.parts[-3] for path in commits] == ["demo", "demo_chat"]
    before = [path.stat().st_mtime_ns for path in commits]
    again = interpreter.run(command(), cwd=folder, timeout=300)
    assert again.returncode == 1, again.stderr
    assert again.stdout.startswith("demo_data: already made from the same text\n")
    assert report_of(again) == report_of(first)
    assert sorted(folder.glob("llm_ckpts/*/*/commit.json")) == commits
    assert [path.stat().st_mtime_ns for path in commits] == before


def test_the_chat_starts_from_the_pretrained_weights(
    trained: tuple[Path, Finished],
) -> None:
    folder, _ = trained
    [log] = folder.rglob("RUN/demo_chat/*/**/*.log")
    assert "loading model from llm_ckpts/demo/step-00000002" in log.read_text()
