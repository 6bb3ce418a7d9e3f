"""Compare the trained demo models with simpler ones of the same data, then print a sample and an answer.

    python tools/demo_report.py

The two count models are fitted on every training token, and the bigram's interpolation weight is chosen on the held-out
text itself, which favors the bigram. All three are scored on the same held-out targets. The chat is asked every
held-out question, and compared with naming the module of most training questions each time. Exits with an error if a
demo model does not beat the simpler ones, or if the training loss did not halve.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from demo_chat import Question, answer_shares, read_questions
from rich.console import Console
from rich.table import Table

from evomesh import LoadedModel, SamplingParams, generate_tokens, load_model
from evomesh.config.loader import load_config
from evomesh.config.schema import IGNORE, Config
from evomesh.data.build import ValidationSet, build_train_data, build_valid_data
from evomesh.data.chat_message import ChatMessage

CONFIG = "configs/demo.py"
CHECKPOINTS = "llm_ckpts/demo"
CHAT_CHECKPOINTS = "llm_ckpts/demo_chat"
# Longer than the first sentence of any answer, which names the module.
ANSWER_TOKENS = 32
QUESTIONS_AT_ONCE = 64
PROMPT = 'def read_file(path):\n    """'
# Tried for the interpolation with the unigram.
BIGRAM_WEIGHTS = (1, 3, 10, 30, 100, 300, 1000)


class TokenPairs(NamedTuple):
    """Tokens and the token that follows each of them."""

    previous: np.ndarray
    following: np.ndarray


def held_out_pairs(valid: ValidationSet) -> TokenPairs:
    """Return the inputs and targets of a validation set."""
    tokens = []
    targets = []
    for batch in valid.batches(0, 1):
        is_target = batch.labels != IGNORE
        tokens.append(batch.tokens[is_target].numpy())
        targets.append(batch.labels[is_target].numpy())
    return TokenPairs(np.concatenate(tokens), np.concatenate(targets))


def training_pairs(folder: Path) -> TokenPairs:
    """Return the pairs of neighbors in all documents below a folder."""
    previous = []
    following = []
    for path in sorted(folder.rglob("*.bin")):
        for line in path.open():
            tokens = json.loads(line)["tokens"]
            previous += tokens[:-1]
            following += tokens[1:]
    return TokenPairs(np.array(previous), np.array(following))


class CountModels:
    """Unigram (add-one) and bigram (interpolated with the unigram) models, fitted by counting."""

    def __init__(self, pairs: TokenPairs, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        counts = np.bincount(pairs.following, minlength=vocab_size) + 1
        self.unigram = counts / counts.sum()
        self.context_counts = np.bincount(pairs.previous, minlength=vocab_size)
        self.pair_ids, self.pair_counts = np.unique(
            self._ids(pairs), return_counts=True
        )

    def _ids(self, pairs: TokenPairs) -> np.ndarray:
        """Return one number for each pair."""
        return pairs.previous * self.vocab_size + pairs.following

    def losses(self, pairs: TokenPairs) -> tuple[float, float]:
        """Return the mean negative log-likelihood, in nats, of the unigram and of the bigram model."""
        # How often each pair occurs in the training data.
        ids = self._ids(pairs)
        index = np.searchsorted(self.pair_ids, ids).clip(max=len(self.pair_ids) - 1)
        is_known = self.pair_ids[index] == ids
        pair_counts = np.where(is_known, self.pair_counts[index], 0)

        unigram = self.unigram[pairs.following]
        context_counts = self.context_counts[pairs.previous]
        bigram_losses = []
        for weight in BIGRAM_WEIGHTS:
            bigram = (pair_counts + weight * unigram) / (context_counts + weight)
            bigram_losses.append(-np.log(bigram).mean())
        return float(-np.log(unigram).mean()), float(min(bigram_losses))


def read_metrics(run_folder: Path) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Return the metrics of all training steps and those of the last validation of a run."""
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").open()]
    steps = [row for row in rows if "loss" in row]
    validations = [row for row in rows if any(key.startswith("val/") for key in row)]
    return steps, validations[-1]


def print_losses(console: Console, config: Config, run_folder: Path) -> bool:
    """Print the losses of the demo model and of the count models; return whether the demo model learned enough."""
    steps, validation = read_metrics(run_folder)
    assert config.data.train_folder is not None
    vocab_size = config.model.vocab_size
    build_train_data(config.data, vocab_size)  # check the dataset before counting
    pairs = training_pairs(Path(config.data.train_folder))
    count_models = CountModels(pairs, vocab_size)

    table = Table(title="held-out loss (nats per token, lower is better)")
    for column in ("set", "tokens", "this model", "bigram", "unigram", "bits per byte"):
        table.add_column(column, justify="left" if column == "set" else "right")
    is_best = True
    for valid in build_valid_data(config.data, vocab_size):
        held_out = held_out_pairs(valid)
        unigram, bigram = count_models.losses(held_out)
        demo = validation[f"val/{valid.name}_loss"]
        is_best &= demo < min(unigram, bigram)
        losses = [f"{loss:.3f}" for loss in (demo, bigram, unigram)]
        bits_per_byte = validation[f"val/{valid.name}_bpb"]
        targets = f"{len(held_out.following):,}"
        table.add_row(valid.name, targets, *losses, f"{bits_per_byte:.3f}")
    first = steps[0]["loss"]
    last = float(np.mean([row["loss"] for row in steps[-20:]]))
    console.print(
        f"training loss: {first:.3f} at step 0, {last:.3f} over the last 20 of {len(steps)} steps"
    )
    console.print(table)
    return is_best and last < first / 2


def answers(chat: LoadedModel, questions: list[Question]) -> list[str]:
    """Return the beginning of the model's most probable answer to each question."""
    assert chat.template is not None
    sampling = SamplingParams(
        do_sample=False, max_new_tokens=ANSWER_TOKENS, eos_ids=chat.eos_ids
    )
    prompts = []
    for question in questions:
        message = ChatMessage("user", question.text, train=False)
        prompts.append(chat.template.encode_prompt([message]))
    generated = generate_tokens(
        chat.model, prompts, sampling, batch_size=QUESTIONS_AT_ONCE
    )
    return [chat.tokenizer.decode(answer) for [answer] in generated]


def print_shares(
    console: Console, chat: LoadedModel, questions: list[Question]
) -> bool:
    """Print how many held-out answers name the right module; return whether they are more than by guessing."""
    asked = [question for question in questions if question.is_held_out]
    trained = Counter(one.module for one in questions if not one.is_held_out)
    [(guess, _)] = trained.most_common(1)
    shares = answer_shares(asked, answers(chat, asked), guess)

    table = Table(title="chat: answers that name the right module")
    for column in ("held out", "this model", f'always "{guess}"', "any module"):
        table.add_column(column, justify="right")
    table.add_row(f"{len(asked):,}", *(f"{share:.1%}" for share in shares))
    console.print(table)
    return shares.right > shares.guessed


def generate(checkpoints: str, prompt: str, *options: str) -> None:
    """Print what a model generates after a prompt."""
    command = [sys.executable, "-m", "evomesh", "generate", "--ckpt", checkpoints]
    command += ["--prompt", prompt, "--max-new-tokens", "80", *options]
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    config = load_config(CONFIG).config
    run_folder = max(Path("RUN/demo").iterdir(), key=lambda path: path.stat().st_mtime)
    console = Console()
    has_learned = print_losses(console, config, run_folder)
    chat = load_model(CHAT_CHECKPOINTS, template="auto")
    questions = read_questions()
    has_learned &= print_shares(console, chat, questions)
    if not has_learned:
        sys.exit("the demo did not learn as much as it should: see the tables")
    generate(CHECKPOINTS, PROMPT, "--temperature", "0.5", "--seed", "1")
    asked = next(question for question in questions if question.is_held_out)
    print(f"\n> {asked.text}", flush=True)
    generate(CHAT_CHECKPOINTS, asked.text, "--chat")
    print(f"\nto ask more: evomesh chat --ckpt {CHAT_CHECKPOINTS}")


if __name__ == "__main__":
    main()
