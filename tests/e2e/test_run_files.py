"""docs/run-files.md names what a run writes: every file, key, tag and message of a run that has all of it on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evomesh import errors
from evomesh.train.samples import PromptSample
from evomesh.train.supervisor import RunExit
from tests.support.interpreter import Interpreter
from tests.support.pages import DOCS, Page
from tests.support.runs import metrics, write_run

PAGE = Page(DOCS / "run-files.md")
EXTRA = """
model |= dict(mup=dict(base_hidden_size=16))
data |= dict(total_steps=8, valid_every=4)
ckpt |= dict(checkpoint_every=4, oss_snapshot_freq=3)
adam |= dict(groups=[dict(pattern="*norm*", lr_scale=0.5)])
grad_profiling = dict(
    grad_norm_profiling=True, zero_grad_profiling=True, vocab_grad_norm_profiling=True, interval_steps=5,
)
loss = dict(label_smoothing=0, z_loss_coeff=1e-4)
spike = dict(policy="warn", zscore=0.01, min_steps=3)
monitor = dict(trackers=[dict(type="jsonl")])
"""
# Not of this run; other tests have them.
OTHER_FILES = {
    "samples.jsonl",
    "memory/NAME.out-of-memory.txt",
    "exits.jsonl",
    "step-STEP/ATTEMPT-unfinished",
    "hf/hf-STEP/...",
}
# With texts whose bytes were counted, and with tasks.
OTHER_FIGURES = {"val/SET_bpb", "val_start/SET_bpb", "eval/TASK/METRIC"}
PLACEHOLDERS = {
    "NAME": r"(?:main_)?dp=\d+_tp=\d+_pp=\d+",
    "STEP": r"\d{8}",
    "RANK": r"\d{5}",
    "ATTEMPT": "[0-9a-f]{8}",
    "NUMBERS": r"\d.*",
    "HOST": "[^/]+",
    "TYPE": "(?:en|code)",
    "SET": "(?:en|code)",
    "LAYER": r"(?:embedding|norm|head|layers\.\d+)",
    "PARAMETER": r"[a-z_0-9.]+\.weight",
    "TEXT": ".+",
    "N": r"\d+",
    "X": r"[-+.e\d]+",
    "...": ".+",
}


def pattern_of(name: str) -> re.Pattern[str]:
    """Return what a name on the page stands for."""
    words = re.split(r"(\.\.\.|[A-Z]+(?![A-Za-z]))", name)
    return re.compile(
        "".join(PLACEHOLDERS.get(word, re.escape(word)) for word in words)
    )


def table(title: str) -> list[list[str]]:
    """Return the rows of the tables below a heading, without the titles of their columns."""
    section = re.split(r"^## ", PAGE.prose, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(title + "\n")]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def names(title: str) -> set[str]:
    return {row[0].strip("`") for row in table(title)}


def assert_same(named: Iterable[str], found: Iterable[str]) -> None:
    """Fail unless each name on the page stands for something found, and the other way round."""
    patterns = {name: pattern_of(name) for name in named}
    there = set(found)
    unknown = {
        item for item in there if not any(p.fullmatch(item) for p in patterns.values())
    }
    absent = {
        name
        for name, pattern in patterns.items()
        if not any(pattern.fullmatch(item) for item in there)
    }
    assert (unknown, absent) == (set(), set())


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def printed_and_folder(
    interpreter: Interpreter, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Return what a run of eight steps printed, and its run folder."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, EXTRA)
    command = ["evomesh", "train", "config.py", "--profile", "--memory-profile"]
    done = interpreter.run(command, cwd=folder, timeout=200)
    assert done.returncode == 0, done.stderr
    (run_folder,) = folder.glob("RUN/*/*")
    return done.stdout + done.stderr, run_folder


@pytest.fixture(scope="module")
def run_folder(printed_and_folder: tuple[str, Path]) -> Path:
    return printed_and_folder[1]


def test_files(run_folder: Path) -> None:
    assert_same(names("Run folder") - OTHER_FILES, files_below(run_folder))
    saved = files_below(run_folder.parents[2] / "ckpts")
    assert_same(names("Save folder") - OTHER_FILES, saved)
    assert names("Run folder") | names("Save folder") > OTHER_FILES


def test_figures_and_tags(run_folder: Path) -> None:
    figures = {key for row in metrics(run_folder) for key in row}
    assert_same(names("metrics.jsonl") - OTHER_FIGURES, figures)
    assert names("metrics.jsonl") > OTHER_FIGURES
    (board,) = run_folder.glob("tensorboards/*")
    tags = EventAccumulator(str(board)).Reload().Tags()
    assert set(tags["scalars"]) == figures
    texts = names("TensorBoard") - {"samples/text_summary"}
    assert set(tags["tensors"]) == texts


def test_history(run_folder: Path) -> None:
    rows = rows_of(run_folder / "history.jsonl")
    kinds = {"start": set[str](), "step": set[str](), "end": set[str]()}
    for row in rows:
        kinds[row.get("event", "step")] |= row.keys()
    named = {kind: set[str]() for kind in kinds}
    for key, where, _ in table("history.jsonl"):
        for kind in kinds if where == "all" else where.split(", "):
            named[kind].add(key.strip("`"))
    assert kinds == named
    phases = {phase for row in rows for phase in row.get("phases", {})}
    (sentence,) = re.findall(r"^Phases are .*", PAGE.text, re.MULTILINE)
    assert set(re.findall("`([^`]*)`", sentence)) == phases


def test_other_lines(run_folder: Path) -> None:
    keys = {
        row[0].strip("`"): re.findall("`([^`]*)`", row[1].partition(";")[0])
        for row in table("Other files of lines")
    }
    for name in ("alerts.jsonl", "status/HOST.jsonl", "memory/NAME.jsonl"):
        found = [
            run_folder / file
            for file in files_below(run_folder)
            if pattern_of(name).fullmatch(file)
        ]
        assert list(rows_of(found[0])[0]) == keys[name]
    answer = [item.name for item in fields(PromptSample)]
    assert keys["samples.jsonl"] == ["step", "tokens", *answer]
    assert keys["exits.jsonl"] == [item.name for item in fields(RunExit)]


def test_messages(printed_and_folder: tuple[str, Path]) -> None:
    printed = printed_and_folder[0]
    (block,) = PAGE.blocks
    absent = [
        line
        for line in block.text.splitlines()
        if not re.search(f" -- {pattern_of(line).pattern}", printed)
    ]
    assert absent == []


def test_exit_codes() -> None:
    codes = {
        name: value for name, value in vars(errors).items() if name.startswith("EXIT_")
    }
    named = {row[1].strip("`"): int(row[0]) for row in table("Exit codes")}
    assert named == codes | {"": 0}
