"""XTuner's command: write the checkpoint of a run as a Hugging Face folder, with the config beside it.

python tools/model_converters/pth_to_hf.py CONFIG SRC DST [--fp32] [--max-shard-size 2GB] [--tokenizer PATH]

Without --fp32 the weights keep the dtype they were trained in; ``evomesh convert to-hf`` has more options.
"""

from __future__ import annotations

from evomesh.cli.run import run
from evomesh.cli.usage import single_command
from evomesh.cli.xtuner_convert import pth_to_hf

if __name__ == "__main__":
    run(single_command(pth_to_hf))
