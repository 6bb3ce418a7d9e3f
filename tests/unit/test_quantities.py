"""Counts and sizes in messages."""

from __future__ import annotations

import pytest

from evomesh.quantities import counted, readable


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [
        (1, "chunk", "1 chunk"),
        (0, "step", "0 steps"),
        (2, "process", "2 processes"),
        (1, "process", "1 process"),
        (3, "micro-batch", "3 micro-batches"),
        (2, "epoch", "2 epochs"),
        (1234, "data-parallel rank", "1,234 data-parallel ranks"),
    ],
)
def test_a_noun_is_in_the_plural_unless_there_is_one(
    number: int, noun: str, words: str
) -> None:
    assert counted(number, noun) == words


def test_a_number_keeps_its_form() -> None:
    assert counted(1.5, "epoch", "g") == "1.5 epochs"
    assert counted(1.0, "epoch", "g") == "1 epoch"
    assert counted(1234, "token", "") == "1234 tokens"


@pytest.mark.parametrize(
    ("size", "words", "in_table"),
    [
        (0, "0 B", "0 B"),
        (1023, "1023 B", "1.00 KiB"),
        (1536, "1.5 KiB", "1.50 KiB"),
        (2**29, "512.0 MiB", "0.50 GiB"),
        (50 * 2**20, "50.0 MiB", "50.00 MiB"),
        (3 * 2**30, "3.0 GiB", "3.00 GiB"),
        (5000 * 2**40, "5000.0 TiB", "5000.00 TiB"),
    ],
)
def test_a_size_has_the_unit_that_shows_it(
    size: int, words: str, in_table: str
) -> None:
    assert readable(size) == words
    assert readable(size, digits=2, least=0.1) == in_table
