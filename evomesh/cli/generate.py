"""``evomesh generate``: text from a checkpoint, or answers to a folder of prompts."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.cli.run import run
from evomesh.cli.train import LauncherOption, OverrideOption, RendezvousPortOption
from evomesh.errors import UserError
from evomesh.generate.options import SamplingParams

if TYPE_CHECKING:
    from evomesh.checkpoint.restore import RestoredModel
    from evomesh.data.tokenizer import Tokenizer
    from evomesh.models.language_model import LanguageModel


def generate(
    file: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A config whose generation section says what to do."),
    ] = None,
    ckpt: Annotated[
        str | None,
        typer.Option(help="A save folder (its newest), one step in it, or a Hugging Face model folder."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="tokenizer.json, .model or their folder [default: data.tokenizer_path]."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to make.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Only the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Only the likeliest tokens up to this mass.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Only tokens this likely beside the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens seen before are less likely.")
    ] = 1.0,
    num_beams: Annotated[int, typer.Option(min=1, help="Search so many sequences side by side.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Of beams: above 0 favours long answers.")] = 1.0,
    num_return_sequences: Annotated[int, typer.Option(min=1, help="Answers.")] = 1,
    eos_id: Annotated[
        list[int] | None, typer.Option(help="Id that ends the answer; repeatable [default: the tokenizer's].")
    ] = None,
    dynamic_ntk: Annotated[
        bool | None, typer.Option(help="Dynamic NTK beyond the trained length [default: as trained].")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random draws.")] = 1024,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... [default: cuda where there is one].")] = "",
    config: Annotated[
        str | None, typer.Option(help="Config file to read first: it registers a model type of your own.")
    ] = None,
    overrides: OverrideOption = None,
    launcher: LauncherOption = "auto",
    port: RendezvousPortOption = 8888,
) -> None:
    """Go on from a prompt (--ckpt, --prompt), or answer all prompts of CONFIG's generation section.

    The options from --tokenizer to --config are for a prompt, greedy unless a temperature is given; --set, --launcher
    and --port are for CONFIG, which may run on many processes.
    """
    if file is not None:
        answer_config(file, overrides, launcher, port, alone=ckpt is None and prompt is None)
        return
    sampling = SamplingParams(
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
    answer_prompt(ckpt, prompt, sampling, tokenizer, device, config, dynamic_ntk)


def answer_prompt(
    ckpt: str | None,
    prompt: str | None,
    sampling: SamplingParams,
    tokenizer: str | None,
    device: str,
    config: str | None,
    dynamic_ntk: bool | None,
) -> None:
    if ckpt is None or prompt is None:
        raise UserError("nothing to do", expected="evomesh generate CONFIG, or --ckpt DIR --prompt TEXT")
    if not prompt:
        raise UserError("the prompt is empty", where="--prompt", expected="some text to go on from")
    restored = _restore(ckpt, device, config, dynamic_ntk)
    text = _tokenizer(restored, tokenizer, ckpt)
    ids = _prompt_ids(text, prompt, restored.config.model.vocab_size)
    if not sampling.eos_ids:
        sampling = replace(sampling, eos_ids=_ends(restored, text))
    if sampling.num_beams > 1 or sampling.num_return_sequences > 1:
        _print_answers(restored.model, text, ids, sampling)
    else:
        _print_stream(restored.model, text, ids, sampling)


def answer_config(
    config: str, overrides: list[str] | None, launcher: str, port: int, alone: bool = True
) -> None:
    if not alone:
        raise UserError("CONFIG and --ckpt or --prompt", expected="one of the two ways", fix="leave one out")
    from evomesh.config.loader import load_config
    from evomesh.train.generation import generate_from_config

    generate_from_config(load_config(config, overrides or []), launcher, port)


def shim(
    config: Annotated[str, typer.Option("--config", help="A Python config file.")],
    overrides: OverrideOption = None,
    launcher: LauncherOption = "auto",
    port: RendezvousPortOption = 8888,
) -> None:
    """Answer the prompts of a config's generation section: generate.py --config CONFIG."""
    answer_config(config, overrides, launcher, port)


def shim_main() -> None:
    """Entry point of the repository's ``generate.py``."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(shim)
    run(app)


def _restore(ckpt: str, device: str, config: str | None, dynamic_ntk: bool | None) -> RestoredModel:
    from evomesh.checkpoint.restore import restore_model
    from evomesh.cli.device import choose_device
    from evomesh.config.loader import load_config
    from evomesh.models.decoder import Decoder

    device = choose_device(device)
    if config is not None:
        load_config(config)
    restored = restore_model(ckpt, device)
    if dynamic_ntk is not None:
        if not isinstance(restored.model, Decoder):
            raise UserError("a model of your own has no dynamic NTK", where="--dynamic-ntk")
        restored.model.rotary = replace(restored.model.rotary, dynamic_ntk=dynamic_ntk)
    return restored


def _tokenizer(restored: RestoredModel, given: str | None, ckpt: str) -> Tokenizer:
    from evomesh.data.tokenizer import load_tokenizer

    path = given or restored.config.data.tokenizer_path
    if path is None:
        raise UserError(
            "the checkpoint's config names no tokenizer", where=ckpt, fix="give one with --tokenizer PATH"
        )
    return load_tokenizer(path)


def _ends(restored: RestoredModel, text: Tokenizer) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's, and those of the checkpoint's generation section."""
    section = restored.config.generation
    ids = [] if text.eos_id is None else [text.eos_id]
    ids += [] if section is None else [*section.eos_id, *section.additional_eos_token_list]
    return tuple(dict.fromkeys(ids))


def _print_stream(model: LanguageModel, text: Tokenizer, ids: list[int], sampling: SamplingParams) -> None:
    from evomesh.generate.decode import stream

    shown = text.decode(ids)
    print(shown, end="", flush=True)
    for new in stream(model, [list(ids)], sampling):
        if new.finish == "stop":
            break
        ids.append(new.token)
        # Decoded whole, since one character may take several tokens: what is not yet one is shown later.
        whole = text.decode(ids)
        if whole.startswith(shown) and not whole.endswith("\ufffd"):
            print(whole[len(shown) :], end="", flush=True)
            shown = whole
    print(text.decode(ids)[len(shown) :])
    sys.stdout.flush()


def _print_answers(model: LanguageModel, text: Tokenizer, ids: list[int], sampling: SamplingParams) -> None:
    from evomesh.generate.decode import generate

    (answers,) = generate(model, [ids], sampling)
    for number, answer in enumerate(answers, 1):
        if len(answers) > 1:
            print(f"--- answer {number} of {len(answers)}")
        print(text.decode([*ids, *(token for token in answer if token not in sampling.eos_ids)]))


def _prompt_ids(text: Tokenizer, prompt: str, vocab_size: int) -> list[int]:
    ids = text.encode(prompt)
    if text.add_bos and text.bos_id is not None:
        ids = [text.bos_id, *ids]
    if not ids:
        raise UserError(
            f"the prompt {prompt!r} has no tokens", where="--prompt", expected="some text to go on from"
        )
    if max(ids) >= vocab_size:
        raise UserError(
            f"the tokenizer gives id {max(ids)}, the model knows {vocab_size} tokens",
            where=str(text.path),
            expected="the tokenizer the model was trained with",
        )
    return ids
