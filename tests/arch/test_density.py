"""A stranger can read each function: no line after line that does several things at once."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from tests.arch.density import FunctionDensity, function_densities
from tests.arch.sources import FILES, name_of, nodes, text

# Below, one dense line or a long signature decides.
MIN_CODE_LINES = 8
MAX_TOKENS_PER_LINE = 9.0
ADVICE = (
    "unfold it: give intermediate values names that say what they are, make a loop or a named function of a "
    "comprehension with two ideas, a statement of a conditional expression inside a call, separate assignments "
    "of `a, b = x, y`, and give each argument of a long signature its own line"
)


def too_dense(
    functions: Iterable[FunctionDensity], limit: float = MAX_TOKENS_PER_LINE
) -> list[str]:
    """Return the functions with more tokens per line of code than ``limit``."""
    found = []
    for function in functions:
        is_long = function.code_lines >= MIN_CODE_LINES
        density = function.tokens_per_line
        if is_long and density > limit:
            found.append(
                f"line {function.line}, {function.name}: {density:.1f} tokens per line of code"
            )
    return found


def test_no_function_is_too_dense() -> None:
    found = []
    for path in FILES:
        functions = function_densities(text(path), nodes(path))
        found += [f"{name_of(path)}: {row}" for row in too_dense(functions)]
    assert not found, f"above {MAX_TOKENS_PER_LINE}: {'; '.join(found)}. {ADVICE}"


def densities_of(source: str) -> list[FunctionDensity]:
    return list(function_densities(source, list(ast.walk(ast.parse(source)))))


# 13 tokens, and 14.
SIGNATURE = "def f(a, b, *c, d):\n"
LINE = "    a = a + b + (c[0] + d)\n"


def test_counts_tokens_of_lines_with_code() -> None:
    source = f'{SIGNATURE}    """Add.\n\n    Text.\n    """\n\n    # A comment.\n{LINE}'
    (function,) = densities_of(source)
    assert (function.name, function.line, function.code_lines) == ("f", 1, 2)
    assert function.tokens == 13 + 14


def test_methods_and_nested_functions_count() -> None:
    source = "class C:\n    def f(self):\n        def g():\n            return 1\n        return g\n"
    figures = {item.name: item.code_lines for item in densities_of(source)}
    assert figures == {"f": 4, "g": 2}


def test_dense_functions_are_found() -> None:
    dense = SIGNATURE + 7 * LINE
    found = too_dense(densities_of(dense), limit=13.5)
    assert found == ["line 1, f: 13.9 tokens per line of code"]
    assert not too_dense(densities_of(dense), limit=14)
    # One line less is too short for a verdict, and names make it readable.
    assert not too_dense(densities_of(SIGNATURE + 6 * LINE), limit=13.5)
    assert not too_dense(densities_of(dense + 7 * "    b = a\n"), limit=13.5)
