"""The questions of the demo's chat: right according to Python itself, and held out by name."""

from __future__ import annotations

import argparse
import inspect
import json
import logging.handlers
from functools import reduce
from types import ModuleType

import pytest

from evomesh.demo.questions import Question, answer_shares, named_module, read_questions

pytestmark = pytest.mark.xdist_group("demo")  # one worker, which reads them once

ROWS = [
    Question("A.f", "a.b", "Return one."),
    Question("g", "c", "Return two."),
    Question("h", "c", "Return three."),
    Question("k", "d", "Return four."),
]


@pytest.mark.parametrize("module", [argparse, json.decoder, logging.handlers])
def test_a_description_is_how_the_docstring_begins(
    module: ModuleType, questions: list[Question]
) -> None:
    asked = [one for one in questions if one.module == module.__name__]
    assert len(asked) >= 3
    for question in asked:
        target = reduce(getattr, question.name.split("."), module)
        words = " ".join((inspect.getdoc(target) or "").split())
        assert words.startswith(question.description.removesuffix(".")), question
        assert target.__module__ == question.module


def test_every_name_is_asked_once_and_has_one_module(questions: list[Question]) -> None:
    names = [question.name for question in questions]
    assert len(set(names)) == len(names)
    # Defined in ntpath and posixpath, both with a docstring.
    assert "isabs" not in names
    assert "JSONEncoder.iterencode" in names


def test_a_tenth_is_held_out_and_a_class_is_in_both_splits(
    questions: list[Question],
) -> None:
    held_out = [one for one in questions if one.is_held_out]
    assert 0.08 < len(held_out) / len(questions) < 0.12
    assert read_questions() == questions
    # By the first four bytes of SHA-256 modulo ten, which no seed changes.
    splits = {one.name: one.is_held_out for one in questions}
    assert splits["BaseEventLoop.is_running"]
    assert not splits["BaseEventLoop.run_forever"]


def test_the_answer_names_its_module(questions: list[Question]) -> None:
    assert all(named_module(one.answer) == one.module for one in questions)
    assert named_module("It is in json.") is None
    assert named_module("Parse a document. It is in json. ") is None


def test_shares_of_right_answers() -> None:
    answers = [
        "It is in a.b. Something else.",
        "It is in a. Return two.",
        "In c.",
        "It is in c. ",
    ]
    assert answer_shares(ROWS, answers, guess="c") == (0.25, 0.5, 0.75)
    assert answer_shares(ROWS, answers, guess="d").guessed == 0.25
