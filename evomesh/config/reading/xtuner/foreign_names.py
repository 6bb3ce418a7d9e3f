"""Inert stand-ins for names that an XTuner config imports from packages which are never imported here."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, NoReturn

READ_BASE = "read_base"
OWNERS = ("mmengine", "xtuner")  # a config that imports from one of them is XTuner's
PACKAGES = (
    *OWNERS,
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "mmcv",
    "peft",
    "torch",
    "transformers",
    "trl",
)
# Mmengine's runner takes these; dumped configs import nothing.
RUNNER_NAMES = {"train_dataloader", "optim_wrapper"}


class ForeignName:
    """A name of another package: it has a path and nothing else.

    Attributes:
        path: dotted, such as "torch.optim.AdamW"; attributes, items and calls extend it.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __getattr__(self, name: str) -> ForeignName:
        if name.startswith("__"):
            raise AttributeError(name)
        return ForeignName(f"{self.path}.{name}")

    def __getitem__(self, key: object) -> ForeignName:
        return ForeignName(f"{self.path}.{key}")

    def __call__(self, *args: object, **kwargs: object) -> ForeignName:
        return ForeignName(f"{self.path}(...)")

    def __deepcopy__(self, memo: object) -> ForeignName:
        return self

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"{self.path} is not run, so whether it is true is unknown; write the value instead"
        )

    def __repr__(self) -> str:
        return self.path


def last_name(value: Any) -> str:
    """Return the class or function that a ``type=`` names: a stand-in, a dotted string, or a class of the author's.

    ``AutoTokenizer.from_pretrained`` is "AutoTokenizer"; anything that is not a name is "".
    """
    if isinstance(value, ForeignName):
        path = value.path
    elif isinstance(value, str):
        path = value
    else:
        path = str(getattr(value, "__qualname__", ""))
    return path.removesuffix(".from_pretrained").rpartition(".")[2]


def is_xtuner_config(tree: ast.Module) -> bool:
    """Return whether a file imports from XTuner or mmengine, or assigns what mmengine's runner takes."""
    assigned: set[str] = set()
    for node in ast.walk(tree):
        modules = _modules_of_import(node)
        if any(_package(module) in OWNERS for module in modules):
            return True
        if isinstance(node, ast.Assign):
            names = map(ast.unparse, node.targets)
            assigned.update(names)
    return assigned >= RUNNER_NAMES


def _modules_of_import(node: ast.AST) -> list[str | None]:
    """Return the modules that a statement imports by their full names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module]
    return []


class ImportReplacer(ast.NodeTransformer):
    """Replace imports of foreign names by stand-ins, and imports of files beside the config by a call that reads them.

    Args:
        folders: where the modules of the config's author are.
        stand_in: name, in the config's namespace, of ``ForeignName``.
        read_names: name of the function (module, names) -> {name: value} that reads a file of the author's.
    """

    def __init__(self, folders: list[Path], stand_in: str, read_names: str) -> None:
        self.folders = folders
        self.stand_in = stand_in
        self.read_names = read_names

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        kept: list[ast.alias] = []
        assignments: list[ast.stmt] = []
        for alias in node.names:
            package = _package(alias.name)
            if package not in PACKAGES:
                kept.append(alias)
                continue
            # ``import torch.nn`` binds "torch", ``import torch.nn as nn`` binds the submodule.
            name, path = package, package
            if alias.asname:
                name, path = alias.asname, alias.name
            assignment = self._assign(name, path)
            assignments.append(assignment)
        out = assignments
        if kept:
            out = [ast.Import(kept), *assignments]
        return [ast.copy_location(statement, node) for statement in out]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.stmt]:
        out = self._replacements(node) or [ast.Pass()]  # a block must not be empty
        return [ast.copy_location(statement, node) for statement in out]

    def _replacements(self, node: ast.ImportFrom) -> list[ast.stmt]:
        """Return stand-ins, the reading of a file beside the config, or the import as it is."""
        module = node.module or ""
        package = _package(module)
        is_foreign = node.level == 0 and package in PACKAGES
        if is_foreign:
            return self._stand_ins(module, node.names)
        file = self._find_file(module, node.level)
        if file is None:
            return [node]
        statement = self._read_file(file, node.names)
        return [statement]

    def _stand_ins(self, module: str, names: list[ast.alias]) -> list[ast.stmt]:
        # ``from torch.optim import AdamW as A`` becomes
        # ``A = STAND_IN("torch.optim.AdamW")``.
        out = []
        for alias in names:
            if alias.name not in (READ_BASE, "*"):
                path = f"{module}.{alias.name}"
                new_name = alias.asname or alias.name
                assignment = self._assign(new_name, path)
                out.append(assignment)
        return out

    def _assign(self, name: str, path: str) -> ast.stmt:
        """Return ``NAME = STAND_IN(path)``."""
        value = _call(self.stand_in, ast.Constant(path))
        target = ast.Name(name, ast.Store())
        return ast.Assign([target], value)

    def _find_file(self, module: str, level: int) -> Path | None:
        """Return the file of a module beside the config (or, for relative imports, above it), None if there is none."""
        relative = (
            Path(*module.split(".")).with_suffix(".py")
            if module
            else Path("__init__.py")
        )
        folders = self.folders
        if level:
            beside = self.folders[0]
            folders = [beside if level == 1 else beside.parents[level - 2]]
        return next(
            (folder / relative for folder in folders if (folder / relative).is_file()),
            None,
        )

    def _read_file(self, file: Path, names: list[ast.alias]) -> ast.stmt:
        """Return ``globals().update(READ_NAMES(file, {name: new name}))``."""
        new_names = _dict_of_names(names)
        path = ast.Constant(str(file))
        values = _call(self.read_names, path, new_names)
        namespace = _call("globals")
        update = ast.Attribute(namespace, "update", ast.Load())
        return ast.Expr(ast.Call(update, [values], []))


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _call(name: str, *arguments: ast.expr) -> ast.expr:
    """Return the expression that calls a function with arguments."""
    function = ast.Name(name, ast.Load())
    return ast.Call(function, list(arguments), [])


def _dict_of_names(names: list[ast.alias]) -> ast.expr:
    """Return ``{name: new name}`` as an expression; a name that is not renamed keeps its own."""
    dictionary = ast.Dict([], [])
    for alias in names:
        new_name = alias.asname or alias.name
        key = ast.Constant(alias.name)
        value = ast.Constant(new_name)
        dictionary.keys.append(key)
        dictionary.values.append(value)
    return dictionary
