"""``evomesh explain``: what the code of an error means."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

CodesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CODE...",
        help="Codes that messages show, such as EVO-DATA-012 [default: list all].",
    ),
]


def explain(codes: CodesArgument = None) -> None:
    """Explain the code of an error: its cause, an example and what helps.

    The language is that of EVOMESH_LANG (en or zh), else of the locale.
    """
    from evomesh.error_codes.catalog import areas, look_up, pages_of
    from evomesh.error_codes.words import chosen_language, explained

    language = chosen_language(encoding=sys.stdout.encoding)
    if codes:
        pages = map(look_up, codes)
        texts = [explained(page, language) for page in pages]
        print("\n\n\n".join(texts))
        return
    for area in areas():
        for page in pages_of(area).values():
            print(f"{page.code}  {page.texts[language].title}")
