"""Every command that a page shows is one that the command line takes."""

from __future__ import annotations

import pytest

from evomesh.error_codes.catalog import find_page
from tests.contract.test_error_examples import TYPED
from tests.support.page_commands import (
    PageCommand,
    commands_of,
    pages_with_commands,
    refusal,
)
from tests.support.pages import DOCS, Page


def typed_examples() -> set[str]:
    """Return the commands of errors.md that a test types: some of them are wrong on purpose."""
    pages = [find_page(code) for code in TYPED]
    examples = [page.example for page in pages if page]
    return {example.splitlines()[0].removeprefix("$ ") for example in examples}


@pytest.mark.parametrize("page", pages_with_commands(), ids=lambda page: page.path.name)
def test_the_command_line_takes_the_commands(page: Page) -> None:
    allowed = typed_examples() if page.path == DOCS / "errors.md" else set()
    refused = {
        command.text: refusal(command)
        for command in commands_of(page)
        if command.text not in allowed and refusal(command)
    }
    assert not refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("evomesh train --config config.py", "No such option"),
        ("evomesh eval --ckpt ckpts --tasks hellaswag", "No such option"),
        ("evomesh ckpt ls folder  what it does", "unexpected extra argument"),
        ("evomesh tokenize text.txt", "Missing option"),
        ("NPROC_PER_NODE=2 .venv/bin/evomesh trian c.py && ls", "No such command"),
        ("torchrun --nproc_per_node=8 train.py --confg c.py", "No such option"),
        ("evomesh ckpt verify ckpts [--deap]", "No such option"),
    ],
)
def test_a_wrong_command_is_found(text: str, words: str) -> None:
    assert words in refusal(PageCommand("page.md", text, is_mention=False))


def test_a_sentence_may_leave_out_arguments_but_not_invent_options() -> None:
    def refused(text: str) -> str:
        return refusal(PageCommand("page.md", text, is_mention=True))

    assert not refused("evomesh ckpt average")
    assert not refused("evomesh plan CONFIG --gpus N")
    assert not refused("evomesh --debug COMMAND")
    assert "No such option" in refused("evomesh plan CONFIG --gpu N")
