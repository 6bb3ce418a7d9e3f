"""The ``evomesh`` command: one file per verb, each parses arguments and calls one function."""
