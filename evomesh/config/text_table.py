"""Tables of plain text, for the log and for what is not a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of equally many cells as lines, each column as wide as its widest cell."""
    # Transposing twice goes from rows to columns and back.
    padded_columns = []
    columns = zip(*rows, strict=True)
    for column in columns:
        width = max(map(len, column))
        padded = [cell.ljust(width) for cell in column]
        padded_columns.append(padded)
    lines = []
    padded_rows = zip(*padded_columns, strict=True)
    for cells in padded_rows:
        line = "  ".join(cells)
        lines.append(line.rstrip())
    return "\n".join(lines)
