"""Compare the trained demo models with simpler ones of the same data.

The two count models are fitted on every training token, and the bigram's interpolation weight is chosen on the held-out
text itself, which favors the bigram. All three are scored on the same held-out targets. The chat is asked every
held-out question, and compared with naming the module of most training questions each time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, JustifyMethod
from rich.table import Table

from evomesh.checkpoint.restore import LoadedModel
from evomesh.config.schema import Config
from evomesh.data.build import build_train_data, build_valid_data
from evomesh.data.chat_message import ChatMessage
from evomesh.demo.count_models import CountModels, held_out_pairs, training_pairs
from evomesh.demo.questions import Question, answer_shares
from evomesh.generate.decode import generate_tokens
from evomesh.generate.options import SamplingParams

# Longer than the first sentence of any answer, which names the module.
ANSWER_TOKENS = 32
QUESTIONS_AT_ONCE = 64
LAST_STEPS = 20  # whose mean loss is that of the end
COLUMNS = ("set", "tokens", "this model", "bigram", "unigram", "bits per byte")


def read_metrics(run_folder: Path) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Return the metrics of all training steps and those of the last validation of a run."""
    file = run_folder / "metrics.jsonl"
    text = file.read_text()
    steps = []
    validation: dict[str, float] = {}
    for line in text.splitlines():
        row = json.loads(line)
        if "loss" in row:
            steps.append(row)
        is_validation = any(key.startswith("val/") for key in row)
        if is_validation:
            validation = row
    return steps, validation


def print_losses(console: Console, config: Config, run_folder: Path) -> bool:
    """Print the losses of the demo model and of the count models; return whether the demo model learned enough."""
    steps, validation = read_metrics(run_folder)
    first = steps[0]["loss"]
    last_losses = [row["loss"] for row in steps[-LAST_STEPS:]]
    last = sum(last_losses) / len(last_losses)
    is_best, table = _compare_losses(config, validation)
    console.print(
        f"training loss: {first:.3f} at step 0, {last:.3f} over the last {len(last_losses)} of {len(steps)} steps"
    )
    console.print(table)
    return is_best and last < first / 2


def _compare_losses(config: Config, validation: dict[str, float]) -> tuple[bool, Table]:
    """Return whether the demo model has the lowest loss on every validation set, and the table of all losses."""
    assert config.data.train_folder is not None
    vocab_size = config.model.vocab_size
    build_train_data(config.data, vocab_size)  # check the dataset before counting
    pairs = training_pairs(Path(config.data.train_folder))
    count_models = CountModels(pairs, vocab_size)

    table = Table(title="held-out loss (nats per token, lower is better)")
    for column in COLUMNS:
        justify: JustifyMethod = "left" if column == "set" else "right"
        table.add_column(column, justify=justify)

    is_best = True
    for valid in build_valid_data(config.data, vocab_size):
        held_out = held_out_pairs(valid)
        unigram, bigram = count_models.losses(held_out)
        demo = validation[f"val/{valid.name}_loss"]
        is_best &= demo < min(unigram, bigram)
        bits_per_byte = validation[f"val/{valid.name}_bpb"]
        table.add_row(
            valid.name,
            f"{len(held_out.following):,}",
            f"{demo:.3f}",
            f"{bigram:.3f}",
            f"{unigram:.3f}",
            f"{bits_per_byte:.3f}",
        )
    return is_best, table


def print_shares(
    console: Console, chat: LoadedModel, questions: Sequence[Question]
) -> bool:
    """Print how many held-out answers name the right module; return whether they are more than by guessing."""
    asked = []
    trained: Counter[str] = Counter()  # questions of each module
    for question in questions:
        if question.is_held_out:
            asked.append(question)
        else:
            trained[question.module] += 1
    [(guess, _)] = trained.most_common(1)
    answers = _answers(chat, asked)
    shares = answer_shares(asked, answers, guess)

    table = Table(title="chat: answers that name the right module")
    for column in ("held out", "this model", f'always "{guess}"', "any module"):
        table.add_column(column, justify="right")
    percentages = []
    for share in shares:
        percentages.append(f"{share:.1%}")
    table.add_row(f"{len(asked):,}", *percentages)
    console.print(table)
    return shares.right > shares.guessed


def _answers(chat: LoadedModel, questions: Sequence[Question]) -> list[str]:
    """Return the beginning of the model's most probable answer to each question."""
    assert chat.template is not None
    sampling = SamplingParams(
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        eos_ids=chat.eos_ids,
    )
    prompts = []
    for question in questions:
        message = ChatMessage("user", question.text, train=False)
        prompts.append(chat.template.encode_prompt([message]))
    generated = generate_tokens(
        chat.model, prompts, sampling, batch_size=QUESTIONS_AT_ONCE
    )
    return [chat.tokenizer.decode(answer) for [answer] in generated]
