"""Imported last but one by the fork server: what each command would compute anew, and always with the same result."""

from __future__ import annotations

import functools

import typer.main

from evomesh.cli.app import app

# typer reads the options of sixty commands, in a tenth of a second. Tests that start
# another interpreter build the command as users do.
typer.main.get_command = functools.cache(typer.main.get_command)
typer.main.get_command(app)
