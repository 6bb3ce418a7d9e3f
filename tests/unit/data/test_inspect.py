"""``evomesh data inspect``, ``show`` and ``order`` on the command line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from evomesh.cli.data import app
from evomesh.errors import UserError
from tests.support.chat_folders import byte_level
from tests.support.covers import covers

ROOT = Path(__file__).parents[3]
IGNORED = -100


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def worked_example(write_bin: Any) -> Path:
    """Write the example of InternEvo's guide, stored so that the fixed shuffle brings it into order."""
    documents = [[1, 2], [3, 4], [5, 6, 7], [8, 9, 10, 11, 12, 13]]
    order = np.arange(4)
    np.random.RandomState(1024).shuffle(order)
    stored: list[list[int]] = [[]] * 4
    for position, index in enumerate(order):
        stored[index] = documents[position]
    path: Path = write_bin(stored)
    return path


def test_show_prints_what_the_model_sees(write_bin: Any) -> None:
    path = str(worked_example(write_bin))
    # packs of 6 in segments of at most 3
    pack = json.loads(
        run("show", path, "--seq-len", "3", "--micro-bsz", "2", "--pack", "1", "--json")
    )
    assert pack == {
        "tokens": [7, 8, 9, 10, 11, 12],
        "labels": [IGNORED, 9, 10, 11, 12, 13],
        "indexes": [0, 0, 1, 2, 0, 1],
        "cu_seqlens": [0, 1, 4, 6],
        "type_ids": [0] * 6,
    }
    pack = json.loads(
        run(
            "show",
            path,
            "--seq-len",
            "3",
            "--micro-bsz",
            "2",
            "--pack-sample-into-one",
            "--json",
        )
    )
    assert pack["cu_seqlens"] == [0, 3, 6]
    assert pack["labels"][-1] == IGNORED
    text = run("show", path, "--seq-len", "3")
    assert "segment 0" in text
    with pytest.raises(UserError, match="no pack 4"):
        run("show", path, "--seq-len", "3", "--pack", "4")


@pytest.mark.parametrize("command", ["show", "inspect"])
def test_texts_of_another_tokenizer_are_warned_of(
    write_bin: Any, tmp_path: Path, command: str
) -> None:
    path = worked_example(write_bin)
    byte_level(tmp_path, ["<s>", "</s>"])
    tokenizer = tmp_path / "tokenizer.json"
    ours = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    for made_with, words in ((ours, 0), ("9" * 64, 1)):
        Path(f"{path}.json").write_text(json.dumps({"tokenizer_hash": made_with}))
        arguments = [command, str(path), "--seq-len", "3", "-t", str(tokenizer)]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.stderr.count("warning: ") == words
    assert f"(tokenizer {'9' * 12}) than {tokenizer} ({ours[:12]})" in result.stderr


def test_show_of_a_folder_numbers_packs_as_training_does(
    write_bin: Any, tmp_path: Path
) -> None:
    write_bin([[1, 1, 1]], "train/cn/a.bin")
    write_bin([[2, 2, 2]], "train/en/a.bin")
    pack = json.loads(
        run("show", str(tmp_path / "train"), "--seq-len", "3", "--pack", "1", "--json")
    )
    assert (pack["tokens"], pack["type_ids"]) == ([2, 2, 2], [1, 1, 1])


def test_inspect_prints_counts_and_what_packing_leaves_out(
    write_bin: Any, tmp_path: Path
) -> None:
    write_bin([[1, -2, 3], [4] * 9, [5]], "train/en/a.bin")
    text = run("inspect", str(tmp_path / "train"), "--seq-len", "4")
    assert "en/a.bin: 3 documents, 13 tokens (shortest 1, median 3, longest 9)" in text
    assert "packs of 4 tokens: 3; tails left out: 1 token (7.7%" in text
    assert "ids of 13 sampled tokens: 5 distinct, 1 .. 5, 7.7% masked" in text


@pytest.mark.slow
@covers("promise:data-order")
def test_the_order_command_and_get_data_order_agree(
    write_bin: Any, tmp_path: Path
) -> None:
    for name in (
        "data/train/en/b.bin",
        "data/train/en/a/x.bin",
        "data/cn/train/data/y.bin",
        "data/cn/a b.bin",
    ):
        write_bin([[1]], name)
    run("order", str(tmp_path / "data"), "--output", str(tmp_path / "o.txt"))
    expected = [
        "cn/a b.bin",
        "cn/train/data/y.bin",
        "train/en/b.bin",
        "train/en/a/x.bin",
    ]
    assert (tmp_path / "o.txt").read_text().splitlines() == expected
    command = [
        sys.executable,
        str(ROOT / "tools/get_data_order.py"),
        "--data-folder",
        f"{tmp_path}/data/",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "--save-folder", str(tmp_path / "new/x")],
        check=True,
        env=environment,
    )
    assert (tmp_path / "new/x/data_order.txt").read_text().splitlines() == expected
