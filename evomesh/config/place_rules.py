"""Rules of names and places: what no file system and no store can hold, found before a run starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from evomesh.config.finding import ConfigFinding
from evomesh.config.reading.draft import leaves
from evomesh.config.schema import CheckpointConfig, Config
from evomesh.config.storage_urls import check_url
from evomesh.errors import UserError

NAME_BYTES = 255  # of one name in a path, on every file system in use
# Halves of characters that no encoding has. Those from DC80 to DCFF stand for bytes of a
# file name that is not UTF-8, and open it.
HALF_CHARACTER = re.compile("[\ud800-\udc7f\udd00-\udfff]")
# Prompts are texts of a user's choice; everything else names something.
FREE_TEXT = ("data.samples.prompts",)


def place_findings(config: Config) -> Iterator[ConfigFinding]:
    """Yield names and places that cannot exist."""
    yield from _text_findings(config)
    yield from _job_name_findings(config.run.job_name)
    yield from _url_findings(config.ckpt)


def _text_findings(config: Config) -> Iterator[ConfigFinding]:
    for key, value in leaves(config.model_dump()):
        for text in _texts(value):
            half = HALF_CHARACTER.search(text)
            has_nul = "\0" in text and key not in FREE_TEXT
            if half or has_nul:
                found = f"half of a character, U+{ord(half[0]):04X}" if half else "NUL"
                yield ConfigFinding(
                    (key,),
                    f"{text!a} contains {found}",
                    expected="text that can be written to a file and name one",
                    code="EVO-CONFIG-002",
                )
                break


def _texts(value: Any) -> Iterator[str]:
    """Yield the text that a value is, or that it lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _job_name_findings(name: str) -> Iterator[ConfigFinding]:
    """Yield why the name of a run cannot be that of its folder."""
    length = len(name.encode("utf-8", "surrogatepass"))
    if not name or name.startswith(".") or re.search(r"[/\\\x01-\x1f:]", name):
        yield ConfigFinding(
            ("run.job_name",),
            f"found {name!r}, which cannot name a folder",
            expected="no / \\ : and no dot in front",
            code="EVO-CONFIG-002",
        )
    elif length > NAME_BYTES:
        yield ConfigFinding(
            ("run.job_name",),
            f"{name[:20]!r}... has {length} bytes, too many for the name of a folder",
            expected=f"at most {NAME_BYTES} bytes in UTF-8",
            code="EVO-CONFIG-002",
        )


def _url_findings(ckpt: CheckpointConfig) -> Iterator[ConfigFinding]:
    """Yield what is wrong with the URLs of checkpoints that a run opens."""
    urls = {
        "ckpt.save_ckpt_folder": ckpt.save_ckpt_folder,
        "ckpt.snapshot_ckpt_folder": ckpt.snapshot_ckpt_folder,
    }
    info = ckpt.load_ckpt_info
    # A path that auto_resume leaves unread may be of any form, as in InternEvo.
    if info is not None and (info.fallback or not ckpt.auto_resume):
        urls["ckpt.load_ckpt_info.path"] = info.path
    for key, url in urls.items():
        try:
            if url:
                check_url(url)
        except UserError as error:
            yield ConfigFinding(
                (key,),
                error.found,
                expected=error.expected,
                fix=error.fix,
                code=error.code,
            )
