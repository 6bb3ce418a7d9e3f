"""Read from ``config.json`` what tells the newer architectures apart: the keys of ``ARCHITECTURE_KEYS``."""

from __future__ import annotations

from typing import Any

from evomesh.config.families import ARCHITECTURE_KEYS, FAMILY_FACTS, architecture_of
from evomesh.config.hugging_face_facts import HuggingFaceFacts
from evomesh.errors import UserError


def architecture_settings(
    record: dict[str, Any], where: str, facts: HuggingFaceFacts, head_dim: int
) -> dict[str, Any]:
    """Return the keys of the model section that the family fixes, and those that config.json has under our names.

    Raises:
        UserError: a setting that has no counterpart here.
    """
    _refuse_unsupported(record, where, facts)
    settings = architecture_of(facts.family)

    # What the family leaves free stands in the file; a key that the file lacks has the
    # value that ``transformers`` gives it.
    free = FAMILY_FACTS[facts.family].free
    for key in ARCHITECTURE_KEYS:
        if key not in free or key == "local_rope_base":
            continue
        default = facts.absent.get(key)
        settings[key] = _number(record, where, key, default)

    # Each meaning is written in one way: queries are divided by the root of the width of
    # a head anyway.
    if settings.get("query_pre_attn_scalar") == head_dim:
        settings["query_pre_attn_scalar"] = None
    return settings


def local_rope_base(
    record: dict[str, Any], where: str, facts: HuggingFaceFacts
) -> float | None:
    """Return the rotary base of layers with a window, None in a family that has one base for all layers.

    Newer files have settings for each kind of layer, older ones ``rope_local_base_freq``.

    Raises:
        UserError: angles of these layers that are scaled.
    """
    if "local_rope_base" not in FAMILY_FACTS[facts.family].free:
        return None
    by_kind = record.get("rope_parameters") or {}
    local = by_kind.get("sliding_attention") or {}
    kind = local.get("rope_type", "default")
    if kind != "default":
        raise UserError(
            f"rotary scaling {kind!r} of layers with a window is not supported",
            where=where,
            expected="plain angles there, rope_type 'default'",
            code="EVO-HF-010",
        )
    older = _number(record, where, "rope_local_base_freq", 10000.0)
    return _number(local, where, "rope_theta", older)


def _refuse_unsupported(
    record: dict[str, Any], where: str, facts: HuggingFaceFacts
) -> None:
    """Refuse other activations than the family's, attention in both directions, and a cap that transformers ignores."""
    default = facts.activations[0]
    activation = record.get(facts.activation_key) or default
    setting = None
    if activation not in facts.activations:
        setting = f"{facts.activation_key} {activation!r}"
    elif record.get("use_bidirectional_attention"):
        setting = "use_bidirectional_attention"
    elif record.get("attn_logit_softcapping") and facts.family == "GEMMA3":
        # Its code there reads the key and never caps a score.
        setting = "attn_logit_softcapping, which transformers ignores in this family,"
    if setting:
        raise UserError(f"{setting} is not supported", where=where, code="EVO-HF-010")


def _number(
    record: dict[str, Any], where: str, key: str, default: float | None
) -> float | None:
    """Return a number, or None where the file says null."""
    value = record.get(key, default)
    if value is None:
        return None
    # In Python true is the integer 1.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number:
        found = f"{key} is {value!r}"
        raise UserError(
            found, where=where, expected="a number or null", code="EVO-HF-011"
        )
    return float(value)
