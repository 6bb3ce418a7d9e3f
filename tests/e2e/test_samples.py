"""Samples and benchmark scores of a run: what is recorded, and that the training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evomesh.checkpoint.restore import load_model
from evomesh.data.tokenizer import encode_prompt
from evomesh.generate.decode import generate_tokens
from evomesh.generate.options import SamplingParams
from tests.e2e.conftest import Run
from tests.e2e.test_convert_hf import make_tokenizer
from tests.e2e.test_eval import CHOICE, COMMON, GENERATE, ROLLING, questions
from tests.support.covers import covers
from tests.support.runs import losses, metrics, tensor_hashes, write_run

TRAIN = ("evomesh", "train", "config.py")
PROMPTS = ["the cat sat", "é", "the cat sat"]
BASE = """
model |= dict(drop_rate=0.1, vocab_size=300)
data |= dict(total_steps=5, tokenizer_path="tok")
ckpt["checkpoint_every"] = 2
"""
SAMPLES = f"""
data |= dict(sample_every=2, samples=dict(
    prompts={PROMPTS}, max_new_tokens=6, temperature=1.5, top_k=40, top_p=0.9, seed=5,
))
monitor = dict(trackers=[dict(type="jsonl")])
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tok"
    make_tokenizer(folder)
    return folder


def write(folder: Path, tokenizer: Path, extra: str = "") -> Path:
    folder.mkdir()
    (folder / "tok").symlink_to(tokenizer)
    write_run(folder, BASE + extra)
    return folder


def samples(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("RUN/*/*/samples.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_training(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    step = "ckpts/step-00000005"
    assert tensor_hashes(one / step) == tensor_hashes(other / step)


@covers(
    "data.sample_every",
    "data.samples",
    "data.samples.prompts",
    "data.samples.max_new_tokens",
    "data.samples.temperature",
    "data.samples.top_k",
    "data.samples.top_p",
    "data.samples.seed",
)
def test_samples_are_recorded_and_change_no_bit_of_the_training_also_over_a_resume(
    tmp_path: Path, run: Run, tokenizer: Path
) -> None:
    plain = write(tmp_path / "plain", tokenizer, "enable_tb = False\n")
    run(*TRAIN, cwd=plain)
    straight = write(tmp_path / "straight", tokenizer, SAMPLES)
    output = run(*TRAIN, cwd=straight)
    same_training(straight, plain)

    # What was recorded: after every second step and after the last one.
    rows = samples(straight)
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in (1, 3, 4) for prompt in PROMPTS
    ]
    assert {row["tokens"] for row in rows if row["step"] == 3} == {4 * 128}
    assert output.count("Sample: step=3 'the cat sat' -> ") == 2
    # Each prompt has a separate stream of random numbers.
    assert rows[0]["text"] != rows[2]["text"]

    # The answers of the checkpoint of that step, by the key/value cache.
    loaded = load_model(str(straight / "ckpts/step-00000002"), tokenizer=str(tokenizer))
    ids = [encode_prompt(loaded.tokenizer, prompt) for prompt in PROMPTS]
    sampling = SamplingParams(
        max_new_tokens=6,
        temperature=1.5,
        top_k=40,
        top_p=0.9,
        seed=5,
        eos_ids=loaded.eos_ids,
    )
    expected = generate_tokens(loaded.model, ids, sampling)
    for row, (answer,) in zip(rows, expected, strict=False):
        ended = answer[-1] in loaded.eos_ids
        assert row["text"] == loaded.tokenizer.decode(answer[: len(answer) - ended])
        assert row["finish"] == ("stop" if ended else "length")
        assert row["new_tokens"] == len(answer)

    # Trackers and TensorBoard have the texts.
    (tracked,) = straight.glob("RUN/*/*/tracker.jsonl")
    events = map(json.loads, tracked.read_text().splitlines())
    texts = {e["name"]: e["value"] for e in events if e["event"] == "text"}
    assert rows[0]["text"] in texts["samples/step-00000001"]
    (board,) = straight.glob("RUN/*/*/tensorboards/*/events*")
    assert b"samples/text_summary" in board.read_bytes()

    # Ended after step 3, whose samples were taken, and resumed from step 2's checkpoint.
    resumed = write(tmp_path / "resumed", tokenizer, SAMPLES + "enable_tb = False\n")
    run(*TRAIN, "--set", "data.total_steps=4", cwd=resumed)
    (commit,) = resumed.glob("ckpts/step-00000004/commit.json")
    commit.unlink()
    run(*TRAIN, cwd=resumed)
    same_training(resumed, plain)
    assert samples(resumed) == rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("sample_every=5", "samples.prompts is not set"),
        ("sample_every=5, samples=dict(prompts=[])", "at least one text"),
        (
            'sample_every=5, samples=dict(prompts=["a"]), tokenizer_path=None',
            "no tokenizer is named",
        ),
        (
            f"sample_every=5, samples=dict(prompts={['the cat sat on it ' * 30]})",
            "from 1 to 31: data.seq_len=32 has prompt and answer",
        ),
    ],
    ids=["no prompts", "empty", "no tokenizer", "too long"],
)
def test_prompts_that_cannot_be_answered_are_refused_before_the_first_step(
    tmp_path: Path, run: Run, tokenizer: Path, settings: str, message: str
) -> None:
    folder = write(tmp_path / "run", tokenizer, f"data |= dict({settings})\n")
    output = run(*TRAIN, cwd=folder, code=2)
    assert message in output and not (folder / "RUN").exists()


EVALUATED = """
data |= dict(eval_every=2, evaluation=dict(tasks=["choice.yaml", "generate.yaml", "rolling.yaml"], limit=7))
monitor = dict(trackers=[dict(type="jsonl")])
"""


def write_tasks(folder: Path) -> None:
    tasks = {"choice": CHOICE, "rolling": ROLLING, "generate": GENERATE % " s"}
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(text + COMMON)
    lines = "\n".join(map(json.dumps, questions()))
    (folder / "questions.jsonl").write_text(lines)


@covers(
    "data.eval_every",
    "data.evaluation",
    "data.evaluation.tasks",
    "data.evaluation.num_fewshot",
    "data.evaluation.limit",
)
def test_scores_are_those_of_the_checkpoint_and_change_no_bit_of_the_training(
    tmp_path: Path, run: Run, tokenizer: Path
) -> None:
    pytest.importorskip("lm_eval")
    plain = write(tmp_path / "plain", tokenizer, "enable_tb = False\n")
    run(*TRAIN, cwd=plain)
    scored = write(tmp_path / "scored", tokenizer, EVALUATED)
    write_tasks(scored)
    # Ended after step 3, and resumed from the checkpoint of step 2.
    run(*TRAIN, "--set", "data.total_steps=4", cwd=scored)
    (commit,) = scored.glob("ckpts/step-00000004/commit.json")
    commit.unlink()
    output = run(*TRAIN, cwd=scored)
    same_training(scored, plain)

    rows = {row["step"]: row for row in metrics(scored)}
    found = {
        step: {key: row[key] for key in row if key.startswith("eval/")}
        for step, row in rows.items()
    }
    assert [step for step in found if found[step]] == [1, 3, 4]
    assert set(found[4]) == {
        "eval/animals/acc",
        "eval/animals/acc_norm",
        "eval/answers/exact_match",
        "eval/texts/word_perplexity",
        "eval/texts/bits_per_byte",
    }
    said = f"Evaluation on animals: step=4 acc={found[4]['eval/animals/acc']}"
    assert output.count(said) == 1
    # ``evomesh eval`` of the last checkpoint.
    files = "choice.yaml,generate.yaml,rolling.yaml"
    command = ("evomesh", "eval", "ckpts", "--tasks", files, "--limit", "7")
    run(*command, "--output", "out.json", cwd=scored)
    results = json.loads((scored / "out.json").read_text())["results"]
    for key, value in found[4].items():
        _, task, metric = key.split("/")
        theirs = results[task][f"{metric},none"]
        assert value == pytest.approx(theirs, rel=1e-5), key
    # Trackers and TensorBoard.
    (tracked,) = scored.glob("RUN/*/*/tracker.jsonl")
    assert '"eval/animals/acc"' in tracked.read_text()
    boards = scored.glob("RUN/*/*/tensorboards/*/events*")
    assert any(b"eval/texts/bits_per_byte" in path.read_bytes() for path in boards)


def test_a_task_that_names_a_missing_column_is_refused_before_the_first_step(
    tmp_path: Path, run: Run, tokenizer: Path
) -> None:
    pytest.importorskip("lm_eval")
    folder = write(tmp_path / "run", tokenizer, EVALUATED)
    write_tasks(folder)
    (folder / "rolling.yaml").write_text(
        ROLLING.replace("{{text}}", "{{txt}}") + COMMON
    )
    output = run(*TRAIN, cwd=folder, code=2)
    assert (
        "(rolling.yaml): the task does not fit its data: 'txt' is undefined" in output
    )
    assert "a column of its data: question, choices, answer, text, said" in output
    write_tasks(folder)
    wrong = CHOICE.replace("doc_to_target: answer", "doc_to_target: answr")
    (folder / "choice.yaml").write_text(wrong + COMMON)
    output = run(*TRAIN, cwd=folder, code=2)
    assert "task animals: doc_to_target is 'answr'" in output
    assert not (folder / "RUN").exists() and "Traceback" not in output
