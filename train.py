"""``python train.py --config CONFIG [--launcher torch|slurm]``: InternEvo's name for ``evomesh train CONFIG``."""

from evomesh.cli.main import shim_main

if __name__ == "__main__":
    shim_main()
