"""``python train.py --config CONFIG [--launcher torch|slurm]``: the documents' command for ``evomesh train``."""

from evomesh.cli.train import shim_main

if __name__ == "__main__":
    shim_main()
