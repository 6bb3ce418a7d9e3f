"""Mark Chinese pages as up to date with their English ones, or list those that are not.

    python tools/translations.py               # the pages whose English text has changed since
    python tools/translations.py install.md    # after its Chinese page was brought up to date

The last line of docs/X.zh.md names the digest of docs/X.md; tests/arch/test_pages.py compares them. Punctuation beside
Chinese text becomes full width, and links to pages lead to the Chinese ones: the site would find them itself, who reads
the files of a checkout would not.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.pages import DOCS, STAMP, Page, english_pages

HAN = "[\u4e00-\u9fff]"
FULL_WIDTH = {
    ",": "\uff0c",
    ":": "\uff1a",
    ";": "\uff1b",
    "!": "\uff01",
    "?": "\uff1f",
}
# A link to a page of docs/: its path without the ending.
PAGE_LINK = re.compile(r"\]\(([^):\s]+?)(?:\.zh)?\.md(?=[)#])")
CODE_OR_TARGET = re.compile(r"(`[^`]*`|\]\([^)]*\))")
# Parentheses with Chinese text in them, that are not the target of a link.
PARENTHESES = re.compile(rf"(?<!\])\((?=[^()]*{HAN})((?:[^()`]|`[^`]*`)*)\)")


def as_chinese_page(text: str, folder: Path = DOCS) -> str:
    """Return a page whose Chinese prose has full-width punctuation, with links to Chinese pages where these exist.

    Args:
        folder: of the page.
    """

    def to_chinese(found: re.Match[str]) -> str:
        name = f"{found[1]}.zh.md"
        return f"]({name}" if (folder / name).exists() else found[0]

    return _with_chinese_punctuation(PAGE_LINK.sub(to_chinese, text))


def _with_chinese_punctuation(text: str) -> str:
    lines = []
    is_code = False
    for line in text.split("\n"):
        if line.startswith("```"):
            is_code = not is_code
        is_prose = not (is_code or line.startswith(("```", "    ", "<!--")))
        converts = is_prose and re.search(HAN, line)
        lines.append(_convert_line(line) if converts else line)
    return "\n".join(lines)


def _convert_line(line: str) -> str:
    line = PARENTHESES.sub("\uff08\\1\uff09", line)
    pieces = CODE_OR_TARGET.split(line)
    for index in range(0, len(pieces), 2):
        before, after = _neighbors(pieces, index)
        pieces[index] = _convert_piece(pieces[index], before, after)
    return "".join(pieces)


def _neighbors(pieces: list[str], index: int) -> tuple[str, str]:
    """Return what stands around a piece of prose, as Han characters where it is code or a link."""
    return ("\u4e00" if index else "", "\u4e00" if index + 1 < len(pieces) else "")


def _convert_piece(piece: str, before: str, after: str) -> str:
    context = before + piece + after
    beside_han = re.compile(
        rf"(?<={HAN})([,:;!?]) ?|(?<=[\uff09*\u201d])([,:;!?]) ?|([,:;!?]) ?(?={HAN})"
        r"|(?<=[A-Za-z0-9])([,:;])(?=[A-Za-z])"
    )

    def widen(found: re.Match[str]) -> str:
        return FULL_WIDTH[next(mark for mark in found.groups() if mark)]

    converted = beside_han.sub(widen, context)
    return converted[len(before) : len(converted) - len(after)]


def mark(page: Page) -> None:
    """Write the digest of an English page into its Chinese one."""
    chinese = page.translation
    stamp = f"\n<!-- English page: {page.digest} -->\n"
    text = as_chinese_page(STAMP.sub("", chinese.text), chinese.path.parent)
    chinese.path.write_text(text + stamp, encoding="utf-8")


def main(names: list[str]) -> None:
    for name in names:
        mark(Page(DOCS / name))
    for page in english_pages():
        if page.translation.path.exists() and page.translation.stamp != page.digest:
            print(page.translation.name)


if __name__ == "__main__":
    main(sys.argv[1:])
