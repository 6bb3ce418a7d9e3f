"""The findings of ``court.py`` as lines of text, for the log and for ``evomesh replay``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN_MICRO_BATCHES = 5
SHOWN_LAYERS = 5
CLEAR = 2.0  # times the others: a micro-batch that stands out


def describe_court(row: Mapping[str, Any]) -> list[str]:
    """Return a "court" line of ``spikes.jsonl`` as lines of text."""
    micro_batches = row["micro_batches"]
    shown = micro_batches[:SHOWN_MICRO_BATCHES]
    lines = [
        f"step {row['step']}: {len(micro_batches)} micro-batches, most suspicious first"
    ]
    for number, found in enumerate(shown):
        lines += _micro_batch_lines(found, is_first=number == 0)
    lines.append("layers, for the first of them beside the median of the others:")
    for layer in row["layers"][:SHOWN_LAYERS]:
        lines.append(_layer_line(layer))
    return lines


def _micro_batch_lines(found: Mapping[str, Any], is_first: bool) -> list[str]:
    norm = found["grad_norm"]
    words = "not computed" if norm is None else _number(norm)
    lines = [
        f"  rank {found['rank']} micro-batch {found['micro_batch']}: loss {_number(found['loss'])}, "
        f"gradient norm {words} ({_number(found['suspicion'])} times the others)"
    ]
    # Of those that are like the others, the numbers are enough.
    documents = found.get("documents", ())
    if float(found["suspicion"]) < CLEAR and not is_first:
        documents = ()
    lines += [_document_line(document) for document in documents]
    return lines


def _document_line(document: Mapping[str, Any]) -> str:
    start = document["start"]
    stop = document["stop"]
    ids = document["ids"]
    text = document.get("text", ids)
    # Only the first tokens are shown.
    more = stop - start - len(ids)
    note = f" and {more} tokens more" if more else ""
    return f"    {document['file']}:{document['row']} tokens {start}..{stop - 1}: {text!r}{note}"


def _layer_line(layer: Mapping[str, Any]) -> str:
    parts = []
    if layer["grad_norm"] is not None:
        times = _number(layer["grad_norm_ratio"])
        parts.append(f"gradient norm {_number(layer['grad_norm'])} ({times} times)")
    if layer["activation_max"] or layer["not_finite"]:
        times = _number(layer["activation_ratio"])
        parts.append(
            f"largest activation {_number(layer['activation_max'])} ({times} times)"
        )
    if layer["not_finite"]:
        parts.append(f"{layer['not_finite']} activations not finite")
    return f"  {layer['layer']}: {', '.join(parts)}"


def _number(value: float | str) -> str:
    return f"{float(value):.4g}"
