"""InternEvo's command: tokenize the Alpaca dataset and hold out a share of it for validation.

    python tools/alpaca_tokenizer.py alpaca_data.json OUT TOKENIZER [--split_ratio 0.1] [--chat-template chatml]

writes OUT/train/en/dataset.bin and OUT/valid/en/dataset.bin, each with .meta. `evomesh tokenize --format alpaca`
also offers lengths.
"""

from __future__ import annotations

import argparse

from evomesh.cli.run import run
from evomesh.cli.tokenize import tokenize_conversations
from evomesh.cli.usage import ExplainedParser
from evomesh.data.prepare.conversations import ChatOptions


def main() -> None:
    parser = ExplainedParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "dataset_path", help="JSON list of records with instruction, input and output"
    )
    parser.add_argument("output_path", help="folder to write into")
    parser.add_argument("tokenizer_path", help="sentencepiece .model or tokenizer.json")
    parser.add_argument(
        "--split_ratio",
        type=float,
        default=0.1,
        help="share of the records held out for validation",
    )
    parser.add_argument(
        "--encoding", default="utf-8", help="of the dataset, such as gb18030"
    )
    parser.add_argument(
        "--chat-template",
        default="internlm",
        help="how a conversation is written: internlm, chatml, llama3, or tokenizer for the tokenizer's own",
    )
    options = parser.parse_args()
    template = options.chat_template
    chat = ChatOptions("alpaca", template, split_ratio=options.split_ratio)
    tokenize_conversations(
        [options.dataset_path],
        options.output_path,
        options.tokenizer_path,
        chat,
        encoding=options.encoding,
    )


if __name__ == "__main__":
    run(main)
