"""The ledger against what the batches of every rank really held, read back from the files by plain code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from evomesh.cli.app import app
from evomesh.config.data import DataConfig
from evomesh.config.step_values import BatchSizeRampup
from evomesh.data.packing.corpus import Corpus
from evomesh.data.packing.ledger import LedgerEntry, StepLedger
from evomesh.data.packing.staged import StagedCorpus, open_training_corpus
from evomesh.errors import UserError
from tests.support.golden import write_bin

# File: documents.
FILES = {"en/a.bin": 37, "en/b.bin": 5, "cn/deep/z.bin": 61, "code/c.bin": 24}
STEPS = 13


def documents_of(file: str) -> list[list[int]]:
    """Documents of 0 to 28 tokens; every token of the data set is another number."""
    first = 1 + 10_000 * list(FILES).index(file)
    lengths = [(7 * row + len(file)) % 29 for row in range(FILES[file])]
    starts = [first + sum(lengths[:row]) for row in range(len(lengths))]
    return [
        list(range(start, start + length))
        for start, length in zip(starts, lengths, strict=True)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for file in FILES:
        write_bin(folder / file, documents_of(file))
    return folder


def open_data(folder: Path, **values: Any) -> Corpus | StagedCorpus:
    options = {
        "seq_len": 8,
        "micro_bsz": 2,
        "micro_num": 2,
        "num_worker": 0,
        "train_folder": str(folder),
    }
    return open_training_corpus(DataConfig(**(options | values)), None)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "short left out": {"min_length": 9},
    "rampup": {"rampup_batch_size": BatchSizeRampup(1, 1, 5), "micro_num": 4},
    "weights": {"dataset_weights": {"en/": 0.7, "cn/": 0.2, "code/": 0.1}},
    "one stream": {"remainder": "carry"},
    "padded": {"remainder": "pad"},
    "xtuner": {"order": "xtuner"},
    "one sample": {"pack_sample_into_one": True},
    "stages": {
        "total_steps": STEPS,
        "stages": [
            {"until": 2, "dataset_weights": {"en/": 0.7, "cn/": 0.2, "code/": 0.1}},
            {"until": 9, "seq_len": 4, "micro_num": 3},
            {},
        ],
    },
}


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dp_size", [1, 3])
class TestAgainstBatches:
    def test_a_step_is_what_the_ranks_read(
        self, folder: Path, values: dict[str, Any], dp_size: int
    ) -> None:
        corpus = open_data(folder, **values)
        lookup = StepLedger(corpus, dp_size)
        streams = [corpus.stream(rank, dp_size) for rank in range(dp_size)]
        for step in range(STEPS):
            for rank, stream in enumerate(streams):
                tokens = next(stream).tokens.tolist()
                # Zeros where no document is: padding.
                told = [[0] * len(row) for row in tokens]
                for entry in lookup.step(step, rank):
                    assert (entry.step, entry.rank) == (step, rank)
                    part = documents_of(entry.file)[entry.row][entry.start : entry.stop]
                    told[entry.micro_batch][entry.offset : entry.offset + len(part)] = (
                        part
                    )
                assert told == tokens

    def test_the_uses_of_a_document_are_all_there_are(
        self, folder: Path, values: dict[str, Any], dp_size: int
    ) -> None:
        lookup = StepLedger(open_data(folder, **values), dp_size)
        brute: dict[tuple[str, int], list[LedgerEntry]] = {}
        for step in range(STEPS):
            for entry in lookup.step(step):
                brute.setdefault((entry.file, entry.row), []).append(entry)
        # Passes repeat.
        assert any(
            len({entry.step for entry in entries}) > 1 for entries in brute.values()
        )
        for (file, row), entries in list(brute.items())[::3]:
            assert sorted(lookup.uses(file, row, range(STEPS)), key=str) == sorted(
                entries, key=str
            )


def test_documents_that_are_not_there(folder: Path) -> None:
    lookup = StepLedger(open_data(folder, min_length=9), 1)
    short = next(
        row
        for row, document in enumerate(documents_of("en/a.bin"))
        if len(document) < 9
    )
    for file, row, words in (
        ("en/x.bin", 0, "no token file 'en/x.bin'"),
        ("en/a.bin", 37, "0 to 36"),
        ("en/a.bin", short, "fewer than data.min_length"),
    ):
        with pytest.raises(UserError, match=words):
            list(lookup.uses(file, row, range(1)))


CONFIG = """
model_type = "LLAMA2"
model = dict(num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=50000)
data = dict(seq_len=8, micro_bsz=2, micro_num=2, total_steps=6, train_folder={folder!r}, skip_batches="1")
parallel = dict(tensor=2)
"""


def run(folder: Path, tmp_path: Path, *options: str) -> str:
    (tmp_path / "c.py").write_text(CONFIG.format(folder=str(folder)))
    result = CliRunner().invoke(
        app, ["ledger", str(tmp_path / "c.py"), *options], catch_exceptions=False
    )
    assert result.exit_code == 0
    return result.output


def test_command_lists_a_step_and_a_document(folder: Path, tmp_path: Path) -> None:
    rows = [
        json.loads(line)
        for line in run(
            folder, tmp_path, "--gpus", "4", "--step", "3", "--json"
        ).splitlines()
    ]
    # Four processes, two of them of one tensor group.
    assert {row["rank"] for row in rows} == {0, 1}
    assert sum(row["stop"] - row["start"] for row in rows) == 2 * 2 * 16
    name = f"{rows[0]['file']}:{rows[0]['row']}"
    uses = run(folder, tmp_path, "--gpus", "4", "--document", name)
    assert (
        f"step 3 rank {rows[0]['rank']} micro-batch {rows[0]['micro_batch']} pack {rows[0]['pack']}"
        in uses
    )
    skipped = run(folder, tmp_path, "--step", "1", "--rank", "0").splitlines()
    assert all(line.endswith("(skipped: data.skip_batches)") for line in skipped)


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "exactly one of --step and --document"),
        (["--step", "1", "--document", "en/a.bin:1"], "exactly one"),
        (["--document", "en/a.bin"], "expected: FILE:ROW"),
        (["--step", "1", "--gpus", "4", "--rank", "2"], "0 to 1"),
        (["--step", "6", "--gpus", "2"], r"0 to 5 \(data.total_steps\)"),
        (
            [
                *("--step", "1", "--set", "data.type=streaming"),
                *("--set", "data.tokenizer_path=t"),
            ],
            "only known while it is read",
        ),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, options: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(folder, tmp_path, *options)
