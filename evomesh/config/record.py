"""A resolved config as JSON: for checkpoints and logs, without what is secret."""

from __future__ import annotations

import math
import re
from typing import Any

from pydantic import ValidationError

from evomesh.config.schema import Config
from evomesh.errors import UserError

HIDDEN = "<redacted>"
SECRETS = ("monitor.alert.feishu_alert_address", "monitor.alert.light_monitor_address")
INFINITE = {"inf": math.inf, "-inf": -math.inf}


def redacted(config: Config) -> dict[str, Any]:
    """The config as strict JSON: infinity as ``{"$float": "inf"}``, tuples as lists, secrets hidden."""
    out = _encode(config.model_dump(mode="python"), "")
    assert isinstance(out, dict)
    return out


def config_from_dict(record: dict[str, Any]) -> Config:
    """The config that ``redacted`` wrote; what was hidden stays hidden.

    Raises:
        UserError: not such a record, or one of a version with other keys.
    """
    values = _decode(record)
    values.setdefault("generation", None)
    try:
        return Config.model_validate(values, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"the stored config does not fit: {first['msg']}",
            where=".".join(str(part) for part in first["loc"]),
            expected="a config that this version knows",
            fix="use the version of evomesh that wrote it",
        ) from None


def _encode(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _encode(item, f"{key}.{name}" if key else name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item, key) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return {"$float": str(value)}
    if isinstance(value, str):
        return HIDDEN if key in SECRETS and value else _without_credentials(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value)  # a parameter of a user's own model that JSON has no word for


def _without_credentials(text: str) -> str:
    """``scheme://user:password@host`` and query strings that carry keys."""
    text = re.sub(r"(?<=://)[^/@\s]+@", f"{HIDDEN}@", text)
    return re.sub(
        r"(?i)((?:key|token|secret|password|signature|credential)[\w-]*=)[^&\s]+", rf"\1{HIDDEN}", text
    )


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"$float"}:
            return INFINITE[value["$float"]]
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value
