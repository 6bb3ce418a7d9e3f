"""The verbs of the ``evomesh`` command and their groups."""

from __future__ import annotations

import os

import typer

from evomesh import __version__
from evomesh.cli import (
    batch,
    ckpt,
    compare,
    config,
    convert,
    data,
    demo,
    doctor,
    eval,
    explain,
    generate,
    ledger,
    parity,
    plan,
    replay,
    report,
    restarts,
    scale,
    serve,
    slurm,
    tokenize,
    tokenizer,
    top,
    train,
    validate,
    watch,
    xtuner,
)
from evomesh.cli.usage import ExplainedGroup

app = typer.Typer(
    name="evomesh",
    cls=ExplainedGroup,
    help="Train decoder language models, from one laptop CPU to a thousand GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich would take longer than the rest of `evomesh --help`
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("run")(restarts.run)
app.command("top")(top.top)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("replay")(replay.replay)
app.command("watch")(watch.watch)
app.command("demo")(demo.demo)
app.command("plan")(plan.plan)
app.command("scale")(scale.scale)
app.command("doctor")(doctor.doctor)
app.command("parity")(parity.parity)
app.command("slurm")(slurm.slurm)
app.command("batch")(batch.batch)
app.command("ledger")(ledger.ledger)
app.command("tokenize")(tokenize.tokenize)
app.command("generate")(generate.generate)
app.command("eval")(eval.evaluate)
app.command("validate")(validate.validate)
app.command("serve")(serve.serve)
app.command("chat")(serve.chat)
app.command("explain")(explain.explain)
app.add_typer(
    config.app, name="config", help="Check, show, list, copy and translate configs."
)
app.add_typer(
    tokenizer.app, name="tokenizer", help="Train, inspect and compare tokenizers."
)
app.add_typer(
    data.app,
    name="data",
    help="Inspect, show, verify, repair, cache, order and report on tokenized datasets.",
)
app.add_typer(
    ckpt.app,
    name="ckpt",
    help="List (ls), verify, prune, pin, diff, reshard and average checkpoints.",
)
app.add_typer(
    xtuner.app,
    name="xtuner",
    help="XTuner's commands: list-cfg, copy-cfg, train, convert.",
)
app.add_typer(
    convert.app,
    name="convert",
    help="Convert checkpoints from and to the formats of other systems.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"evomesh {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(
        False, "--debug", help="Show the traceback of an error (also EVOMESH_DEBUG=1)."
    ),
    version: bool = typer.Option(
        False,
        "--version",
        callback=_print_version,
        is_eager=True,
        help="Print the version and exit.",
    ),
) -> None:
    """Set the options of all commands."""
    if debug:
        os.environ["EVOMESH_DEBUG"] = "1"
