"""What the tree looks like: imports, globals, sizes, names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest
from radon.complexity import cc_visit_ast
from radon.visitors import Class

from tests.arch.sources import FILES, ROOT, name_of, nodes, text, tree

MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60
MAX_COMPLEXITY = 12  # counted by radon: boolean operators, conditional expressions and comprehensions too

Nodes = Sequence[ast.AST]
# A check gets a module and all nodes in it, an outer one before what is in it.
Check = Callable[[ast.Module, Nodes], Iterable[str]]


def test_import_contracts() -> None:
    """Layers of the package, no cycle, config without torch, torch.distributed in parallel only: pyproject.toml."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_config_loads_without_torch() -> None:
    code = "import sys, evomesh.config.schema; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode
        == 0
    )


def mutable_globals(module: ast.Module, inside: Nodes) -> Iterator[str]:
    """Lower-case module variables that hold a container or a call's result, and every ``global`` statement."""
    for node in inside:
        if isinstance(node, ast.Global):
            yield f"line {node.lineno}: global {', '.join(node.names)}"
    for node in module.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        for name in names:
            constant = name.strip("_").isupper() or name.startswith("__")
            if not constant and isinstance(
                node.value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp
            ):
                yield f"line {node.lineno}: {name}"


def findings(check: Check) -> list[str]:
    """Return what a check finds in any file of the package, each with the file's name."""
    return [
        f"{name_of(path)}: {found}"
        for path in FILES
        for found in check(tree(path), nodes(path))
    ]


def found_in(source: str, check: Check) -> list[str]:
    """Return what a check finds in a program."""
    module = ast.parse(source)
    return list(check(module, tuple(ast.walk(module))))


def test_no_mutable_module_globals() -> None:
    assert not findings(mutable_globals)


def test_file_sizes() -> None:
    lines = {name_of(path): len(text(path).splitlines()) for path in FILES}
    assert not {name: count for name, count in lines.items() if count > MAX_FILE_LINES}


def long_functions(module: ast.Module, inside: Nodes) -> Iterator[str]:
    for node in inside:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.name} has {length} lines"


def test_function_sizes() -> None:
    assert not findings(long_functions)


def too_complex(module: ast.Module, inside: Nodes) -> list[str]:
    """Functions and methods above ``MAX_COMPLEXITY``, each with its own figure."""
    blocks = cc_visit_ast(module)
    functions = [block for block in blocks if not isinstance(block, Class)]
    return [
        f"{block.name}: {block.complexity}"
        for block in functions
        if block.complexity > MAX_COMPLEXITY
    ]


def test_complexity() -> None:
    assert not findings(too_complex)


def test_complexity_counts_what_compression_hides() -> None:
    comparisons = [f"x == {number}" for number in range(MAX_COMPLEXITY + 1)]
    just_right, one_too_many = " or ".join(comparisons[:-1]), " or ".join(comparisons)
    method = f"class C:\n    def f(self, x):\n        return 1 if {just_right} else 0\n"
    assert not found_in(f"def f(x):\n    return {just_right}\n", too_complex)
    assert found_in(f"def f(x):\n    return {one_too_many}\n", too_complex) == [
        f"f: {MAX_COMPLEXITY + 1}"
    ]
    assert found_in(method, too_complex)


def test_no_two_classes_share_a_name() -> None:
    homes = defaultdict(list)
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(name_of(path))
    assert not {name: paths for name, paths in homes.items() if len(paths) > 1}


# What packages other than parallel may import of torch.distributed: torch's pipeline schedules, which send hidden
# states themselves, and FSDP's types. No collective and no process group is among them.
NOT_COLLECTIVES = (
    "torch.distributed.pipelining",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.run",  # torchrun, which starts processes
    "torch.distributed.elastic",
)


def distributed_imports(module: ast.Module, inside: Nodes) -> Iterator[str]:
    """Yield imports of torch.distributed that are neither for types only nor of ``NOT_COLLECTIVES``."""
    typing_only: set[ast.AST] = set()
    for node in inside:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing_only.update(ast.walk(node))
        if isinstance(node, ast.ImportFrom) and node not in typing_only:
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        else:
            continue
        for name in imported:
            is_distributed = name.startswith("torch.distributed")
            if is_distributed and not name.startswith(NOT_COLLECTIVES):
                yield f"line {node.lineno}: {name}"


def test_collectives_live_in_parallel() -> None:
    found = findings(distributed_imports)
    assert not [row for row in found if not row.startswith("evomesh/parallel/")]
    # parallel itself imports them, so the check finds such an import.
    assert found


# At the top of a file these take seconds, in every worker and for one test alone.
# `import transformers` is quick: its attributes import what is large.
SLOW_IMPORT = re.compile(
    r"^(?:from (?:transformers|gradio|evomesh\.serve\.page)\b|import gradio\b).*",
    re.MULTILINE,
)


def test_collecting_the_unit_tests_imports_nothing_slow() -> None:
    assert SLOW_IMPORT.search("import os\nfrom transformers import AutoTokenizer\n")
    files = [*(ROOT / "tests/unit").rglob("*.py"), *(ROOT / "tests").glob("*.py")]
    found = {name_of(path): SLOW_IMPORT.findall(path.read_text()) for path in files}
    assert len(found) > 100
    assert not {name: lines for name, lines in found.items() if lines}


def test_names() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [
        name_of(path) for path in FILES if path.stem in vague or set(path.parts) & vague
    ]


def test_the_checks_can_fail() -> None:
    dictionary_and_global = "cache = {}\ndef f():\n    global cache\n"
    assert found_in(dictionary_and_global, mutable_globals) == [
        "line 3: global cache",
        "line 1: cache",
    ]
    constants = "MODES = {}\n__all__ = ['x']\nlogger = f()\n"
    assert not found_in(constants, mutable_globals)
    body = "    x = 1\n"
    assert not found_in("def f():\n" + body * 59, long_functions)
    assert found_in("def f():\n" + body * 60, long_functions)


def test_tests_of_a_group_run_in_one_worker(request: pytest.FixtureRequest) -> None:
    """Under pytest 9.2, pytest-xdist 3.8 spreads them over all workers and says nothing."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("not in a worker of pytest-xdist --dist loadgroup")
    assert request.node.nodeid.endswith("@arch")


def test_no_folder_of_tests_is_skipped(pytestconfig: pytest.Config) -> None:
    """pytest walks past folders by name, "dist" among them unless told otherwise, and says nothing."""
    folders = {
        parent
        for path in (ROOT / "tests").rglob("test_*.py")
        for parent in path.relative_to(ROOT).parents
    }
    skipped = pytestconfig.getini("norecursedirs")
    assert not [
        str(folder)
        for folder in folders
        if any(fnmatch(folder.name, pattern) for pattern in skipped)
    ]
