"""Ranks agree before they train: the same config, code and data on every rank, or an error that names what differs."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import evomesh
from evomesh.config.reading.spellings import written_key
from evomesh.config.record import PLACES, config_to_dict
from evomesh.config.schema import Config
from evomesh.errors import UserError
from evomesh.parallel.exchange import Exchange

LONGEST_VALUE = 80  # characters of a value that a message shows

Facts = dict[str, str]  # what is compared, by name; the first that differs is reported


def config_facts(config: Config) -> Facts:
    """Return every resolved key but ``PLACES``, and the versions of the code."""
    facts: Facts = {}
    for section, values in config_to_dict(config).items():
        _flatten(values, section, facts)
    for place in PLACES:
        facts.pop(place, None)
    written = {written_key(key): value for key, value in facts.items()}
    versions = {
        "evomesh's version": evomesh.__version__,
        "evomesh's code": source_digest(),
    }
    return written | versions | {"torch's version": torch.__version__}


def data_facts(manifest: Mapping[str, Any]) -> Facts:
    """Return the fingerprint of each file of the training data, and that of all of them in order."""
    facts = {
        f"data file {file['file']}": _describe_file(file) for file in manifest["files"]
    }
    return facts | {"fingerprint of the training data": str(manifest["hash"])}


def _describe_file(file: Mapping[str, Any]) -> str:
    known = [
        f"{name} {file[name]}"
        for name in ("bytes", "documents", "tokens", "hash")
        if name in file
    ]
    return ", ".join(known)


def _flatten(value: Any, key: str, facts: Facts) -> None:
    """Add the leaves of a section to ``facts`` under their dotted keys."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            _flatten(item, f"{key}.{name}", facts)
    else:
        facts[key] = repr(value)


def source_digest() -> str:
    """Return a digest of the package's source files, which finds a node with a stale copy."""
    digest = hashlib.sha256()
    folder = Path(evomesh.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        # The zero byte keeps a name apart from what follows it.
        name = path.relative_to(folder).as_posix()
        header = f"{name}\0".encode()
        digest.update(header)
        source = path.read_bytes()
        digest.update(source)
    whole = digest.hexdigest()
    return whole[:12]


def require_agreement(exchange: Exchange, facts: Facts) -> None:
    """Compare ``facts`` over all ranks; every rank calls it.

    Raises:
        UserError: on every rank the same: the first fact that differs, with its values, ranks and hosts.
    """
    # 1. One digest from each rank: the usual case costs two small messages.
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    digests = exchange.gather(digest)
    if exchange.broadcast(digests is None or len(set(digests)) == 1):
        return

    # 2. Only where they differ are all facts sent to rank 0, which finds the first that does.
    gathered = exchange.gather({"host": socket.gethostname(), "facts": facts})
    found = exchange.broadcast(None if gathered is None else first_difference(gathered))
    raise UserError(
        found,
        where="ranks disagree",
        expected="the same config, code and data on every rank",
        fix="copy one config file, one version of evomesh and the same data to every node; look for environment "
        "variables that the config file reads",
        code="EVO-PARALLEL-011",
    )


def first_difference(ranks: list[dict[str, Any]]) -> str:
    """Return the sentence about the first fact that differs.

    Args:
        ranks: for each rank its ``host`` and its ``facts``.
    """
    names: dict[str, None] = {}  # of the facts of all ranks, in order
    for rank in ranks:
        names |= dict.fromkeys(rank["facts"])

    # Ranks with the same value are named together: "world size differs: 8 (rank 0 on a,
    # rank 1 on b), 4 (rank 2 on c)".
    for name in names:
        places: dict[str, list[str]] = {}
        for number, rank in enumerate(ranks):
            value = rank["facts"].get(name, "absent")
            place = f"rank {number} on {rank['host']}"
            places.setdefault(value, []).append(place)
        if len(places) == 1:
            continue
        values = []
        for value, where in places.items():
            values.append(f"{shorten(value)} ({_some(where)})")
        listed = ", ".join(values[:4])
        return f"{name} differs: {listed}"
    raise AssertionError("no fact differs")


def shorten(value: str) -> str:
    """Return a value as a message shows it."""
    return value if len(value) <= LONGEST_VALUE else value[: LONGEST_VALUE - 3] + "..."


def _some(places: list[str]) -> str:
    """Return the first of the ranks that share a value, and how many more there are."""
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(places[:3]) + more
