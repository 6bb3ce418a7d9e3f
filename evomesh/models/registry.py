"""The registry of model builders by ``model_type``, to which users add custom models."""

from __future__ import annotations

import difflib
import inspect
import json
from functools import partial
from typing import Any, cast, get_type_hints

import torch
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from torch import nn

from evomesh.config.foreign_models import foreign_model
from evomesh.config.loader import meant_key
from evomesh.config.schema import ModelConfig
from evomesh.errors import ConfigError, UserError
from evomesh.layers.init import InitialWeight, fill_parameter
from evomesh.models.baichuan import BAICHUAN2
from evomesh.models.decoder import Decoder
from evomesh.models.gemma import GEMMA
from evomesh.models.internlm import INTERNLM
from evomesh.models.internlm2 import INTERNLM2
from evomesh.models.internlm3 import INTERNLM3
from evomesh.models.language_model import LanguageModel
from evomesh.models.llama import LLAMA
from evomesh.models.mistral import MISTRAL
from evomesh.models.olmo import OLMO2
from evomesh.models.phi3 import PHI3
from evomesh.models.qwen import QWEN2, QWEN3
from evomesh.models.smollm3 import SMOLLM3
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES, TensorMode
from evomesh.parallel.spec import local_shard, spec_of

_GIVEN = ("config", "grid", "mode", "device", "layer_range")


class ModelInitializer:
    """Builders by ``model_type``."""

    def __init__(self, builders: dict[str, Any]) -> None:
        self._builders = dict(builders)

    def register_module(self, name: str, builder: Any) -> None:
        """Make ``model_type=name`` build ``builder(config, *, grid, mode, device, layer_range, <custom parameters>)``.

        A builder declares only those of the five that it uses. Registering the same
        builder again changes nothing (a config file may be read more than once);
        another builder under a used name is an error.
        """
        known = self._builders.get(name)
        if known is not None and _origin(known) != _origin(builder):
            raise UserError(
                f"model type {name!r} is already registered",
                where="model_type",
                fix="choose another name for your model",
                code="EVO-MODEL-002",
            )
        self._builders[name] = builder

    def names(self) -> list[str]:
        return sorted(self._builders)

    def get_module(self, name: str) -> Any:
        if name not in self._builders:
            raise self._unknown_type(name)
        return self._builders[name]

    def _unknown_type(self, name: str) -> UserError:
        """Return the error of a type that nobody registered; of one of InternEvo's, with what to take instead."""
        expected = f"one of {', '.join(self.names())}"
        foreign = foreign_model(name)
        if foreign is not None:
            found = f"{name} is not part of evomesh: {foreign.reason}"
            fix = foreign.instead
        else:
            found = f"unknown model type {name!r}"
            near = difflib.get_close_matches(name, self._builders, n=1)
            fix = "register it with evomesh.register_model"
            if near:
                fix = f"did you mean {near[0]!r}?"
        return UserError(
            found, where="model_type", expected=expected, fix=fix, code="EVO-MODEL-001"
        )


def _origin(builder: Any) -> tuple[str, str]:
    """Return where a builder was defined: reading the same file twice makes two functions of one origin."""
    code = getattr(builder, "__code__", None)
    file = code.co_filename if code else getattr(builder, "__module__", "")
    return file, getattr(builder, "__qualname__", repr(builder))


model_initializer = ModelInitializer(
    {
        "INTERNLM": partial(Decoder, family=INTERNLM),
        "INTERNLM2_PUBLIC": partial(Decoder, family=INTERNLM2),
        "INTERNLM3": partial(Decoder, family=INTERNLM3),
        "LLAMA2": partial(Decoder, family=LLAMA),
        "QWEN2": partial(Decoder, family=QWEN2),
        "QWEN3": partial(Decoder, family=QWEN3),
        "MISTRAL": partial(Decoder, family=MISTRAL),
        "OLMO2": partial(Decoder, family=OLMO2),
        "PHI3": partial(Decoder, family=PHI3),
        "SMOLLM3": partial(Decoder, family=SMOLLM3),
        "BAICHUAN2": partial(Decoder, family=BAICHUAN2),
        "GEMMA": partial(Decoder, family=GEMMA),
        "GEMMA2": partial(Decoder, family=GEMMA),
        "GEMMA3": partial(Decoder, family=GEMMA),
    }
)


def register_model(name: str, builder: Any) -> None:
    """Make ``model_type=name`` build ``builder(config, *, grid, mode, device, layer_range, <parameters>)``.

    The same as InternEvo's ``model_initializer.register_module``.

    Args:
        builder: a function or class that returns a ``LanguageModel``. It declares those of the five parameters that
            it uses. A config sets its other parameters in the ``model`` section.
    Raises:
        UserError: ``name`` is registered for another builder.
    """
    model_initializer.register_module(name, builder)


def check_arguments(config: ModelConfig) -> None:
    """Check the config against the registered builder of ``config.model_type`` without building a model.

    Raises:
        UserError: unknown model type; unknown, missing and wrongly typed keys, all at once.
    """
    _custom_arguments(config, model_initializer.get_module(config.model_type))


def _custom_arguments(config: ModelConfig, builder: Any) -> dict[str, Any]:
    """Return ``config.extra`` after checking it against the builder's own parameters.

    Raises:
        ConfigError: all problems at once.
    """
    # 1. Keys that the builder does not name are typing errors, unless it takes any.
    parameters = inspect.signature(builder).parameters
    known = {
        key: parameter
        for key, parameter in parameters.items()
        if _is_custom(key, parameter)
    }
    problems = [] if _is_open_ended(builder) else _unknown_keys(config, list(known))

    # 2. Values are compared with the builder's annotations; a parameter without a
    #    default must be given.
    hints = _hints(builder)
    for key, parameter in known.items():
        if (
            key in config.extra
            and key in hints
            and not _fits(config.extra[key], hints[key])
        ):
            problems.append(
                UserError(
                    f"found {config.extra[key]!r}",
                    where=f"model.{key}",
                    expected=f"{inspect.formatannotation(hints[key])}, as {config.model_type!r} declares it",
                    code="EVO-MODEL-003",
                )
            )
        if parameter.default is parameter.empty and key not in config.extra:
            problems.append(
                UserError(
                    f"model type {config.model_type!r} needs {key!r}",
                    where=f"model.{key}",
                    fix=f"add {key}=... to model = dict(...)",
                    code="EVO-MODEL-003",
                )
            )
    if problems:
        raise ConfigError(problems)
    return dict(config.extra)


def _is_custom(key: str, parameter: inspect.Parameter) -> bool:
    """Return whether a builder's parameter is the model's own, set by a key of the config's ``model`` section."""
    return (
        key not in (*_GIVEN, "family") and parameter.kind is not parameter.VAR_KEYWORD
    )


def _is_open_ended(builder: Any) -> bool:
    """Return whether a builder accepts any keyword."""
    return any(
        p.kind is p.VAR_KEYWORD for p in inspect.signature(builder).parameters.values()
    )


def _unknown_keys(config: ModelConfig, known: list[str]) -> list[UserError]:
    problems = []
    for key in config.extra:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1)
        fix = f"did you mean {near[0]!r}?" if near else meant_key(f"model.{key}")
        problems.append(
            UserError(
                f"unknown key {key!r} for model type {config.model_type!r}",
                where=f"model.{key}",
                expected=f"one of {', '.join(known)}"
                if known
                else "none: this model has no custom parameters",
                fix=fix,
                code="EVO-MODEL-003",
            )
        )
    return problems


def _hints(builder: Any) -> dict[str, Any]:
    """Return the declared types of a builder's parameters; {} where they cannot be resolved."""
    plain = builder.func if isinstance(builder, partial) else builder
    try:
        return get_type_hints(plain.__init__ if inspect.isclass(plain) else plain)
    except Exception:  # a name in an annotation that exists for type checkers only
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has a type. Lists are accepted for tuples, and so are types pydantic cannot check."""
    try:
        accepts = TypeAdapter(hint, config=ConfigDict(strict=True))
    except PydanticUserError:  # a custom class
        return True
    try:
        accepts.validate_python(value)
    except ValidationError:
        try:
            accepts.validate_json(json.dumps(value))
        except (ValidationError, TypeError, ValueError):
            return False
    return True


def build_model(
    config: ModelConfig,
    *,
    grid: Grid | None = None,
    mode: TensorMode = MODES["mtp"],
    device: torch.device | str = "cpu",
    layer_range: range | None = None,
) -> LanguageModel:
    """Build the model of ``config.model_type`` with uninitialized parameters (see ``initialize_weights``).

    Args:
        layer_range: the layers of one pipeline stage, by global index; None for all.
    Raises:
        UserError: unknown model type; keys of ``config.extra`` that its builder does not declare, that it requires and
            does not get, or that have the wrong type.
    """
    grid = grid or Grid()
    builder = model_initializer.get_module(config.model_type)
    given = {"grid": grid, "mode": mode, "device": device, "layer_range": layer_range}
    parameters = inspect.signature(builder).parameters
    open_ended = _is_open_ended(builder)
    custom = _custom_arguments(config, builder)
    # A custom builder declares what it uses; the rest is not passed to it.
    used = {}
    for key, value in given.items():
        if key in parameters or open_ended:
            used[key] = value
    _check_layout(config.model_type, set(used), grid, layer_range)
    if config.dtype == "tf32":
        # torch has a process-wide switch only: float32 matrix products may use TF32 on
        # CUDA.
        torch.backends.cuda.matmul.allow_tf32 = True
    model = builder(config, **used, **custom)
    _check_methods(config.model_type, model)
    clear_padding(model, grid)
    return cast(LanguageModel, model)


def _check_methods(name: str, model: object) -> None:
    missing = [
        part
        for part in ("forward", "loss", "logits")
        if not callable(getattr(model, part, None))
    ]
    if not isinstance(model, nn.Module) or missing:
        without = f" without {', '.join(missing)}" if missing else ""
        raise UserError(
            f"the builder of model type {name!r} made a {type(model).__name__}{without}",
            where="model_type",
            expected="an nn.Module with forward, loss and logits as in evomesh.models.language_model.LanguageModel",
            code="EVO-MODEL-002",
        )


def _check_layout(
    name: str, used: set[str], grid: Grid, layer_range: range | None
) -> None:
    """Refuse a layout that a custom builder does not support."""
    needs = {
        "parallel.pipeline.size": {"layer_range"} if layer_range is not None else set(),
        "parallel.tensor.size": {"grid", "mode"} if grid.tp.size > 1 else set(),
        # With weight sharding the model is built on the meta device, then sharded.
        "parallel.weight.size": {"device"} if grid.wp.size > 1 else set(),
    }
    for key, wanted in needs.items():
        missing = sorted(wanted - used)
        if missing:
            raise UserError(
                f"the builder of model type {name!r} takes no {' and no '.join(missing)}",
                where=key,
                expected=f"a builder with the parameters {', '.join(sorted(wanted))}, like evomesh.models.decoder",
                fix=f"set {key}=1",
                code="EVO-MODEL-002",
            )


def initialize_weights(model: nn.Module, seed: int, grid: Grid | None = None) -> None:
    """Initialize weights as a function of (seed, global parameter name, global position), the same for every layout.

    Args:
        model: if it has no ``initial(name) -> InitialWeight``, it keeps the values its builder gave it.
        seed: ``seed`` of the config.
        grid: determines the shard of each parameter that this rank holds.
    """
    initial = getattr(model, "initial", None)
    if initial is None:
        return
    grid = grid or Grid()
    for name, parameter in model.named_parameters():
        distribution: InitialWeight = initial(name)
        shard = local_shard(parameter)
        fill_parameter(
            name, shard, spec_of(parameter), grid.shard_axes, distribution, seed
        )
    clear_padding(model, grid)


def clear_padding(model: nn.Module, grid: Grid) -> None:
    """Set the padded rows of the vocabulary to zero; no checkpoint or gradient ever writes to them.

    In uninitialized memory, a NaN would enter the gradient of the hidden states as 0 *
    NaN.
    """
    for parameter in model.parameters():
        spec = spec_of(parameter)
        if spec.padding and not parameter.is_meta:
            rows = spec.local_ranges(grid.axes)[0]
            first_padded = max(spec.stored_shape[0] - rows.start, 0)  # local row
            local_shard(parameter.detach())[first_padded:].zero_()
