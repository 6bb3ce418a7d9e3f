"""``evomesh convert``: its help names every kind of Hugging Face folder that the code reads or writes."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
from typer.testing import CliRunner

from evomesh.checkpoint.huggingface.config import CLASSES
from evomesh.cli.convert import app
from evomesh.config.hugging_face_facts import HUGGING_FACE_FACTS


@pytest.mark.parametrize(
    ("command", "names"), [("from-hf", HUGGING_FACE_FACTS), ("to-hf", CLASSES)]
)
def test_help_names_every_architecture(command: str, names: Iterable[str]) -> None:
    printed = CliRunner().invoke(app, [command, "--help"]).output
    assert set(names) <= set(re.findall(r"\w+", printed))
