"""The one exception type that a user is meant to read.

It is below every other package, so that each of them can refuse bad input in the same
form.
"""

from __future__ import annotations

from unicodedata import category

# Unicode categories that act on a terminal or cannot be encoded: controls, marks of
# direction, surrogates, line ends.
ACTING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

EXIT_BUG = 1  # a traceback
EXIT_USER_ERROR = 2
EXIT_TRAINING_STOPPED = (
    6  # numbers went wrong: too many skipped steps in a row, or a spike
)
EXIT_RESTART = 75  # EX_TEMPFAIL: state is saved, start the same command again
EXIT_INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT
EXIT_READER_LEFT = 141  # the reader of the output closed the pipe: 128 + SIGPIPE


def printable(text: str, keep: str = "\n\t") -> str:
    r"""Return text that is safe to print: what a terminal would act on becomes an escape such as ``\x1b``.

    File names, records and answers of a server are written by others. Escape codes in
    them could clear a screen, fake a line of the log or turn the direction of the text;
    a lone surrogate cannot be encoded at all.

    Args:
        keep: control characters that stay; "" for a name, which has no line breaks.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char in keep or category(char) not in ACTING else _escaped(char)
        for char in text
    )


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


class UserError(Exception):
    """Input that cannot be used: what was found, where, what was expected and how to fix it.

    The command line prints ``str(error)`` without a traceback and exits with
    ``exit_code``.

    Args:
        found: what is wrong, in one sentence, with the offending value.
        where: file, key or line it was found at ("" when the sentence already contains it).
        expected: what would have been right.
        fix: the command or edit that repairs it.
        code: of its kind, such as EVO-DATA-012; what it means is in ``evomesh.error_codes``. "" for errors of custom
            code.
        exit_code: process exit code, 2 for a user's mistake.

    Attributes:
        printed_elsewhere: another rank of the job prints the same message, so this one stays silent.
        is_known_to_peers: the other ranks of the job have heard of it.
    """

    printed_elsewhere = False
    is_known_to_peers = False

    def __init__(
        self,
        found: str,
        *,
        where: str = "",
        expected: str = "",
        fix: str = "",
        code: str = "",
        exit_code: int = EXIT_USER_ERROR,
    ) -> None:
        self.found, self.where = printable(found), printable(where)
        self.expected, self.fix = printable(expected), printable(fix)
        self.code = code
        self.exit_code = exit_code
        super().__init__(self.render())

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of all that it reports, each once."""
        return (self.code,) if self.code else ()

    def render(self) -> str:
        lines = [f"{self.where}: {self.found}" if self.where else self.found]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class ConfigError(UserError):
    """One or more problems of one config, reported together.

    Args:
        problems: each a ``UserError`` with its own place and fix; at least one.
        path: the config file they belong to.
    """

    def __init__(self, problems: list[UserError], path: str = "") -> None:
        self.problems = problems
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        super().__init__(
            "\n".join([f"{count} in the config"] + [p.render() for p in problems]),
            where=path,
        )

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of its problems, each once, in their order."""
        codes = (problem.code for problem in self.problems)
        return tuple(dict.fromkeys(code for code in codes if code))
