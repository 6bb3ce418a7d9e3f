"""The origin of each resolved value."""

from __future__ import annotations

from collections.abc import Sequence

from evomesh.config.reading.draft import ConfigDraft, leaves
from evomesh.config.reading.overrides import Override
from evomesh.config.reading.source import ConfigSource
from evomesh.config.reading.source_lines import line_of
from evomesh.config.reading.spellings import written_key
from evomesh.config.schema import Config

ENVIRONMENT = "environment variable"


def origins(
    config: Config, draft: ConfigDraft, source: ConfigSource, sets: Sequence[Override]
) -> dict[str, str]:
    """Map each key, as a config file writes it, to "default", "FILE:LINE", "--set", "legacy KEY FILE:LINE" ..."""
    overridden = _overridden_keys(sets)
    in_file = {key for key, _ in leaves(source.values)}
    written_lines = in_file - overridden
    result = {}
    for resolved, _ in leaves(config.model_dump()):
        key = written_key(resolved)
        written = draft.sources.get(resolved, key)
        if _contains(overridden, written):
            origin = "--set"
        elif _contains(written_lines, written):
            origin = line_of(source.lines, written) or source.path
        else:
            origin = _default_origin(draft, resolved, written)
        is_legacy = written != key and not origin.startswith(("default", ENVIRONMENT))
        result[key] = f"legacy {written} {origin}" if is_legacy else origin
    return result


def _overridden_keys(sets: Sequence[Override]) -> set[str]:
    """Return the keys that overrides set; parallel.tensor=2 is the int form of parallel.tensor.size=2."""
    keys = set()
    for item in sets:
        keys |= {key for key, _ in leaves(item.value, item.dotted)}
    sizes = {f"{key}.size" for key in keys if key.startswith("parallel.")}
    return keys | sizes


def _default_origin(draft: ConfigDraft, resolved: str, written: str) -> str:
    if written.startswith(ENVIRONMENT):
        return written
    family = draft.families.get(resolved)
    return f"default of {family}" if family else "default"


def _contains(keys: set[str], written: str) -> bool:
    return written in keys or any(key.startswith(written + ".") for key in keys)
