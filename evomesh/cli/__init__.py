"""Parse the command line: one file per verb of ``evomesh``, which parses arguments and calls one function.

main.py    the verbs; run.py turns a UserError into a message and an exit code
options.py options that several verbs share
"""
