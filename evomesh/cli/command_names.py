"""Groups of commands that know what is meant by the name of a command that they do not have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.core import TyperGroup

# Words for the same deed. typer itself suggests a command whose letters are similar.
MEANINGS = (
    ("diff", "compare", "cmp"),
    ("prune", "delete", "remove", "rm", "clean"),
    ("ls", "list", "dir"),
    ("verify", "check", "validate", "test", "lint"),
    ("pin", "keep", "protect"),
    ("average", "merge", "avg", "mean", "soup"),
    ("reshard", "convert", "relayout", "repartition"),
    ("inspect", "info", "stats", "describe", "summary"),
    ("show", "view", "print", "cat", "dump", "get", "explain"),
    ("report", "html", "page"),
    ("repair", "fix", "rebuild"),
    ("cache", "mmap", "index"),
    ("to-hf", "export", "hf", "save", "to-huggingface", "convert2hf"),
    ("from-hf", "import", "load", "from-huggingface"),
    ("to-internevo", "export-internevo"),
    ("from-internevo", "import-internevo"),
    ("push", "upload", "publish"),
    ("copy", "cp", "new", "init"),
    ("translate", "convert", "import", "migrate"),
    ("train", "finetune", "fine-tune", "pretrain", "sft", "fit", "new"),
    ("tokenize", "preprocess", "prepare", "encode", "pack"),
    ("generate", "complete", "infer", "inference", "predict"),
    ("eval", "evaluate", "benchmark"),
    ("serve", "api", "server"),
    ("doctor", "diagnose", "env"),
    ("top", "monitor", "status"),
)


class CommandGroup(TyperGroup):
    """A group that names the command of a word with its meaning, or the group that has the command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or say which one is meant."""
        typed = args[0]
        if typed not in self.commands:
            found = self.meant(ctx, typed)
            if found:
                ctx.fail(f"No such command {typed!r}; here: {' or '.join(found)}")
        return super().resolve_command(ctx, args)

    def meant(self, ctx: Any, typed: str) -> list[str]:
        """Return the commands that an unknown word may mean: those of this group, else those of others."""
        names = _names_for(typed)
        found = _commands_in(self, ctx.command_path, names)
        if found:
            return found
        for path, group in _groups(ctx.find_root()):
            found += _commands_in(group, path, names)
        return found


def _commands_in(group: Any, path: str, names: list[str]) -> list[str]:
    """Return how those of the names that a group has are called; none of a command without a group."""
    commands = getattr(group, "commands", ())
    known = [name for name in names if name in commands]
    return [f"{path} {name}" for name in known]


def _groups(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield the outermost group and what is in it, with how each is called."""
    yield root.info_name, root.command
    for name, command in root.command.commands.items():
        yield f"{root.info_name} {name}", command


def _names_for(typed: str) -> list[str]:
    """Return a word as names of commands are written, and all that mean the same."""
    word = typed.lower().replace("_", "-")
    names = {word: None}
    for words in MEANINGS:
        if word in words:
            names |= dict.fromkeys(words)
    return list(names)
