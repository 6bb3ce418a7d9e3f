"""Writing systems and languages of texts: Unicode's names of characters, and py3langid where it is installed."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

# First words of Unicode's names of letters, and the script that they are in; other
# scripts have their own name there, such as LATIN or DEVANAGARI.
ALIASES = {
    "CJK": "Han",
    "IDEOGRAPHIC": "Han",
    "HENTAIGANA": "Hiragana",
    "KATAKANA-HIRAGANA": "Katakana",
    "OHM": "Greek",
    "FEMININE": "Latin",
    "MASCULINE": "Latin",
    "KELVIN": "Latin",
    "ANGSTROM": "Latin",
    "TURNED": "Latin",
    "ROMAN": "Latin",
}
NOT_SCRIPTS = {
    "COMBINING",
    "MODIFIER",
    "MICRO",
    "DOUBLE-STRUCK",
    "SCRIPT",
}
WIDTHS = ("FULLWIDTH ", "HALFWIDTH ")
GROUPS = {"N": "digits", "P": "punctuation", "S": "symbols", "Z": "spaces"}
MAX_SCRIPTS = 30
CLASSIFIED_CHARACTERS = 1000  # of a text, from its start

# A word is a run of letters and digits; in scripts without spaces, each character.
WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|"
    r"[^\W\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+|[^\w\s]"
)


def words_of(text: str) -> list[str]:
    """Return the words of a text, and each sign of punctuation."""
    return WORD.findall(text)


def script_of(character: str) -> str:
    """Return the script of a letter, such as "Latin" or "Han", and for others their group, such as "digits"."""
    category = unicodedata.category(character)
    if category[0] in GROUPS:
        return GROUPS[category[0]]
    if category in ("Cc", "Cf"):
        return "spaces" if character.isspace() else "control"
    name = unicodedata.name(character, "")
    for width in WIDTHS:
        name = name.removeprefix(width)
    first = name.partition(" ")[0]
    # Marks of several scripts, such as a combining accent, belong to the letter before.
    if not first or first in NOT_SCRIPTS:
        return "other"
    if first in ALIASES:
        return ALIASES[first]
    return first.capitalize() if first.isalpha() else "other"


class ScriptCounts:
    """Characters of texts by script."""

    def __init__(self) -> None:
        self._characters: Counter[str] = Counter()
        self.texts = 0

    def add(self, text: str) -> None:
        """Count the characters of a text."""
        self._characters.update(text)
        self.texts += 1

    def rows(self) -> list[dict[str, object]]:
        """Return scripts with their characters and share of all, the most frequent first."""
        scripts: Counter[str] = Counter()
        for character, count in self._characters.items():
            scripts[script_of(character)] += count
        return _most_common(scripts, "script", "characters")


class LanguageCounts:
    """Texts by language, as far as py3langid is installed.

    Attributes:
        is_available: whether it is.
    """

    def __init__(self) -> None:
        self._texts: Counter[str] = Counter()
        try:
            import py3langid
        except ImportError:
            self.is_available = False
        else:
            self.is_available = True
            self._classify = py3langid.classify

    def add(self, text: str) -> None:
        """Classify a text by its beginning."""
        if not self.is_available:
            return
        beginning = text[:CLASSIFIED_CHARACTERS]
        if not any(character.isalpha() for character in beginning):
            return
        self._texts[str(self._classify(beginning)[0])] += 1

    def rows(self) -> list[dict[str, object]]:
        """Return ISO 639-1 codes with their texts and share of all, the most frequent first."""
        return _most_common(self._texts, "language", "texts")


def _most_common(
    counts: Counter[str], name: str, counted: str
) -> list[dict[str, object]]:
    total = max(1, counts.total())
    rows = []
    for item, count in counts.most_common(MAX_SCRIPTS):
        row: dict[str, object] = {name: item}
        row[counted] = count
        row["share"] = count / total
        rows.append(row)
    return rows
