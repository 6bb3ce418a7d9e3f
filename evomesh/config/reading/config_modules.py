"""Imports of a config file: modules of its author, found from any current folder, and its ``read_base`` files.

A config names other files in three ways. ``from . import x`` is relative to its folder,
``from x import y`` is beside it, and InternEvo's ``from configs._base_.x import *``
starts at the folder above ``configs``. All of them are found from the config's own
place on disk, so the current folder does not matter. What is installed keeps its name:
a folder ``torch`` somewhere above a config does not hide torch.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

# Three levels of packages, so that relative imports may climb twice.
PACKAGE = "evomesh_config_file"
READ_BASE = "read_base"

# What runs a base file: its code, the module's namespace, its file.
ModuleRunner = Callable[[bytes, ModuleType, str], None]


def base_modules(tree: ast.Module, package: str) -> set[str]:
    """Return the absolute names of the modules that ``with read_base():`` imports.

    Args:
        package: what relative imports are relative to.
    """
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and _reads_bases(node):
            imported = _imported_modules(node.body, package)
            names.update(imported)
    return names


def _reads_bases(node: ast.With) -> bool:
    """Return whether a ``with`` statement has ``read_base()`` among its managers."""
    for item in node.items:
        manager = ast.unparse(item.context_expr)
        if manager == f"{READ_BASE}()":
            return True
    return False


def _imported_modules(body: Sequence[ast.stmt], package: str) -> set[str]:
    """Return the absolute names of the modules that ``from MODULE import ...`` in a block names."""
    names = set()
    for node in body:
        if not isinstance(node, ast.ImportFrom):
            continue
        dots = "." * node.level
        written = dots + (node.module or "")
        module = importlib.util.resolve_name(written, package)
        names.add(module)
        # `from ._base_ import runtime` names a package, and its module is the file.
        for alias in node.names:
            names.add(f"{module}.{alias.name}")
    return names


@contextmanager
def config_imports(
    file: Path, bases: set[str] | None = None, run_base: ModuleRunner | None = None
) -> Iterator[None]:
    """Let a config import modules of its author; afterwards the process is as it was before.

    The modules are forgotten, so that another file of the same name is read afresh.

    Args:
        file: the config.
        bases: names of its ``read_base`` modules; ``run_base`` may add to them.
        run_base: executes the source of one of them instead of the interpreter.
    """
    # The import system is global: what is changed here is put back below, even when the
    # config fails.
    modules_before = set(sys.modules)
    path_before = list(sys.path)
    bytecode_before = sys.dont_write_bytecode
    finder = _ModuleFinder(file, bases if bases is not None else set(), run_base)
    folder = file.parent
    _add_package(PACKAGE, folder.parent.parent)
    _add_package(f"{PACKAGE}.parent", folder.parent)
    _add_package(f"{PACKAGE}.parent.here", folder)
    sys.path[:0] = [str(folder), str(Path.cwd())]
    sys.meta_path.insert(0, finder)
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path_before
        sys.meta_path.remove(finder)
        sys.dont_write_bytecode = bytecode_before
        added = set(sys.modules) - modules_before
        # All are judged before one is deleted: a package without an __init__.py asks
        # its parent where it is.
        authors = [name for name in added if _is_authors(name, finder.folders)]
        for name in authors:
            del sys.modules[name]


class _ModuleFinder:
    """Finds a config's modules from the config's own folder upward, the nearest first.

    Attributes:
        folders: where modules of the author were found, or may be.
    """

    def __init__(
        self, file: Path, bases: set[str], run_base: ModuleRunner | None
    ) -> None:
        self.file = file
        self.bases = bases
        self.run_base = run_base
        self.folders = [file.parent, Path.cwd()]

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where a module is, as the import system asks; None leaves it to the usual finders."""
        del target
        if path is None:
            spec = self._find_top_level(name)
        else:
            spec = PathFinder.find_spec(name, path) if name in self.bases else None
        if spec is not None and name in self.bases and self.run_base is not None:
            _replace_loader(spec, self.run_base)
        return spec

    def _find_top_level(self, name: str) -> ModuleSpec | None:
        if _is_installed(name):
            return None
        for folder in self.file.parents:
            if (folder / name).is_dir() or (folder / f"{name}.py").is_file():
                self.folders.append(folder)
                return _spec_in(folder, name)
        return None


def _spec_in(folder: Path, name: str) -> ModuleSpec | None:
    spec = PathFinder.find_spec(name, [str(folder)])
    if spec is not None and spec.loader is None:
        # A folder without __init__.py would be merged with those of its name on
        # sys.path, such as the configs folder of another checkout.
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder / name)]
    return spec


def _is_installed(name: str) -> bool:
    """Return whether the interpreter has the module already: its own, this package, or one from site-packages."""
    own_package = __name__.partition(".")[0]
    if name in sys.stdlib_module_names or name in (own_package, PACKAGE):
        return True
    installed = [entry for entry in sys.path if "site-packages" in Path(entry).parts]
    return PathFinder.find_spec(name, installed) is not None


class _BaseLoader(SourceFileLoader):
    """Runs a ``read_base`` file as the config itself is run, never from cached bytecode."""

    def __init__(self, name: str, path: str, run: ModuleRunner) -> None:
        super().__init__(name, path)
        self.run = run

    def get_code(self, fullname: str) -> CodeType | None:
        del fullname
        return None

    def exec_module(self, module: ModuleType) -> None:
        file = str(module.__file__)
        self.run(self.get_data(file), module, file)


def _replace_loader(spec: ModuleSpec, run: ModuleRunner) -> None:
    if isinstance(spec.loader, SourceFileLoader) and spec.origin is not None:
        spec.loader = _BaseLoader(spec.name, spec.origin, run)


def _add_package(name: str, folder: Path) -> None:
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def _is_authors(name: str, folders: Sequence[Path]) -> bool:
    """Return whether a module is the author's: below one of ``folders``, neither installed there nor evomesh's."""
    package = name.partition(".")[0]
    own_package = __name__.partition(".")[0]
    if package == PACKAGE:
        return True
    if package == own_package:
        return False
    module = sys.modules[name]
    # A package without an __init__.py has no file, only the folders that it is spread
    # over.
    location = getattr(module, "__file__", None)
    if not location:
        search_path = getattr(module, "__path__", [])
        location = next(iter(search_path), None)
    if location is None:
        return False
    file = Path(location).resolve()
    is_installed = "site-packages" in file.parts
    is_below = any(file.is_relative_to(folder) for folder in folders)
    return is_below and not is_installed
