"""Write data_order.txt into a folder, with the command line of InternEvo's tool.

python tools/get_data_order.py --data-folder DATA --save-folder OUT [--file-type .bin]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evomesh.cli.run import run
from evomesh.cli.usage import ExplainedParser
from evomesh.data.token_files.folders import write_order


def main() -> None:
    parser = ExplainedParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-folder", required=True)
    parser.add_argument("--save-folder", required=True, type=Path)
    parser.add_argument("--file-type", default=".bin")
    options = parser.parse_args()
    output = options.save_folder / "data_order.txt"
    files = write_order(options.data_folder, output, options.file_type)
    print(f"{output}: the order of {files:,} files")


if __name__ == "__main__":
    run(main)
