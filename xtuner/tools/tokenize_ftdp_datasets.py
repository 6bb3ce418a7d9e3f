"""Run evomesh's form of XTuner's script, by its path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from evomesh.cli.run import run
from evomesh.cli.xtuner_tools import tokenize_ftdp_datasets

if __name__ == "__main__":
    run(tokenize_ftdp_datasets)
