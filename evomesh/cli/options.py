"""Options that several commands share: config overrides, the launcher, the model, the device, sampling parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from evomesh.generate.options import PagedMode, SamplingParams

OverrideOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a config value; repeatable.",
    ),
]
LauncherOption = Annotated[
    str, typer.Option(help="Where rank information comes from: auto, torch or slurm.")
]
RendezvousPortOption = Annotated[
    int, typer.Option(help="Rendezvous port of the slurm launcher.")
]

EncodingOption = Annotated[
    str, typer.Option(help="Encoding of text files, such as gb18030 or utf-16.")
]
WholeFilesOption = Annotated[
    bool,
    typer.Option(
        "--whole-files", help="Take each file as one document, whatever its ending."
    ),
]

_CHECKPOINT_HELP = (
    "Save folder (its newest step), one step in it, or Hugging Face model folder."
)
CheckpointOption = Annotated[str, typer.Option(help=_CHECKPOINT_HELP)]
OptionalCheckpointOption = Annotated[str | None, typer.Option(help=_CHECKPOINT_HELP)]
CheckpointArgument = Annotated[str, typer.Argument(help=_CHECKPOINT_HELP)]
TokenizerPathOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="tokenizer.json, .model or their folder [default: data.tokenizer_path].",
    ),
]
TemplateOption = Annotated[
    str,
    typer.Option(
        "--chat-template",
        help="internlm, chatml, llama3, tokenizer (the tokenizer's), none; auto: the tokenizer's, if it has one, else "
        "data.chat_template.",
    ),
]
EmaOption = Annotated[
    bool,
    typer.Option("--ema", help="Take the moving average of the weights."),
]
DeviceOption = Annotated[
    str, typer.Option(help="cpu, cuda, ... [default: cuda if available].")
]
PagedOption = Annotated[
    PagedMode,
    typer.Option(
        help="Decode with keys and values in pages and one CUDA graph per step: off, auto (on a GPU with 16-bit "
        "weights) or on."
    ),
]
ConfigFileOption = Annotated[
    str | None,
    typer.Option(help="Config file to load first, to register a custom model type."),
]

MaxNewTokensOption = Annotated[
    int, typer.Option(min=1, help="Maximum number of new tokens.")
]
TemperatureOption = Annotated[
    float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")
]
TopKOption = Annotated[
    int, typer.Option(min=0, help="Sample from the k most probable tokens; 0 is all.")
]
TopPOption = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Nucleus sampling: smallest set of tokens whose probability reaches p.",
    ),
]
MinPOption = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Drop tokens below this fraction of the top token's probability.",
    ),
]
RepetitionPenaltyOption = Annotated[
    float, typer.Option(help="Above 1, tokens seen before become less likely.")
]
NumBeamsOption = Annotated[
    int, typer.Option(min=1, help="Number of beams; 1 is no beam search.")
]
LengthPenaltyOption = Annotated[
    float, typer.Option(help="For beams: above 0 favors long completions.")
]
NumReturnSequencesOption = Annotated[
    int, typer.Option(min=1, help="Number of completions to return.")
]
EosIdOption = Annotated[
    list[int] | None,
    typer.Option(
        help="Id that ends a completion; repeatable [default: the tokenizer's, the chat template's, the config's]."
    ),
]
SamplingSeedOption = Annotated[int, typer.Option(min=0, help="Sampling seed.")]


def sampling_params(
    max_new_tokens: MaxNewTokensOption = 100,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    num_beams: NumBeamsOption = 1,
    length_penalty: LengthPenaltyOption = 1.0,
    num_return_sequences: NumReturnSequencesOption = 1,
    eos_id: EosIdOption = None,
    seed: SamplingSeedOption = 1024,
) -> SamplingParams:
    """Build sampling parameters from the options of the command line, which are this function's parameters."""
    return SamplingParams(
        repetition_penalty=repetition_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        num_beams=num_beams,
        length_penalty=length_penalty,
        num_return_sequences=num_return_sequences,
        seed=seed,
        max_new_tokens=max_new_tokens,
        eos_ids=tuple(eos_id or ()),
    )


def with_sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``sampling`` of a command by the options of ``sampling_params``.

    typer derives options from a function's signature, so the returned function has a
    signature with the options in place of ``sampling``; it calls the command with the
    ``SamplingParams`` that they build.
    """
    options = inspect.signature(sampling_params, eval_str=True).parameters
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name == "sampling":
            parameters += options.values()
        else:
            parameters.append(parameter)

    @functools.wraps(command)
    def command_with_options(**arguments: Any) -> None:
        values = {name: arguments.pop(name) for name in options}
        sampling = sampling_params(**values)
        command(**arguments, sampling=sampling)

    new_signature = signature.replace(parameters=parameters)
    command_with_options.__signature__ = new_signature  # type: ignore[attr-defined]
    command_with_options.__annotations__ = {
        item.name: item.annotation for item in parameters
    }
    return command_with_options
