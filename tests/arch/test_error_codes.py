"""Codes of errors: each message has one, each code has a page, and what a page shows is what the code prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from evomesh.error_codes.catalog import areas, pages_of
from tests.arch.sources import FILES, name_of, nodes

CODE = re.compile(r"EVO-[A-Z]+-\d{3}")
# What makes a message apart from the classes of errors: `draft.problem(...)` and so on.
MAKERS = {"ConfigFinding", "_source_error"}
METHODS = {"problem"}
# Its codes are those of the problems that it reports.
WITHOUT_CODE = {"ConfigError"}
PAGES = {code: page for area in areas() for code, page in pages_of(area).items()}


def error_classes() -> set[str]:
    """Return the names of UserError and of the classes below it."""
    known = {"UserError"}
    classes = [
        node for path in FILES for node in nodes(path) if isinstance(node, ast.ClassDef)
    ]
    for _ in range(3):  # the depth of the classes
        for node in classes:
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            if bases & known:
                known.add(node.name)
    return known


def has_own_message(path: Path, name: str) -> bool:
    """Return whether a class makes its message, and so its code, itself."""
    return any(
        isinstance(node, ast.ClassDef)
        and node.name == name
        and any(isinstance(item, ast.FunctionDef) for item in node.body)
        for node in nodes(path)
    )


def messages() -> Iterator[tuple[Path, ast.Call]]:
    """Yield each call that makes a message."""
    classes = error_classes()
    own = {name for path in FILES for name in classes if has_own_message(path, name)}
    makers = (classes - own - WITHOUT_CODE) | {"UserError"} | MAKERS
    for path in FILES:
        inits = set(_inits(path, own - {"UserError"} - WITHOUT_CODE))
        for node in nodes(path):
            if isinstance(node, ast.Call) and (_makes(node, makers) or node in inits):
                yield path, node


def _makes(node: ast.Call, makers: set[str]) -> bool:
    if isinstance(node.func, ast.Name):
        return node.func.id in makers
    return isinstance(node.func, ast.Attribute) and node.func.attr in METHODS


def _inits(path: Path, classes: set[str]) -> Iterator[ast.Call]:
    """Yield the calls of ``super().__init__`` in these classes."""
    for node in nodes(path):
        if isinstance(node, ast.ClassDef) and node.name in classes:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Call) and ast.unparse(inner.func) == (
                    "super().__init__"
                ):
                    yield inner


def code_of(call: ast.Call) -> ast.expr | None:
    return next((item.value for item in call.keywords if item.arg == "code"), None)


def is_code(value: ast.expr | None) -> bool:
    """Return whether a value is a code, or that of another message."""
    if isinstance(value, ast.Constant):
        return CODE.fullmatch(str(value.value)) is not None
    return value is not None and ast.unparse(value) in {
        "code", "self.code", "error.code", "finding.code", "code_for(error.errno)",
    }  # fmt: skip


def test_every_message_has_a_code() -> None:
    calls = list(messages())
    assert len(calls) > 750
    without = [
        f"{name_of(path)}:{call.lineno}"
        for path, call in calls
        if not is_code(code_of(call))
    ]
    advice = "\nadd code=... of evomesh/error_codes/pages: evomesh explain lists all"
    assert not without, "\n".join(without) + advice


def test_every_code_has_a_page_and_every_page_a_code() -> None:
    used = {
        node.value
        for path in FILES
        for node in nodes(path)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and CODE.fullmatch(node.value)
    }
    assert used == PAGES.keys()


def test_codes_are_those_of_their_area_in_order() -> None:
    for area in areas():
        codes = list(pages_of(area))
        assert codes == sorted(codes)
        assert all(code.startswith(f"EVO-{area}-") for code in codes)
        assert all(CODE.fullmatch(code) for code in codes)


@pytest.mark.parametrize("code", PAGES)
def test_both_languages_say_something(code: str) -> None:
    texts = PAGES[code].texts
    for part in ("title", "cause", "fix"):
        english, chinese = getattr(texts["en"], part), getattr(texts["zh"], part)
        assert english.isascii() and len(english) > 10
        assert re.search("[\u4e00-\u9fff]", chinese)
        # ASCII punctuation beside a Chinese character
        assert not re.search("[\u4e00-\u9fff][,:;!?]|[,:;!?] ?[\u4e00-\u9fff]", chinese)
    assert not texts["en"].title.endswith(".")


def template(call: ast.Call) -> str | None:
    """Return the first line of a call's message as a pattern; None where it is a variable."""
    position = int(isinstance(call.func, ast.Attribute) and call.func.attr == "problem")
    position += isinstance(call.func, ast.Name) and call.func.id == "ConfigFinding"
    found = call.args[position] if len(call.args) > position else None
    if isinstance(found, ast.Constant):
        return re.escape(str(found.value))
    if not isinstance(found, ast.JoinedStr):
        return None
    text = "".join(
        str(part.value) if isinstance(part, ast.Constant) else "\0"
        for part in found.values
    )
    return re.escape(text.partition("\n")[0]).replace("\0", ".*")


def test_examples_are_messages_of_their_code() -> None:
    """The first line of each message is one that a place with this code makes."""
    patterns: dict[str, list[str | None]] = {}
    for _, call in messages():
        code = code_of(call)
        if isinstance(code, ast.Constant):
            patterns.setdefault(str(code.value), []).append(template(call))
    wrong = []
    for code, page in PAGES.items():
        known = patterns.get(code)
        if known is None or None in known:  # its words are made elsewhere
            continue
        lines = [
            line.split(": ", 1)[-1]
            for line in page.example.splitlines()
            if not line.startswith(("$", "  "))
        ]
        expected = [re.compile(f"(.*: )?{one}", re.S) for one in known if one]
        if not any(one.match(line) for one in expected for line in lines):
            wrong.append(f"{code}: {lines}")
    assert not wrong, "\n".join(wrong)
