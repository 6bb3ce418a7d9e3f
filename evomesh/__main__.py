"""``python -m evomesh`` is the ``evomesh`` command."""

from evomesh.cli.main import main

main()
