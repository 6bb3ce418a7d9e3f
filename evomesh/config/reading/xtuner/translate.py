"""``read_xtuner_source``: an XTuner config as a ``ConfigSource`` of ours."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from evomesh.config.reading.overrides import Override
from evomesh.config.reading.source import ConfigSource
from evomesh.config.reading.spellings import SECTIONS, TOP_LEVEL
from evomesh.config.reading.xtuner.data import translate_data
from evomesh.config.reading.xtuner.file import XTunerFile, run_file
from evomesh.config.reading.xtuner.inert import CREATABLE, report_unused
from evomesh.config.reading.xtuner.model import translate_model
from evomesh.config.reading.xtuner.optimizer import translate_optimizer
from evomesh.config.reading.xtuner.runtime import translate_runtime
from evomesh.config.reading.xtuner.settings import XTunerSettings
from evomesh.config.reading.xtuner.translation import Translation
from evomesh.config.schema import ModelConfig
from evomesh.errors import ConfigError, UserError

# Overrides of ours win over a translated key that means the same.
RIVALS = {
    "data.total_steps": "epochs",
    "ckpt.checkpoint_every": "checkpoint_every_epochs",
}


def read_xtuner_source(path: str, overrides: Sequence[Override] = ()) -> ConfigSource:
    """Execute and translate the XTuner config at ``path``.

    Args:
        overrides: of XTuner's names, which take part in the execution, and of our keys, which the caller applies.
    Raises:
        ConfigError: everything that cannot be translated, each with its line.
    """
    theirs = [override for override in overrides if not is_our_key(override)]
    file = _with_created(run_file(path, theirs), theirs)
    settings = XTunerSettings(file, theirs)
    _refuse_unknown(settings, theirs)
    work_dir = settings.get("work_dir") or f"./work_dirs/{Path(path).stem}"
    out = Translation(settings, str(work_dir))
    translate_model(out)
    translate_data(out)
    translate_optimizer(out)
    translate_runtime(out)
    if not settings.problems:  # a part with a problem has not asked for all of its keys
        report_unused(out)
    if settings.problems:
        raise ConfigError(settings.problems, path=path)
    for override in overrides:
        rival = RIVALS.get(override.dotted, "")
        section = out.values.get(override.keys[0], {})
        section.pop(rival, None)
    applied = [item.dotted for item in theirs if item.keys[0] in file.values]
    return ConfigSource(
        path,
        out.values,
        frozenset(applied),
        out.lines,
        file.text,
        tuple(dict.fromkeys(out.warnings)),
        tuple(out.preparation),
    )


def _refuse_unknown(settings: XTunerSettings, overrides: Sequence[Override]) -> None:
    """Record a problem for each override that names nothing of the file, with the most similar name in it."""
    names = settings.file.values
    for override in overrides:
        top = override.keys[0]
        if top in names:
            continue
        near = difflib.get_close_matches(top, [*names, *CREATABLE], n=1)
        if top == "max_iters":  # top-level in none of XTuner's configs of epochs
            near = ["data.total_steps, which counts steps of the optimizer"]
        fix = f"did you mean {near[0]}?" if near else "remove it"
        problem = UserError(
            f"unknown key {top!r}: the config has no such name",
            where=f"{override.dotted} (of the command line)",
            fix=fix,
            code="EVO-CONFIG-001",
        )
        settings.problems.append(problem)


def is_our_key(override: Override) -> bool:
    """Return whether an override names a key of ours: "data.seq_len", but not XTuner's "model.use_varlen_attn"."""
    top = override.keys[0]
    if top == "model":
        return len(override.keys) > 1 and override.keys[1] in ModelConfig.model_fields
    return top in SECTIONS or top in TOP_LEVEL


def _with_created(file: XTunerFile, overrides: Sequence[Override]) -> XTunerFile:
    """Add the names that mmengine's runner reads and only an override gives."""
    values = dict(file.values)
    for override in overrides:
        top, *rest = override.keys
        if top in values or top not in CREATABLE:
            continue
        value = override.value
        for key in reversed(rest):
            value = {key: value}
        values[top] = value
    return XTunerFile(file.path, values, file.lines, file.variables, file.text)
