"""InternEvo's command: tokenize one text file, one document per line; lines of json and jsonl are encoded verbatim.

    python tools/tokenizer.py --text_input_path IN --bin_output_path OUT.bin [--tokenizer_path MODEL]

It adds neither bos nor eos and does not look for a text field; `evomesh tokenize` does both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evomesh.cli.run import run
from evomesh.data.prepare.tokenize import TextOptions, tokenize_files
from evomesh.data.records.source_files import find_source_files
from evomesh.data.tokenizer import load_tokenizer
from evomesh.errors import UserError

TOKENIZER_PATH = Path(__file__).parent / "V7_sft.model"  # edit this to change the default model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text_input_path", required=True, help="a .txt, .json or .jsonl file")
    parser.add_argument("--bin_output_path", required=True, help="the .bin to write")
    parser.add_argument(
        "--tokenizer_path", default=str(TOKENIZER_PATH), help="sentencepiece .model or tokenizer.json"
    )
    options = parser.parse_args()
    if not Path(options.tokenizer_path).expanduser().exists():
        raise UserError(
            f"no tokenizer at {options.tokenizer_path}",
            where="tools/tokenizer.py",
            fix="pass --tokenizer_path MODEL, or edit TOKENIZER_PATH in this file",
        )
    fingerprint = tokenize_files(
        find_source_files([options.text_input_path]),
        options.bin_output_path,
        load_tokenizer(options.tokenizer_path, "--tokenizer_path"),
        TextOptions(raw_lines=True, bos=False, eos=False),
    )
    print(f"Successfully converted {options.text_input_path} to {options.bin_output_path}")
    print(f"Successfully generated {options.bin_output_path}.meta ({fingerprint['documents']} documents)")


if __name__ == "__main__":
    run(main)
