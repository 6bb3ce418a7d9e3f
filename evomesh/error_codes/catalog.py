"""Read the pages of error codes, and find the code that somebody meant."""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from evomesh.errors import UserError

Language = Literal["en", "zh"]

PAGES = Path(__file__).parent / "pages"
_CODE = re.compile(r"\[?(?:EVO-)?([A-Z]+)-?0*(\d{1,3})\]?")
_NUM_NEAR = 3


@dataclass(frozen=True)
class ErrorText:
    """The prose of a page in one language.

    Attributes:
        title: what went wrong, as a headline.
        cause: why that happens.
        fix: what helps.
    """

    title: str
    cause: str
    fix: str


@dataclass(frozen=True)
class ErrorPage:
    """The meaning of one code.

    Attributes:
        example: a command, if a short one shows it, and the first lines that it prints.
    """

    code: str
    example: str
    texts: dict[Language, ErrorText]


def areas() -> list[str]:
    """Return the areas, in which codes are numbered: ``DATA`` of ``EVO-DATA-012``."""
    return sorted(path.stem.upper() for path in PAGES.glob("*.toml"))


def pages_of(area: str) -> dict[str, ErrorPage]:
    """Return the pages of one area by code; {} for an unknown area."""
    path = PAGES / f"{area.lower()}.toml"
    if not path.is_file():
        return {}
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return {code: _page(code, table) for code, table in tables.items()}


def _page(code: str, table: dict[str, Any]) -> ErrorPage:
    languages: tuple[Language, ...] = get_args(Language)
    texts = {language: ErrorText(**table[language]) for language in languages}
    return ErrorPage(code, table["example"], texts)


def find_page(code: str) -> ErrorPage | None:
    """Return the page of a code, written exactly; None for an unknown one."""
    area = code.removeprefix("EVO-").rpartition("-")[0]
    return pages_of(area).get(code)


def look_up(text: str) -> ErrorPage:
    """Return the page of a code as somebody types it: ``EVO-DATA-012``, ``data-12`` or ``[EVO-DATA-012]``.

    Raises:
        UserError: there is none; with those that look like it.
    """
    written = _CODE.fullmatch(text.strip().upper())
    code = text
    if written:
        code = f"EVO-{written[1]}-{int(written[2]):03}"
    page = find_page(code)
    if page is not None:
        return page
    known = [code for area in areas() for code in pages_of(area)]
    near = difflib.get_close_matches(code.upper(), known, n=_NUM_NEAR, cutoff=0.5)
    fix = "see all codes: evomesh explain"
    if near:
        fix = f"did you mean {' or '.join(near)}? All codes: evomesh explain"
    raise UserError(f"no code {text!r}", fix=fix, code="EVO-CLI-010")
