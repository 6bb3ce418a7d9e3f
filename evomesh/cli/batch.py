"""``evomesh batch``: tokens per optimizer step here and in XTuner, and steps of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.errors import UserError
from evomesh.quantities import counted

if TYPE_CHECKING:
    from evomesh.config.batch_size import InternEvoBatch, Match, XTunerBatch
    from evomesh.config.data import DataConfig

ConfigArgument = Annotated[
    str | None,
    typer.Argument(help="A config file to take the sizes from; options override it."),
]
GpusOption = Annotated[int, typer.Option(min=1, help="Processes of the whole run.")]
TensorOption = Annotated[
    int | None, typer.Option("--tp", min=1, help="parallel.tensor [default: 1].")
]
PipelineOption = Annotated[
    int | None, typer.Option("--pp", min=1, help="parallel.pipeline [default: 1].")
]
MicroNumOption = Annotated[int | None, typer.Option(min=1, help="data.micro_num.")]
MicroBszOption = Annotated[int | None, typer.Option(min=1, help="data.micro_bsz.")]
SeqLenOption = Annotated[int | None, typer.Option(min=1, help="data.seq_len.")]
SequenceOption = Annotated[
    int, typer.Option("--sp", min=1, help="XTuner's sequence_parallel_size.")
]
MaxLengthOption = Annotated[
    int | None,
    typer.Option(min=1, help="XTuner's max_length [default: micro_bsz * seq_len]."),
]
CountsOption = Annotated[
    int | None,
    typer.Option(
        "--accumulative-counts",
        min=1,
        help="XTuner's accumulative_counts as mmengine receives it: solve for micro_num instead.",
    ),
]
FolderOption = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="FOLDER", help="Token files: count the steps of an epoch."
    ),
]
EpochsOption = Annotated[
    float | None, typer.Option(min=0, help="With --data: epochs to convert to steps.")
]
StepsOption = Annotated[
    int | None, typer.Option(min=1, help="With --data: steps to convert to epochs.")
]


def batch(
    config: ConfigArgument = None,
    *,
    gpus: GpusOption,
    tensor: TensorOption = None,
    pipeline: PipelineOption = None,
    micro_num: MicroNumOption = None,
    micro_bsz: MicroBszOption = None,
    seq_len: SeqLenOption = None,
    sequence_parallel: SequenceOption = 1,
    max_length: MaxLengthOption = None,
    accumulative_counts: CountsOption = None,
    folder: FolderOption = None,
    epochs: EpochsOption = None,
    steps: StepsOption = None,
) -> None:
    """Compare tokens per step with XTuner's.

    Prints the tokens of one optimizer step, and the XTuner setting that gives the same,
    or the other way round.
    """
    from evomesh.config.batch_size import XTunerBatch

    if folder is None and (epochs is not None or steps is not None):
        raise UserError(
            "--epochs and --steps count packs of a dataset",
            fix="add --data FOLDER",
            code="EVO-CLI-004",
        )
    if config is None and seq_len is None:
        raise UserError(
            "no sequence length",
            fix="give a CONFIG, or --seq-len (and --micro-bsz, --micro-num)",
            code="EVO-CLI-004",
        )
    data_sizes = {"micro_num": micro_num, "micro_bsz": micro_bsz, "seq_len": seq_len}
    data, ours = _read_sizes(
        config, gpus, {"tensor": tensor, "pipeline": pipeline}, data_sizes
    )
    theirs = XTunerBatch(
        gpus,
        sequence_parallel,
        accumulative_counts or 1,
        max_length or ours.packed_length,
    )
    solve = _solve_micro_num if accumulative_counts else _solve_accumulative_counts
    lines = [_describe(ours), *solve(ours, theirs)]
    if folder is not None:
        lines += _epoch_lines(ours, data, folder, epochs, steps)
    for line in lines:
        typer.echo(line)


def _read_sizes(
    path: str | None,
    gpus: int,
    axes: Mapping[str, int | None],
    data_sizes: Mapping[str, int | None],
) -> tuple[DataConfig, InternEvoBatch]:
    """Return the sizes of the config (or of the defaults), overridden by those that are not None."""
    from evomesh.config.batch_size import InternEvoBatch
    from evomesh.config.loader import load_config
    from evomesh.config.schema import Config

    settings = load_config(path, []).config if path else Config()
    given = {name: value for name, value in data_sizes.items() if value is not None}
    data = settings.data.model_copy(update=given)
    batch = InternEvoBatch(
        gpus,
        tensor=axes["tensor"] or settings.parallel.tensor.size,
        pipeline=axes["pipeline"] or settings.parallel.pipeline.size,
        micro_num=data.micro_num,
        micro_bsz=data.micro_bsz,
        seq_len=data.seq_len,
    )
    return data, batch


def _describe(ours: InternEvoBatch) -> str:
    return (
        f"evomesh, InternEvo: {ours.gpus} GPUs / (tensor {ours.tensor} x pipeline {ours.pipeline}) x micro_num "
        f"{ours.micro_num} x micro_bsz {ours.micro_bsz} x seq_len {ours.seq_len} = "
        f"{ours.tokens_per_step:,} tokens per optimizer step"
    )


def _solve_accumulative_counts(
    ours: InternEvoBatch, theirs: XTunerBatch
) -> Iterator[str]:
    from evomesh.config.batch_size import match_accumulative_counts

    sequence = theirs.sequence_parallel
    match = match_accumulative_counts(
        ours.tokens_per_step, ours.gpus, sequence, theirs.max_length
    )
    yield (
        f"XTuner: {theirs.gpus} GPUs / sequence_parallel_size {sequence} x max_length {theirs.max_length} = "
        f"{theirs.tokens_per_iteration:,} tokens per iteration"
    )
    yield from _solution("accumulative_counts", match, ours.tokens_per_step)
    counts = match.exact
    if counts is None or sequence == 1:
        return
    # XTuner's templates multiply the number in the file by sequence_parallel_size
    # before mmengine receives it.
    if counts % sequence == 0:
        yield (
            f"in a config that multiplies by sequence_parallel_size itself: accumulative_counts={counts // sequence}"
        )
    else:
        yield (
            f"a config that multiplies accumulative_counts by sequence_parallel_size={sequence} itself cannot give "
            f"{counts}: remove that line from it"
        )


def _solve_micro_num(ours: InternEvoBatch, theirs: XTunerBatch) -> Iterator[str]:
    from evomesh.config.batch_size import match_micro_num

    yield (
        f"XTuner: {theirs.gpus} GPUs / sequence_parallel_size {theirs.sequence_parallel} x accumulative_counts "
        f"{theirs.accumulative_counts} x max_length {theirs.max_length} = {theirs.tokens_per_step:,} tokens "
        "per optimizer step"
    )
    yield from _solution(
        "micro_num",
        match_micro_num(theirs.tokens_per_step, ours),
        theirs.tokens_per_step,
    )


def _solution(name: str, match: Match, tokens: int) -> Iterator[str]:
    if match.exact is not None:
        yield f"equal with {name}={match.exact}"
        return
    yield f"no {name} gives {tokens:,} tokens per optimizer step: it would be {match.value} ({float(match.value):g})"
    for number in match.nearest:
        there = match.tokens(number)
        yield f"  nearest: {name}={number}: {there:,} tokens, {there / tokens - 1:+.1%}"


def _epoch_lines(
    ours: InternEvoBatch,
    data: DataConfig,
    folder: str,
    epochs: float | None,
    steps: int | None,
) -> Iterator[str]:
    from evomesh.data.inspect import open_packs

    packs = open_packs(folder, data).num_packs
    per_step = ours.packs_per_step
    rest = packs % per_step
    yield (
        f"{folder}: one epoch is {counted(packs, 'pack')} of {ours.packed_length:,} tokens = "
        + counted(packs // per_step, "step")
        + (f" and {counted(rest, 'pack')} of the next" if rest else "")
    )
    if epochs is not None:
        yield f"{counted(epochs, 'epoch', 'g')}: total_steps={int(epochs * packs) // per_step}"
    if steps is not None:
        yield (
            f"{counted(steps, 'step')}: {steps * per_step / packs:.3f} epochs"
            if packs
            else "the folder has no pack"
        )
