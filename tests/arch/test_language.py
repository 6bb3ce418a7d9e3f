"""The project's prose is plain American English in the field's words: no phrase of the list below comes back.

Every row is (pattern, what to write instead, an example that the pattern must find). The glossary of the words to
use is in docs/architecture.md.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.arch.sources import FILES, ROOT, name_of, nodes, text

FOLDERS = ("evomesh", "tools", "benchmarks", "configs", "examples", "docs", "tests")
TOP_LEVEL = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "AGENTS.md",
    "Makefile",
    "pyproject.toml",
)


class Phrase(NamedTuple):
    pattern: str
    replacement: str
    example: str


PHRASES = [
    Phrase(
        r"\b(?:go|goes|going|went) on\b",
        "continue (keeps running), resume (from a checkpoint)",
        "training goes on",
    ),
    Phrase(
        r"\bthe documents' ",
        "InternEvo's; a document is a text",
        "by the documents' rules",
    ),
    Phrase(
        r"\bbehind (?:it|them|each|every"
        r"|the (?:training|step|save|run|last|end|optimizer|text|file|line|newest|prompt))\b",
        "after (time), in the background (a thread), beside or after (position)",
        "writes behind the training",
    ),
    Phrase(r"\b(?:lies|lay|lain)\b", "is, is stored, is in", "the file lies beside it"),
    Phrase(
        r"\bof (?:one's|your|their|our|its) own\b",
        "custom, separate, dedicated",
        "a model of one's own",
    ),
    Phrase(
        r"\b(?:come|comes|came|coming) along\b",
        "shipped with evomesh",
        "configs that come along",
    ),
    Phrase(
        r"\bnow and then\b",
        "occasionally, from time to time",
        "a finite gradient now and then",
    ),
    Phrase(r"\bfor ever\b", "forever, indefinitely", "kept for ever"),
    Phrase(
        r"\b(?:is|are|was|were|be) (?:said|told)\b",
        "is logged, is reported",
        "which is said once",
    ),
    Phrase(r"\bmend(?:s|ed|ing)?\b", "fix, repair", "how to mend it"),
    Phrase(r"\bbrothers?\b", "peer, replica", "its data-parallel brother"),
    Phrase(
        r"\b(?:broken|breaks?|breaking|broke) off\b",
        "interrupted, stopped",
        "a step broken off",
    ),
    Phrase(r"\bcut off\b", "truncated", "a file that is cut off"),
    Phrase(
        r"\b(?:this|that|which|it|what) is no (?!longer|more\b|less\b|such)",
        "is not a",
        "what is no number",
    ),
    Phrase(
        r"\b(?:chunk|core|document|file|line|pack|problem|rank|row|step|token)\(s\)",
        "counted() of evomesh.quantities",
        "in 2 file(s)",
    ),
    Phrase(r"\bat hand\b", "available", "the fastest kernel at hand"),
    Phrase(
        r"\bg(?:ive|ives|iven|ave) back\b", "return, release", "gives back the table"
    ),
    Phrase(r"\bunder way\b", "pending, in progress", "a collective under way"),
    Phrase(r"\bfor good\b", "permanently", "full for good"),
    Phrase(r"\blikeliest\b", "most likely, most probable", "the likeliest token"),
    Phrase(
        r"\bwho (?:stumbles|knows|wants to)\b", "name the subject", "who wants to stop"
    ),
    Phrase(r"\bsays so\b", "reports it", "passes a place and says so"),
    Phrase(
        r"\b\w*(?:normalis|initialis|tokenis|serialis|optimis|synchronis|recognis|organis|quantis|vectoris)(?:e|ed|es|er|ing|ation)\w*\b"
        r"|\b(?:behaviour|colour|neighbour|favour|honour|centre|licence|artefact|judgement)\w*\b"
        r"|\b(?:cancelled|cancelling|labelled|labelling|modelled|modelling)\b",
        "American spelling",
        "tokenised data",
    ),
]
DOCSTRING_STARTS = Phrase(
    r"^(?:What|Which|Whether|Where|How|Of|Attributes:|Args:|Raises:|Returns:)(?: |$)",
    'a verb ("Return ..."), or for a module or class what it is',
    "What each micro-batch is multiplied with",
)
WHOLE_FILES = {"tests/arch/test_language.py"}  # the list itself


@functools.cache  # every phrase reads every file
def prose(path: Path) -> list[tuple[int, str]]:
    """Return (line number, text) of comments and of strings with a space in them; of every line outside Python."""
    content = text(path)
    if path.suffix != ".py":
        return list(enumerate(content.splitlines(), 1))
    lines: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT or (
            token.type == tokenize.STRING and " " in token.string
        ):
            lines += enumerate(token.string.splitlines(), token.start[0])
    return lines


def matches(phrase: Phrase, path: Path) -> list[str]:
    # Most files have the phrase nowhere, not even in code: those need no look at their tokens.
    if not re.search(phrase.pattern, text(path), re.IGNORECASE):
        return []
    found = []
    for number, line in prose(path):
        match = re.search(phrase.pattern, line, re.IGNORECASE)
        if match:
            found.append(
                f"{path.relative_to(ROOT)}:{number}: {match[0]!r}; write: {phrase.replacement}"
            )
    return found


@functools.cache
def files() -> list[Path]:
    """All files with prose: Python, Markdown and the build files."""
    inside = [
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".md"}
    ]
    listed = [
        *inside,
        *(ROOT / name for name in TOP_LEVEL if (ROOT / name).exists()),
        *ROOT.glob("*.py"),
    ]
    return sorted(
        path for path in listed if path.relative_to(ROOT).as_posix() not in WHOLE_FILES
    )


@pytest.mark.parametrize("phrase", PHRASES, ids=lambda phrase: phrase.example)
def test_no_dialect(phrase: Phrase) -> None:
    assert re.search(phrase.pattern, phrase.example, re.IGNORECASE)
    found = [row for path in files() for row in matches(phrase, path)]
    assert not found, "\n".join(found)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, first line) of every docstring of a module."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in nodes(path):
        if isinstance(node, kinds):
            docstring = ast.get_docstring(node)
            if docstring:
                yield getattr(node, "lineno", 1), docstring.splitlines()[0]


def docstring_fragments(path: Path) -> list[str]:
    name = name_of(path)
    return [
        f"{name}:{number}: {line}; begin with {DOCSTRING_STARTS.replacement}"
        for number, line in docstrings(path)
        if re.search(DOCSTRING_STARTS.pattern, line)
    ]


def test_docstrings_begin_with_a_sentence() -> None:
    assert re.search(DOCSTRING_STARTS.pattern, DOCSTRING_STARTS.example)
    found = [row for path in FILES for row in docstring_fragments(path)]
    assert not found, "\n".join(found)
