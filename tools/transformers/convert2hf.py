"""InternEvo's command: write a checkpoint as a Hugging Face folder.

python tools/transformers/convert2hf.py --src_folder CKPT --tgt_folder OUT [--tokenizer TOKENIZER]

The later names of the flags work too: --src --tgt --max_shard --max_pos --rotary_type --scaling_factor --dtype.
``evomesh convert to-hf`` does the same. This folder must never get an __init__.py: its name would hide the library.
"""

from __future__ import annotations

import argparse

from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.cli.convert_hf import shard_bytes, write_folder
from evomesh.cli.run import run
from evomesh.cli.usage import ExplainedParser


def main() -> None:
    parser = ExplainedParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--src_folder",
        "--src",
        required=True,
        help="save folder, or one checkpoint in it",
    )
    parser.add_argument("--tgt_folder", "--tgt", required=True, help="new folder")
    parser.add_argument(
        "--tokenizer", help="sentencepiece .model, tokenizer.json or their folder"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="default: as trained",
    )
    parser.add_argument(
        "--max_shard", default="10GB", help="maximum size of a weight file"
    )
    parser.add_argument(
        "--max_pos", type=int, help="max_position_embeddings; default: as trained"
    )
    parser.add_argument(
        "--rotary_type", choices=("origin", "dynamic"), help="default: as trained"
    )
    parser.add_argument(
        "--scaling_factor", type=float, help="factor of rotary_type dynamic"
    )
    given = parser.parse_args()
    options = ExportOptions(
        dtype=given.dtype,
        max_shard_bytes=shard_bytes(given.max_shard),
        tokenizer=given.tokenizer,
        rotary_type=given.rotary_type,
        scaling_factor=given.scaling_factor,
        max_position=given.max_pos,
    )
    write_folder(given.src_folder, given.tgt_folder, options)


if __name__ == "__main__":
    run(main)
