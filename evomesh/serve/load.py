"""A service from a checkpoint, and the web server around it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from evomesh.checkpoint.restore import LoadedModel, load_model
from evomesh.config.schema import RotaryType
from evomesh.config.user import expand_home
from evomesh.errors import UserError
from evomesh.generate.engine import GenerationEngine
from evomesh.generate.options import PagedMode
from evomesh.generate.paged_decoding import check_paged
from evomesh.models.language_model import has_rotary_types, with_rotary_type
from evomesh.serve.loop import EngineLoop
from evomesh.serve.service import GenerationService, ServedModel, ServiceLimits
from evomesh.user_files import read_text

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
# Default context length over trained length, where longer texts are expected.
EXTENSION = 4


@dataclass(frozen=True)
class ModelOptions:
    """The command line's options for a model.

    Attributes:
        tokenizer: None: the config's ``data.tokenizer_path``.
        template: a built-in style, "tokenizer", "none", or "auto": the tokenizer's own if it has one, else the data's.
        rotary_type: None: that of the config.
        ema: take the moving average of the weights.
        context_length: None: the trained length, or four times that with dynamic NTK or ``extended_context``.
        paged: whether keys and values are kept in pages.
        extended_context: let users see how each rotary type copes with texts beyond the trained length.
    """

    tokenizer: str | None = None
    template: str = "auto"
    rotary_type: RotaryType | None = None
    ema: bool = False
    name: str | None = None
    context_length: int | None = None
    slots: int = 8
    queue: int = 64
    extended_context: bool = False
    paged: PagedMode = "off"


def load_service(ckpt: str, device: str, options: ModelOptions) -> GenerationService:
    """Load a model and build the service that answers with it; its engines are not started.

    Raises:
        UserError: no such checkpoint or no average in it, no tokenizer, or one that does not fit the model or the
            template.
    """
    loaded = load_model(
        ckpt,
        device,
        tokenizer=options.tokenizer,
        template=options.template,
        ema=options.ema,
    )
    check_paged(loaded.model, options.paged)
    config = loaded.config
    trained_length = config.model.max_position_embeddings
    rotary_type = options.rotary_type or config.model.rotary_type
    if rotary_type != config.model.rotary_type and not has_rotary_types(loaded.model):
        raise UserError(
            f"{rotary_type!r} is not available for this model, whose rotary scaling is fixed",
            where="--rotary-type",
            expected=config.model.rotary_type,
            fix="leave it out",
            code="EVO-GEN-003",
        )
    # Dynamic angles are made for texts beyond the trained length, so that there is more
    # room without being asked for.
    context_length = options.context_length
    if context_length is None:
        extended = options.extended_context or rotary_type == "dynamic"
        context_length = trained_length * EXTENSION if extended else trained_length
    model = ServedModel(
        name=options.name or config.run.job_name,
        fingerprint=loaded.fingerprint,
        created=int(time.time()),
        tokenizer=loaded.tokenizer,
        template=loaded.template,
        eos_ids=loaded.eos_ids,
        vocab_size=loaded.vocab_size,
        trained_length=trained_length,
        rotary_type=rotary_type,
    )
    limits = ServiceLimits(context_length, options.slots, options.queue)
    engines = EngineLoop(_engine_builders(loaded, limits, options.paged))
    return GenerationService(model, engines, limits)


def _engine_builders(
    loaded: LoadedModel, limits: ServiceLimits, paged: PagedMode
) -> dict[RotaryType, Callable[[], GenerationEngine]]:
    """Return what builds the engine of each rotary type, all on the same weights.

    A model with ``rope_scaling``, or a custom one without a rotary embedding, has only
    the type of its config.
    """
    build = partial(
        GenerationEngine,
        slots=limits.slots,
        context_length=limits.context_length,
        vocab_size=loaded.vocab_size,
        paged=paged,
    )
    if not has_rotary_types(loaded.model):
        return {loaded.config.model.rotary_type: partial(build, loaded.model)}
    return {
        "origin": partial(build, with_rotary_type(loaded.model, "origin")),
        "dynamic": partial(build, with_rotary_type(loaded.model, "dynamic")),
    }


def read_key(host: str, key_file: str | None) -> str | None:
    """Read the key that clients must send, from a file or from EVOMESH_API_KEY; None if there is none.

    Never from the command line, where every user of the machine could read it.

    Raises:
        UserError: the file has no key, or other machines can reach the server and there is no key.
    """
    if key_file is not None:
        path = expand_home(key_file)
        if not path.is_file():
            raise UserError(
                f"no file {path}",
                where="--key-file",
                expected="a file with the key",
                code="EVO-SERVE-002",
            )
        key = read_text(path, "--key-file", "a file with the key").strip()
        if not key:
            raise UserError(
                f"{path} is empty",
                where="--key-file",
                expected="a file with the key",
                code="EVO-SERVE-002",
            )
        return key
    key = os.environ.get("EVOMESH_API_KEY", "").strip()
    if not key and host not in LOOPBACK:
        raise UserError(
            f"other machines can reach {host}, so a key is required",
            where="--host",
            expected="--key-file PATH, or the key in EVOMESH_API_KEY",
            fix="to serve without a key, leave out --host: only this machine can then reach the server",
            code="EVO-SERVE-002",
        )
    return key or None
