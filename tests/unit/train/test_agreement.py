"""Ranks that differ in config, code or data are refused on every rank with the same sentence."""

from __future__ import annotations

from typing import Any

import pytest

from evomesh.config.schema import Config
from evomesh.errors import UserError
from evomesh.parallel.exchange import SingleProcessExchange
from evomesh.train import agreement
from evomesh.train.agreement import (
    config_facts,
    data_facts,
    first_difference,
    require_agreement,
)
from tests.unit.checkpoint.native.ranks import ThreadExchange, run_ranks


def config(**sections: dict[str, Any]) -> Config:
    return Config.model_validate(sections)


def outcome(configs: list[Config]) -> list[str]:
    """The message of every rank, "" where it agreed."""

    def one(exchange: ThreadExchange) -> str:
        try:
            require_agreement(exchange, config_facts(configs[exchange.rank]))
        except UserError as error:
            assert error.exit_code == 2
            return str(error)
        return ""

    return run_ranks(len(configs), one)


@pytest.mark.parametrize(
    ("section", "key", "value", "shown"),
    [
        ("adam", "lr", 3e-3, "adam.lr differs: "),
        ("data", "seed", 7, "data.seed differs: "),
        ("run", "seed", 7, "seed differs: "),
        ("run", "job_name", "other", "JOB_NAME differs: "),
        ("model", "num_layers", 3, "model.num_layers differs: "),
        ("ckpt", "checkpoint_every", 3, "ckpt.checkpoint_every differs: "),
        ("loss", "label_smoothing", 0.1, "loss.label_smoothing differs: "),
    ],
)
def test_the_key_that_differs_is_named_on_all_ranks(
    section: str, key: str, value: Any, shown: str
) -> None:
    other = config(**{section: {key: value}})
    messages = outcome([config(), config(), other, config()])
    assert len(set(messages)) == 1
    (line, *_) = messages[0].splitlines()
    assert line.startswith(f"ranks disagree: {shown}")
    default = getattr(getattr(config(), section), key)
    for rank, expected in enumerate((default, default, value, default)):
        assert repr(expected) in line
        assert f"rank {rank} on " in line


def test_equal_ranks_agree() -> None:
    assert outcome([config(adam={"lr": 1e-3})] * 4) == [""] * 4
    require_agreement(SingleProcessExchange(), config_facts(config()))


def test_nodes_may_keep_things_in_other_places() -> None:
    places = config(
        run={"run_dir": "/a"}, data={"train_folder": "/b", "shm_path": "/c"}
    )
    assert outcome([config(), places]) == ["", ""]


@pytest.mark.parametrize(
    "fact", ["evomesh's version", "evomesh's code", "torch's version"]
)
def test_other_code_is_named(fact: str) -> None:
    facts = config_facts(config())
    ranks = [
        {"host": f"n{rank}", "facts": facts | {fact: str(rank)}} for rank in range(2)
    ]
    assert (
        first_difference(ranks) == f"{fact} differs: 0 (rank 0 on n0), 1 (rank 1 on n1)"
    )


def test_the_digest_of_the_code_follows_every_file(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("__init__.py", "sub/a.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(agreement.evomesh, "__file__", str(tmp_path / "__init__.py"))
    before = agreement.source_digest()
    assert agreement.source_digest() == before
    (tmp_path / "sub/a.py").write_text("x = 2\n")
    assert agreement.source_digest() != before


def test_the_first_data_file_that_differs_is_named() -> None:
    files = [{"file": f"en/{name}.bin", "bytes": 10, "hash": name} for name in "abc"]
    changed = [files[0], files[1] | {"bytes": 11}, files[2] | {"hash": "z"}]
    manifests = [{"files": files, "hash": "1"}, {"files": changed, "hash": "2"}]
    ranks = [{"host": "n", "facts": data_facts(manifest)} for manifest in manifests]
    assert first_difference(ranks).startswith(
        "data file en/b.bin differs: bytes 10, hash b (rank 0 on n), bytes 11"
    )
    missing = [{"files": files, "hash": "1"}, {"files": files[1:], "hash": "2"}]
    ranks = [{"host": "n", "facts": data_facts(manifest)} for manifest in missing]
    assert "absent (rank 1 on n)" in first_difference(ranks)
    order = [{"files": files, "hash": "1"}, {"files": files[::-1], "hash": "2"}]
    ranks = [{"host": "n", "facts": data_facts(manifest)} for manifest in order]
    assert first_difference(ranks).startswith(
        "fingerprint of the training data differs: 1 "
    )


def test_many_ranks_and_long_values_stay_readable() -> None:
    ranks = [
        {"host": "n", "facts": {"key": "x" * 1000 + str(rank % 2)}}
        for rank in range(1024)
    ]
    sentence = first_difference(ranks)
    assert len(sentence) < 500 and "and 509 more" in sentence
