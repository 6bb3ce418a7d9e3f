"""``evomesh generate``: text from a checkpoint."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from evomesh.data.tokenizer import Tokenizer, load_tokenizer
from evomesh.errors import UserError


def generate(
    ckpt: Annotated[str, typer.Option(help="Checkpoint folder: a save folder (its newest) or one step in it.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json, .model or their folder [default: data.tokenizer_path].")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to make.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Only the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Only the likeliest tokens up to this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the random draws.")] = 1024,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... [default: cuda where there is one].")] = "",
    config: Annotated[
        str | None, typer.Option(help="Config file to read first: it registers a model type of your own.")
    ] = None,
) -> None:
    """Go on from a prompt, token by token; greedy unless a temperature is given."""
    if not prompt:
        raise UserError("the prompt is empty", where="--prompt", expected="some text to go on from")
    import torch

    from evomesh.config.loader import load_config
    from evomesh.generate.decode import stream
    from evomesh.generate.sample import Sampling
    from evomesh.train.restore import restore_model

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    if config is not None:
        load_config(config)
    restored = restore_model(ckpt, device)
    path = tokenizer or restored.config.data.tokenizer_path
    if path is None:
        raise UserError("the checkpoint's config names no tokenizer", where=ckpt, fix="give one with --tokenizer PATH")
    text = load_tokenizer(path)
    ids = _prompt_ids(text, prompt, restored.config.model.vocab_size)
    eos = {text.eos_id} if text.eos_id is not None else set()
    shown = text.decode(ids)
    print(shown, end="", flush=True)
    for new in stream(
        restored.model, [ids], max_new_tokens=max_new_tokens, sampling=sampling, eos_ids=eos, device=device
    ):
        if new.token in eos:
            break
        ids.append(new.token)
        # Decoded whole, since one character may take several tokens: what is not yet one is shown later.
        whole = text.decode(ids)
        if whole.startswith(shown) and not whole.endswith("\ufffd"):
            print(whole[len(shown) :], end="", flush=True)
            shown = whole
    print(text.decode(ids)[len(shown) :])
    sys.stdout.flush()


def _prompt_ids(text: Tokenizer, prompt: str, vocab_size: int) -> list[int]:
    ids = text.encode(prompt)
    if text.add_bos and text.bos_id is not None:
        ids = [text.bos_id, *ids]
    if not ids:
        raise UserError(f"the prompt {prompt!r} has no tokens", where="--prompt", expected="some text to go on from")
    if max(ids) >= vocab_size:
        raise UserError(
            f"the tokenizer gives id {max(ids)}, the model knows {vocab_size} tokens",
            where=str(text.path),
            expected="the tokenizer the model was trained with",
        )
    return ids


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has one for each way to lack a device
        reason = str(error).partition("\n")[0]
        raise UserError(f"{device!r} cannot be used: {reason}", where="--device", expected="cpu or cuda") from None
