"""XTuner's command: write the checkpoint of a run as a Hugging Face folder, with the config beside it.

python tools/model_converters/pth_to_hf.py CONFIG SRC DST [--fp32] [--max-shard-size 2GB]

Without --fp32 the weights keep the dtype they were trained in; ``evomesh convert to-hf`` has more options.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.cli.convert_hf import shard_bytes, write_folder
from evomesh.cli.run import run
from evomesh.config.loader import load_config
from evomesh.storage.base import join
from evomesh.storage.urls import open_storage


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="the training's config: checked, and copied to xtuner_config.py")
    parser.add_argument("source", help="save folder, or one checkpoint in it")
    parser.add_argument("save_dir", help="new folder")
    parser.add_argument("--fp32", action="store_true", help="weights in float32")
    parser.add_argument("--max-shard-size", default="2GB", help="maximum size of a weight file")
    given = parser.parse_args()
    tokenizer = load_config(given.config).config.data.tokenizer_path
    options = ExportOptions(
        dtype="float32" if given.fp32 else None,
        max_shard_bytes=shard_bytes(given.max_shard_size),
        tokenizer=tokenizer if tokenizer and Path(tokenizer).exists() else None,
    )
    write_folder(given.source, given.save_dir, options)
    storage, folder = open_storage(given.save_dir)
    writer = storage.create(join(folder, "xtuner_config.py"))
    writer.write(Path(given.config).read_bytes())
    writer.finish()


if __name__ == "__main__":
    run(main)
