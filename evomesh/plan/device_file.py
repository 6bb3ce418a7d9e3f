"""Writing of device files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomesh.plan.device import Device


def device_text(device: Device, comment: str) -> str:
    """Return a device as TOML, with a first line of comment."""
    facts = device.model_dump(exclude_none=True)
    lists = ("operators", "messages")
    lines = [f"# {comment}"]
    sections = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            sections[key] = value
        elif key not in lists:
            lines.append(_line(key, value))
    for name, table in sections.items():
        lines += ["", f"[{name}]", *_lines(table)]
    for name in lists:
        for table in facts[name]:
            lines += ["", f"[[{name}]]", *_lines(table)]
    return "\n".join(lines) + "\n"


def write_device(device: Device, path: Path, comment: str) -> None:
    """Write a device file."""
    path.write_text(device_text(device, comment), encoding="utf-8")


def _lines(table: Mapping[str, Any]) -> list[str]:
    # What names a table comes before its numbers.
    in_order = sorted(table.items(), key=lambda item: not isinstance(item[1], str))
    return [_line(key, value) for key, value in in_order]


def _line(key: str, value: Any) -> str:
    if isinstance(value, tuple | list):
        numbers = ", ".join(map(_number, value))
        return f"{key} = [{numbers}]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'{key} = "{escaped}"'
    return f"{key} = {_number(value)}"


def _number(value: float) -> str:
    if float(value).is_integer():
        return str(int(value))
    return repr(value)
