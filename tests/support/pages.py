"""The pages of docs/ as tests read them: blocks of code, headings, links and tables."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)
HEADING = re.compile(r"^(#+) ", re.M)
LINK = re.compile(r"\]\(([^)\s]+)\)")
TITLE = re.compile(r'title="([^"]+)"')
# Titles of blocks whose commands no test can type.
NEEDS = {
    "needs GPUs",
    "needs a cluster",
    "needs internet",
    "needs Docker",
    "needs your files",
    "runs until Ctrl-C",
    "starts ranks",
    "takes minutes",
}
# The last line of a translation: the English page that it was last compared with.
STAMP = re.compile(r"\n<!-- English page: ([0-9a-f]{12}) -->\n\Z")


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block.

    Attributes:
        info: what follows the opening fence: a language, `title="FILE"`, a title of ``NEEDS``, `exit-2`.
    """

    info: str
    text: str

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def _title(self) -> str | None:
        found = TITLE.search(self.info)
        return found[1] if found else None

    @property
    def file(self) -> str | None:
        """The file that the block is the content of."""
        return None if self.need else self._title

    @property
    def need(self) -> str | None:
        """Why no test types the block's commands; its title says it to the reader."""
        return self._title if self._title in NEEDS else None


@dataclass(frozen=True)
class Page:
    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def name(self) -> str:
        return self.path.relative_to(DOCS).as_posix()

    @property
    def blocks(self) -> list[CodeBlock]:
        return [
            CodeBlock(found["info"], found["text"])
            for found in BLOCK.finditer(self.text)
        ]

    @property
    def prose(self) -> str:
        """The page without its blocks."""
        return BLOCK.sub("", self.text)

    @property
    def heading_levels(self) -> list[int]:
        return [len(marks) for marks in HEADING.findall(self.prose)]

    @property
    def links(self) -> list[str]:
        return LINK.findall(self.prose)

    @property
    def table_rows(self) -> int:
        return sum(line.startswith("|") for line in self.prose.splitlines())

    @property
    def translation(self) -> Page:
        return Page(self.path.with_suffix(".zh.md"))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    @property
    def stamp(self) -> str | None:
        """The digest of the English page that this translation was last compared with."""
        found = STAMP.search(self.text)
        return found[1] if found else None


def english_pages() -> list[Page]:
    paths = sorted(DOCS.rglob("*.md"))
    return [Page(path) for path in paths if not path.name.endswith(".zh.md")]
