"""Where each resolved value came from."""

from __future__ import annotations

from collections.abc import Sequence

from evomesh.config.reading.draft import ConfigDraft
from evomesh.config.reading.overrides import Override
from evomesh.config.reading.source import ConfigSource
from evomesh.config.reading.source_lines import line_of
from evomesh.config.reading.spellings import written_key
from evomesh.config.rules import leaves
from evomesh.config.schema import Config

ENVIRONMENT = "environment variable"


def origins(
    config: Config, draft: ConfigDraft, source: ConfigSource, sets: Sequence[Override]
) -> dict[str, str]:
    """Key, as a config file writes it -> "default", "FILE:LINE", "--set", "legacy KEY FILE:LINE" and the like."""
    overridden = {key for item in sets for key, _ in leaves(item.value, item.dotted)}
    overridden |= {f"{key}.size" for key in overridden if key.startswith("parallel.")}  # its int form
    said = {key for key, _ in leaves(source.values)} - overridden
    out = {}
    for resolved, _ in leaves(config.model_dump()):
        key = written_key(resolved)
        written = draft.sources.get(resolved, key)
        if _says(overridden, written):
            origin = "--set"
        elif _says(said, written):
            origin = line_of(source.lines, written) or source.path
        elif written.startswith(ENVIRONMENT):
            origin = written
        else:
            family = draft.families.get(resolved)
            origin = f"default of {family}" if family else "default"
        derived = written != key and not origin.startswith(("default", ENVIRONMENT))
        out[key] = f"legacy {written} {origin}" if derived else origin
    return out


def _says(keys: set[str], written: str) -> bool:
    return written in keys or any(key.startswith(written + ".") for key in keys)
