"""Questions about the standard library, with answers made from its docstrings."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HELD_OUT_EVERY = 10  # one question in this many is held out
MIN_LENGTH = 12  # characters of a description
MAX_LENGTH = 200
# Tests, programs and what later versions of Python leave out.
LEFT_OUT = {
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "test",
    "tests",
    "turtledemo",
}
ANSWER = re.compile(r"It is in (\S+)\. ")


class Question(NamedTuple):
    """A question about one function, class or method, and the answer to it."""

    name: str  # of a method: CLASS.METHOD
    module: str
    description: str  # first sentence of the docstring

    @property
    def text(self) -> str:
        return f"What does {self.name} do?"

    @property
    def answer(self) -> str:
        return f"It is in {self.module}. {self.description}"

    @property
    def is_held_out(self) -> bool:
        digest = hashlib.sha256(self.name.encode()).digest()
        number = int.from_bytes(digest[:4], "big")
        return number % HELD_OUT_EVERY == 0

    @property
    def conversation(self) -> dict[str, list[dict[str, str]]]:
        """The question and its answer as `evomesh tokenize --format messages` reads them."""
        messages = [
            {"role": "user", "content": self.text},
            {"role": "assistant", "content": self.answer},
        ]
        return {"messages": messages}


def named_module(answer: str) -> str | None:
    """Return the module that an answer names, None if the answer has not the form of those in the data."""
    found = ANSWER.match(answer)
    return found[1] if found else None


class AnswerShares(NamedTuple):
    """Shares of questions: whose answer names the right module, for which a guess is right, that name any module."""

    right: float
    guessed: float
    in_form: float


def answer_shares(
    questions: Sequence[Question], answers: Sequence[str], guess: str
) -> AnswerShares:
    """Return the shares of answers to questions, against one module as the answer to all of them."""
    right = 0
    guessed = 0
    in_form = 0
    for question, answer in zip(questions, answers, strict=True):
        module = named_module(answer)
        right += module == question.module
        guessed += question.module == guess
        in_form += module is not None
    total = len(questions)
    return AnswerShares(
        right / total,
        guessed / total,
        in_form / total,
    )


def read_questions() -> list[Question]:
    """Return a question for every documented public name that one module alone defines."""
    library = Path(sysconfig.get_paths()["stdlib"])
    questions_of: defaultdict[str, list[Question]] = defaultdict(list)
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        parts = relative.with_suffix("").parts
        if _is_left_out(parts):
            continue
        module = ".".join(parts)
        module = module.removesuffix(".__init__")
        text = path.read_text(encoding="utf-8", errors="replace")
        tree = ast.parse(text)
        for question in _questions(tree, module):
            questions_of[question.name].append(question)
    unique = []
    for same in questions_of.values():
        if len(same) == 1:
            unique += same
    return unique


def _is_left_out(parts: tuple[str, ...]) -> bool:
    """Return whether a module is private, a test, or not of the library (site-packages)."""
    for part in parts:
        is_private = part.startswith("_") and part != "__init__"
        if part in LEFT_OUT or is_private or not part.isidentifier():
            return True
    return False


def _questions(
    parent: ast.Module | ast.ClassDef, module: str, owner: str = ""
) -> Iterator[Question]:
    """Yield the questions about what a module or class defines, methods included."""
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{owner}{node.name}"
        description = _first_sentence(ast.get_docstring(node) or "")
        if MIN_LENGTH <= len(description) <= MAX_LENGTH:
            yield Question(name, module, description)
        if isinstance(node, ast.ClassDef):
            yield from _questions(node, module, f"{name}.")


def _first_sentence(docstring: str) -> str:
    """Return the first sentence of a docstring's first paragraph, in one line, with its full stop."""
    paragraph = docstring.strip().partition("\n\n")[0]
    sentence = " ".join(paragraph.split()).partition(". ")[0]
    return f"{sentence.rstrip('.')}." if sentence else ""
