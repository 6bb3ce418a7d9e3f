"""A service from a checkpoint, and the web server round it."""

from __future__ import annotations

import copy
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomesh.checkpoint.restore import RestoredModel, restore_model
from evomesh.config.schema import Config, RotaryType
from evomesh.data.chat import ChatTemplate, build_template
from evomesh.data.tokenizer import Tokenizer, load_tokenizer
from evomesh.errors import UserError
from evomesh.generate.engine import GenerationEngine
from evomesh.models.language_model import LanguageModel
from evomesh.serve.loop import EngineLoop
from evomesh.serve.service import GenerationService, ServedModel, ServiceLimits

if TYPE_CHECKING:
    from fastapi import FastAPI

LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class ModelOptions:
    """What the command line says about a model.

    Attributes:
        tokenizer: None: the config's ``data.tokenizer_path``.
        template: a built-in style, "tokenizer", "none", or "auto": the tokenizer's own where it has one.
        rotary: None: the one of the config.
        context: None: the trained length, four times that with dynamic NTK or for ``roomy``.
        roomy: room to see what the rotary type does to long texts.
    """

    tokenizer: str | None = None
    template: str = "auto"
    rotary: RotaryType | None = None
    name: str | None = None
    context: int | None = None
    slots: int = 8
    queue: int = 64
    roomy: bool = False


def load_service(ckpt: str, device: str, choices: ModelOptions) -> GenerationService:
    """Raises: UserError: no such checkpoint, no tokenizer, or one that does not fit the model or the template."""
    restored = restore_model(ckpt, device)
    config = restored.config
    path = choices.tokenizer or config.data.tokenizer_path
    if path is None:
        raise UserError(
            "the checkpoint's config names no tokenizer", where=ckpt, fix="give one with --tokenizer PATH"
        )
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer knows {tokenizer.vocab_size} tokens, the model {config.model.vocab_size}",
            where=str(tokenizer.path),
            expected="the tokenizer the model was trained with",
        )
    template = _template(choices.template, tokenizer)
    rotary: RotaryType = choices.rotary or config.model.rotary_type
    trained = config.model.max_position_embeddings
    context = choices.context or trained * (4 if choices.roomy or rotary == "dynamic" else 1)
    model = ServedModel(
        name=choices.name or config.run.job_name,
        fingerprint=restored.fingerprint,
        created=int(time.time()),
        tokenizer=tokenizer,
        template=template,
        eos_ids=_eos(config, tokenizer, template),
        vocab_size=config.model.vocab_size,
        trained_length=trained,
        rotary=rotary,
    )
    limits = ServiceLimits(context, choices.slots, choices.queue)
    return GenerationService(model, EngineLoop(_engines(restored, limits)), limits)


def _template(name: str, tokenizer: Tokenizer) -> ChatTemplate | None:
    if name == "none" or (name == "auto" and not tokenizer.chat_template):
        return None
    return build_template("tokenizer" if name == "auto" else name, tokenizer)


def _eos(config: Config, tokenizer: Tokenizer, template: ChatTemplate | None) -> tuple[int, ...]:
    ids = {tokenizer.eos_id} if tokenizer.eos_id is not None else set()
    if config.generation is not None:
        ids |= {*config.generation.eos_id, *config.generation.additional_eos_token_list}
    return tuple(sorted(ids.union(template.stops if template else ())))


def _engines(
    restored: RestoredModel, limits: ServiceLimits
) -> dict[RotaryType, Callable[[], GenerationEngine]]:
    """Both rotary types on the same weights; a model of one's own without ``rotary`` has but the one it has."""
    model = restored.model
    options = {
        "slots": limits.slots,
        "max_tokens": limits.context,
        "vocab_size": restored.config.model.vocab_size,
    }
    rotary = getattr(model, "rotary", None)
    if rotary is None:
        return {restored.config.model.rotary_type: partial(GenerationEngine, model, **options)}
    return {
        "origin": partial(GenerationEngine, _with(model, replace(rotary, dynamic_ntk=False)), **options),
        "dynamic": partial(GenerationEngine, _with(model, replace(rotary, dynamic_ntk=True)), **options),
    }


def _with(model: LanguageModel, rotary: Any) -> LanguageModel:
    other = copy.copy(model)  # shares every parameter
    other.rotary = rotary
    return other


def read_key(host: str, key_file: str | None) -> str | None:
    """The key that clients must bear, from a file or from EVOMESH_API_KEY; never from the command line, where every
    user of the machine could read it.

    Raises:
        UserError: the file holds none, or others can reach the server and there is none.
    """
    if key_file is not None:
        path = Path(key_file).expanduser()
        if not path.is_file():
            raise UserError(f"no file {path}", where="--key-file", expected="a file that holds the key")
        key = path.read_text(encoding="utf-8").strip()
        if not key:
            raise UserError(f"{path} is empty", where="--key-file", expected="a file that holds the key")
        return key
    key = os.environ.get("EVOMESH_API_KEY", "").strip()
    if not key and host not in LOOPBACK:
        raise UserError(
            f"other machines can reach {host}, so a key is required",
            where="--host",
            expected="--key-file PATH, or the key in EVOMESH_API_KEY",
            fix="without a key, leave --host away: only this machine can then reach the server",
        )
    return key or None


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises: UserError: it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({error})",
            where="--port",
            fix="take another, or 0 for any free one",
        ) from None


def run(app: FastAPI, listening: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM; answers in work then have five seconds."""
    import uvicorn

    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        limit_concurrency=1024,
        timeout_graceful_shutdown=5,
        lifespan="on",
    )
    uvicorn.Server(settings).run(sockets=[listening])
