"""Write the last section of docs/spikes.md: a poisoned document in a small run, which is found, named and left out.

    python tools/spike_transcript.py          # a minute on two cores

All that stands in the section was printed by this very run. The texts count in English, so that a small model soon
knows them, and one of them is a page whose encoding was broken again and again. A seed of the data order is searched
with which it is read in the middle of the run. The Chinese page gets the same blocks.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# After the path is set.
from evomesh.config.loader import load_config  # noqa: E402
from evomesh.data.packing.ledger import StepLedger  # noqa: E402
from evomesh.data.packing.staged import open_training_corpus  # noqa: E402
from tests.support.pages import BLOCK, DOCS, Page  # noqa: E402
from tools.translations import mark  # noqa: E402

PAGE = Page(DOCS / "spikes.md")
TITLE = "## A poisoned document\n"
STEPS = 60
WANTED_STEPS = range(42, 54)
TEXTS, POISONED_ROW = 900, 133
DOCUMENT = f"en/counting.bin:{POISONED_ROW}"
WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
GARBAGE = "\u00c3\u00a2\u00e2\u201a\u00ac\u00e2\u201e\u00a2\ufffd "
CONFIG = """\
JOB_NAME = "{name}"
model_type = "LLAMA2"
model = dict(
    num_layers=2, hidden_size=64, num_attention_heads=4, num_kv_attention_heads=2, mlp_ratio=2.0, multiple_of=16,
    vocab_size=300, no_bias=True, qk_interleaved=False, dtype="torch.float32", max_position_embeddings=64,
)
data = dict(
    seq_len=64, micro_bsz=1, micro_num=4, total_steps={steps}, seed={seed}, train_folder="data",
    tokenizer_path="tokenizer",
)
adam = dict(lr=5e-3)
lr_scheduler = dict(total_steps={steps}, warmup_ratio=0.1)
ckpt = dict(save_ckpt_folder="local:ckpts/{name}", checkpoint_every=10)
"""
SPIKE = 'spike = dict(policy="rollback_and_skip", min_steps=16, window=16)\n'
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d (\d\d:\d\d:\d\d),\d+\t\w+ \S+ in \S+ -- (.*)")
SHOWN = re.compile(r"is a spike|micro-batches, most|^ |^layers|resuming step|left out:")
NOT_SHOWN = re.compile(r"documents  tokens|tflops|embedding\.|data\.seed")
SKIPPED = re.compile(r"data\.skip_batches=\d+")
INTRODUCTION = """
Written by `python tools/spike_transcript.py`: texts that count in English, and a page whose encoding was broken again
and again. Every line is of one run; other lines of the log are left out, and long ones cut.
"""


class DemoFolder:
    """A temporary folder with the demo's data and a poisoned document, in which commands are typed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seed = 0

    def run(self, *command: str, code: int = 0) -> str:
        """Run a command that must end with an exit code; return what it printed."""
        env = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=env,
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode != code:
            raise SystemExit(f"{command}: exit {done.returncode}\n{done.stderr}")
        return done.stdout + done.stderr

    def evomesh(self, *arguments: str, code: int = 0) -> str:
        return self.run("-m", "evomesh", *arguments, code=code)

    def make_data(self) -> None:
        """Write the texts, a tokenizer of them, and the token file."""
        draw = random.Random(0)
        texts = []
        for _ in range(TEXTS):
            first = draw.randrange(len(WORDS))
            words = [WORDS[(first + k) % len(WORDS)] for k in range(24)]
            texts.append(" ".join(words))
        texts[POISONED_ROW] = GARBAGE * 2
        raw = self.folder / "counting.jsonl"
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        raw.write_text("".join(lines))
        tokenizer = ["--output", "tokenizer", "--vocab-size", "300"]
        self.evomesh("tokenizer", "train", raw.name, *tokenizer)
        output = ["--output", "data/en/counting.bin", "--tokenizer", "tokenizer"]
        self.evomesh("tokenize", raw.name, *output)

    def write_config(self, name: str, extra: str) -> None:
        text = CONFIG.format(name=name, steps=STEPS, seed=self.seed)
        (self.folder / f"{name}.py").write_text(text + extra)

    def find_seed(self) -> None:
        """Choose the first seed with which one step in the middle of the run reads the document, and no other does."""
        os.chdir(self.folder)
        for self.seed in range(1, 1000):
            self.write_config("poisoned", SPIKE)
            settings = load_config("poisoned.py").config
            corpus = open_training_corpus(settings.data, settings.model.vocab_size)
            file, _, row = DOCUMENT.rpartition(":")
            uses = StepLedger(corpus, 1).uses(file, int(row), range(STEPS))
            steps = {use.step for use in uses}
            if len(steps) == 1 and steps <= set(WANTED_STEPS):
                return
        raise SystemExit("no seed has the document where it is wanted")


def shown_log(text: str) -> list[str]:
    """Return the lines about the spike, without date and place."""
    lines = []
    for line in text.splitlines():
        match = LOG_LINE.fullmatch(line)
        words = line if match is None else match[2]
        is_shown = SHOWN.search(words) and not NOT_SHOWN.search(words)
        if is_shown:
            time = f"{match[1]} " if match else ""
            lines.append(f"{time}{words}")
    return lines


def block(command: str, lines: Sequence[str], width: int = 150) -> str:
    """Return a command and what it printed as Markdown."""
    cut = [line if len(line) <= width else f"{line[: width - 4]} ..." for line in lines]
    return "\n".join(["```", f"$ {command}", *cut, "```", ""])


def transcript(demo: DemoFolder) -> str:
    """Run everything; return the section."""
    # 1. The run with the poisoned document.
    demo.make_data()
    demo.find_seed()
    log = demo.evomesh("train", "poisoned.py")
    (spikes,) = demo.folder.glob("RUN/poisoned/*/spikes.jsonl")
    spike = json.loads(spikes.read_text().splitlines()[0])
    step = spike["step"]

    # 2. The same without the packs of the step, and what others say about it.
    demo.write_config("without", f'data["skip_batches"] = "{step}"\n')
    demo.evomesh("train", "without.py")
    uses = demo.evomesh("ledger", "RUN/poisoned", "--document", DOCUMENT)
    compared = demo.evomesh("compare", "RUN/poisoned", "RUN/without", code=1)
    figures = [
        line for line in compared.splitlines() if line.startswith(("steps", "figures"))
    ]
    shown = {key: spike[key] for key in ("event", "step", "what", "zscore", "action", "left_out")}  # fmt: skip
    return "\n".join(
        [
            TITLE + INTRODUCTION,
            "In `poisoned.py`:\n",
            f"```python\n{SPIKE}```\n",
            block("evomesh train poisoned.py", shown_log(log)),
            "The line of `spikes.jsonl`, some of its fields, and the ledger:\n",
            block("head -1 RUN/poisoned/*/spikes.jsonl", [json.dumps(shown)], 300),
            block(
                f"evomesh ledger RUN/poisoned --document {DOCUMENT}", uses.splitlines()
            ),
            f"A run without `spike` and with `data.skip_batches={step}` has the same figures, to the bit:\n",
            block("evomesh compare RUN/poisoned RUN/without", figures),
        ]
    )


def update_translation() -> None:
    """Give the Chinese page the blocks and the step of the English one."""
    blocks = BLOCK.finditer(PAGE.text)
    settings = SKIPPED.finditer(PAGE.prose)
    path = PAGE.translation.path
    text = BLOCK.sub(lambda _: next(blocks)[0], PAGE.translation.text)
    text = SKIPPED.sub(lambda _: next(settings)[0], text)
    path.write_text(text, encoding="utf-8")
    mark(PAGE)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        section = transcript(DemoFolder(Path(name)))
        os.chdir(ROOT)
    text = PAGE.text.partition(TITLE)[0]
    PAGE.path.write_text(f"{text.rstrip()}\n\n{section.rstrip()}\n", encoding="utf-8")
    update_translation()


if __name__ == "__main__":
    main()
