"""Draw a run as ``evomesh top`` shows it, as an SVG for the docs.

    python tools/top_picture.py RUN docs/images/top.svg [COLUMNS]

RUN is a run folder, of a run that is training now or has ended.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from rich.console import Console
from rich.text import Text

from evomesh.cli.top import frame
from evomesh.monitor.overview import find_run


def picture(run: Path, columns: int) -> str:
    """Return the SVG of the screen, with the colors of a terminal."""
    console = Console(record=True, width=columns, file=io.StringIO())
    for line in frame(find_run(run), columns, None, in_color=True):
        console.print(Text.from_ansi(line))
    return console.export_svg(title=f"evomesh top {run}")


def main() -> None:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("columns", type=int, nargs="?", default=80)
    options = parser.parse_args()
    options.out.write_text(picture(options.run, options.columns), encoding="utf-8")


if __name__ == "__main__":
    main()
