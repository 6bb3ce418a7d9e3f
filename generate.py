"""``python generate.py --config CONFIG``: InternEvo's name for ``evomesh generate CONFIG``."""

from evomesh.cli.generate import shim_main

if __name__ == "__main__":
    shim_main()
