"""Mark Chinese pages as up to date with their English ones, or list those that are not.

    python tools/translations.py               # the pages whose English text has changed since
    python tools/translations.py install.md    # after its Chinese page was brought up to date

The first line of docs/X.zh.md names the digest of docs/X.md; tests/arch/test_pages.py compares them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.pages import DOCS, STAMP, Page, english_pages


def mark(page: Page) -> None:
    """Write the digest of an English page into its Chinese one."""
    chinese = page.translation
    stamp = f"<!-- English page: {page.digest} -->\n"
    chinese.path.write_text(stamp + STAMP.sub("", chinese.text), encoding="utf-8")


def main(names: list[str]) -> None:
    for name in names:
        mark(Page(DOCS / name))
    for page in english_pages():
        if page.translation.path.exists() and page.translation.stamp != page.digest:
            print(page.translation.name)


if __name__ == "__main__":
    main(sys.argv[1:])
