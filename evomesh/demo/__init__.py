"""The demo: text that every Python ships, what is asked of a model trained on it, and what it learned.

``evomesh demo`` and ``make train`` are both ``evomesh.cli.demo``, which runs the commands
that a user would type for such a model.
"""
