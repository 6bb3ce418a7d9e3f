"""InternEvo's command: tokenize one text file, one document per line; lines of json and jsonl are encoded verbatim.

    python tools/tokenizer.py --text_input_path IN --bin_output_path OUT.bin [--tokenizer_path MODEL]

It adds neither bos nor eos and does not look for a text field; `evomesh tokenize` does both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evomesh.cli.run import run
from evomesh.cli.usage import ExplainedParser
from evomesh.data.prepare.tokenize import TextOptions, tokenize_files
from evomesh.data.records.source_files import find_source_files
from evomesh.data.tokenizer import load_tokenizer
from evomesh.errors import UserError

# Edit this to change the default model. InternEvo's repository has had it under either name.
TOKENIZER_PATHS = (
    Path(__file__).parent / "V7_sft.model",
    Path(__file__).parent / "tokenizer_internlm.model",
)


def main() -> None:
    parser = ExplainedParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text_input_path", required=True, help="a .txt, .json or .jsonl file"
    )
    parser.add_argument("--bin_output_path", required=True, help="the .bin to write")
    parser.add_argument(
        "--tokenizer_path",
        help="sentencepiece .model or tokenizer.json (default: tools/V7_sft.model)",
    )
    parser.add_argument(
        "--encoding", default="utf-8", help="of the text file, such as gb18030"
    )
    options = parser.parse_args()
    tokenizer = load_tokenizer(
        options.tokenizer_path or default_tokenizer(), "--tokenizer_path"
    )
    files = find_source_files([options.text_input_path], options.encoding)
    fingerprint = tokenize_files(
        files,
        options.bin_output_path,
        tokenizer,
        TextOptions(raw_lines=True, bos=False, eos=False),
    )
    if any(file.format in ("json", "jsonl") for file in files):
        print(
            "Note: lines of json and jsonl were encoded whole, JSON syntax included, as InternEvo's tool does;"
        )
        print("      `evomesh tokenize` encodes the text field alone")
    print(
        f"Successfully converted {options.text_input_path} to {options.bin_output_path}"
    )
    print(
        f"Successfully generated {options.bin_output_path}.meta ({fingerprint['documents']} documents)"
    )


def default_tokenizer() -> Path:
    """Return InternLM's tokenizer, if it is in this folder.

    Raises:
        UserError: it is not; with where to find it.
    """
    for path in TOKENIZER_PATHS:
        if path.exists():
            return path
    raise UserError(
        f"no tokenizer at {TOKENIZER_PATHS[0]}",
        where="tools/tokenizer.py",
        expected="InternLM's model: tools/tokenizer_internlm.model (once V7_sft.model) of InternEvo's repository, "
        "or tokenizer.model of internlm/internlm-7b on the Hugging Face hub",
        fix="copy it to tools/V7_sft.model, pass --tokenizer_path MODEL, or make one with `evomesh tokenizer train`",
    )


if __name__ == "__main__":
    run(main)
