"""The words around an error: in which language, and how a message and a page are laid out."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence

from evomesh.error_codes.catalog import ErrorPage, Language, find_page
from evomesh.errors import UserError

# The first one that is set decides, as for other programs.
VARIABLES = ("EVOMESH_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
WIDTH = 88

_ERROR = "\u9519\u8bef"  # "error" in Chinese
_FIX = "\u5904\u7406"  # "what to do" in Chinese
_HEADINGS: dict[Language, tuple[str, str, str]] = {
    "en": ("Cause", "Example", "Fix"),
    "zh": ("\u539f\u56e0", "\u793a\u4f8b", _FIX),
}


def chosen_language(
    env: Mapping[str, str] = os.environ, encoding: str | None = "utf-8"
) -> Language:
    """Return the language of the user: EVOMESH_LANG, else that of the locale.

    Args:
        encoding: of the stream that is written to; English where it lacks Chinese characters.
    """
    chosen = next((env[name] for name in VARIABLES if env.get(name)), "")
    if not chosen.lower().startswith("zh"):
        return "en"
    try:
        _ERROR.encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return "en"
    return "zh"


def printed(error: UserError, language: Language) -> str:
    """Return what a command prints for an error: in Chinese, a headline and a fix for each code come first.

    The English message with its numbers and names is always there: it is what people
    search for, and what a report of the error needs.
    """
    lines = headlines(error.codes, language)
    lines.append(f"error: {error}")
    if error.codes:
        lines.append(explain_line(error.codes))
    return "\n".join(lines)


def explain_line(codes: Sequence[str]) -> str:
    """Return the last line of a message: the command that explains its codes."""
    return f"  explain: evomesh explain {' '.join(codes)}"


def headlines(codes: Sequence[str], language: Language) -> list[str]:
    """Return the lines before a message: in Chinese what each code means and what helps, in English none."""
    lines: list[str] = []
    if language == "en":
        return lines
    for code in codes:
        page = find_page(code)
        if page is None:
            continue
        text = page.texts["zh"]
        lines.append(f"{_ERROR}\uff1a{text.title}")
        lines.append(f"  {_FIX}\uff1a{text.fix}")
    return lines


def explained(page: ErrorPage, language: Language) -> str:
    """Return the page of a code for a terminal."""
    text = page.texts[language]
    cause, example, fix = _HEADINGS[language]
    parts = [
        f"{page.code}  {text.title}",
        f"{cause}\n{_indented(text.cause)}",
        f"{example}\n{textwrap.indent(page.example, '  ')}",
        f"{fix}\n{_indented(text.fix)}",
    ]
    return "\n\n".join(parts)


def _indented(text: str) -> str:
    # Chinese has no spaces to break at, and terminals break it well.
    lines = textwrap.wrap(text, WIDTH - 2) if text.isascii() else [text]
    return textwrap.indent("\n".join(lines), "  ")
