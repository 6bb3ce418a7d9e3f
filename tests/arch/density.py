"""Counts how dense the lines of a function are: tokens per line of code.

A token is what Python's tokenizer takes it for: a name, a number, a text, an operator or a
bracket. ``total = sum(sizes)`` has six. Comments, docstrings and empty lines count as
nothing, so that explaining a function does not change its figure. An f-string is the
tokens that the tokenizer makes of it.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class FunctionDensity:
    """A function, its lines with code, and the tokens on them."""

    name: str
    line: int
    code_lines: int
    tokens: int

    @property
    def tokens_per_line(self) -> float:
        return self.tokens / self.code_lines


def function_densities(
    source: str, nodes: Iterable[ast.AST]
) -> Iterator[FunctionDensity]:
    """Yield the figures of each function and method, nested ones on their own and in the outer one.

    Args:
        source: the text of a module.
        nodes: all nodes of its tree.
    """
    tokens_on_line = _tokens_by_line(source)
    for line in _docstring_lines(nodes):
        tokens_on_line.pop(line, None)
    for node in nodes:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        counts = [tokens_on_line[line] for line in lines if line in tokens_on_line]
        yield FunctionDensity(node.name, node.lineno, len(counts), sum(counts))


def _tokens_by_line(source: str) -> Counter[int]:
    """Count the tokens that begin on each line."""
    counts: Counter[int] = Counter()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            line, _ = token.start
            counts[line] += 1
    return counts


def _docstring_lines(nodes: Iterable[ast.AST]) -> Iterator[int]:
    """Yield the lines of every docstring, of the module and of what is defined in it."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in nodes:
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            yield from range(docstring.lineno, (docstring.end_lineno or 0) + 1)
