"""The public API: what ``import evomesh`` offers, and that examples and pages need nothing deeper."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import evomesh

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "examples").rglob("*.md"),
]


def typing_imports() -> dict[str, str]:
    """Return what type checkers see in evomesh/__init__.py: name -> module that it is imported from."""
    module = ast.parse((ROOT / "evomesh/__init__.py").read_text())
    [block] = [node for node in module.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in imports for alias in node.names}


def modules_after(code: str) -> set[str]:
    """Return the modules that ``code`` imports in a fresh interpreter."""
    program = f"import sys; before = set(sys.modules); {code}; print(*set(sys.modules) - before)"
    command = [sys.executable, "-c", program]
    return set(
        subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    )


class TestNames:
    def test_type_checkers_see_the_names_of_all(self) -> None:
        assert sorted(typing_imports()) == sorted(evomesh.__all__)
        assert typing_imports() == evomesh._HOMES

    @pytest.mark.parametrize(("name", "home"), sorted(typing_imports().items()))
    def test_a_name_is_the_object_at_its_home(self, name: str, home: str) -> None:
        assert getattr(evomesh, name) is getattr(import_module(home), name)
        defined = ast.parse(Path(import_module(home).__file__ or "").read_text()).body
        assert name in {
            *(
                node.name
                for node in defined
                if isinstance(node, ast.ClassDef | ast.FunctionDef)
            ),
            *(
                ast.unparse(node.targets[0])
                for node in defined
                if isinstance(node, ast.Assign)
            ),
        }

    def test_no_name_is_that_of_a_subpackage(self) -> None:
        modules = {module.name for module in pkgutil.iter_modules(evomesh.__path__)}
        assert "train" in modules
        assert not modules & set(evomesh.__all__)

    def test_dir_lists_every_name(self) -> None:
        assert {"__version__", *evomesh.__all__} <= set(dir(evomesh))

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(
            AttributeError, match="module 'evomesh' has no attribute 'lode_config'"
        ):
            evomesh.lode_config  # type: ignore[attr-defined]


class TestImport:
    @pytest.mark.slow
    def test_import_loads_nothing_but_the_standard_library(self) -> None:
        loaded = modules_after("import evomesh")
        assert "evomesh" in loaded
        assert not {
            name
            for name in loaded
            if name.split(".")[0] not in {"evomesh", *sys.stdlib_module_names}
        }
        assert not {name for name in loaded if name.startswith("evomesh.")}

    @pytest.mark.slow
    def test_loading_a_config_does_without_torch(self) -> None:
        loaded = modules_after("from evomesh import ConfigError, load_config")
        assert "evomesh.config.loader" in loaded
        assert "torch" not in loaded


def deeper_uses(code: str) -> list[str]:
    """Return what a piece of Python uses of evomesh beyond its public names."""
    used = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            used += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            used += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.append(f"{node.value.id}.{node.attr}")
    return [
        name for name in used if name.startswith("evomesh.") and not is_public(name)
    ]


def is_public(dotted: str) -> bool:
    return dotted.removeprefix("evomesh.") in evomesh.__all__


def snippets(page: Path) -> Iterator[str]:
    """Yield the Python code blocks of a Markdown page."""
    for block in re.findall(
        r"^[ ]*```python\n(.*?)^[ ]*```", page.read_text(), re.DOTALL | re.MULTILINE
    ):
        yield textwrap.dedent(block)


class TestExamplesAndPages:
    @pytest.mark.parametrize(
        "path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.name
    )
    def test_examples_use_public_names_only(self, path: Path) -> None:
        assert not deeper_uses(path.read_text())

    @pytest.mark.parametrize(
        "page", PAGES, ids=lambda page: str(page.relative_to(ROOT))
    )
    def test_pages_use_public_names_only(self, page: Path) -> None:
        assert not [use for code in snippets(page) for use in deeper_uses(code)]
        mentioned = re.findall(r"\bevomesh\.[A-Za-z_][\w.]*\b", page.read_text())
        assert not [name for name in mentioned if not is_public(name)]

    def test_pages_show_the_public_names(self) -> None:
        code = "\n".join(code for page in PAGES for code in snippets(page))
        assert {
            "load_config",
            "run_training",
            "load_model",
            "generate_tokens",
            "register_loader",
        } <= set(re.findall(r"\w+", code))

    @pytest.mark.parametrize(
        ("code", "use"),
        [
            ("import evomesh.train", "evomesh.train"),
            ("from evomesh.layers.norm import Norm", "evomesh.layers.norm.Norm"),
            ("from evomesh import layers", "evomesh.layers"),
            ("import evomesh\nevomesh.models", "evomesh.models"),
            ("from evomesh import Norm\nimport evomesh\nevomesh.Norm", None),
        ],
    )
    def test_a_deeper_use_is_found(self, code: str, use: str | None) -> None:
        assert deeper_uses(code) == ([use] if use else [])
