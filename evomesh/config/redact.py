"""Redact secrets in everything that leaves the program: terminal, log, records, TensorBoard, answers of a server.

Secret are the values of variables that are named like secrets, the credentials and
signatures in URLs, webhooks, and texts in the form of well-known keys. ``redact_text``
hides them in any text; ``redact_setting`` knows a value's key as well;
``RedactingStream`` is a terminal without secrets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO
from urllib.parse import quote, unquote

REDACTED = "<redacted>"
SECRET_KEYS = (
    "monitor.alert.feishu_alert_address",
    "monitor.alert.light_monitor_address",
    "monitor.alert.channels.url",
)
# A value that only names the variable with the secret, such as env:SLACK_WEBHOOK_URL.
_VARIABLE_REFERENCE = re.compile(r"env:[A-Za-z_]\w*")
# Shorter values of environment variables are words like "1" and "true".
SHORTEST_SECRET = 8

_SECRET_WORDS = (
    r"secret|passw(?:or)?d|passphrase|pwd|api[_-]?key|access[_-]?key(?:[_-]?id)?|private[_-]?key|account[_-]?key|client[_-]?key"
    r"|auth[_-]?token|access[_-]?token|session[_-]?token|security[_-]?token|refresh[_-]?token|bot[_-]?token|credentials?|webhook"
)
_SECRET_NAME = re.compile(
    rf"(?:^|[_.-])(?:{_SECRET_WORDS}|token)$|_alert_address$|light_monitor_address$",
    re.I,
)
_SECRET_VARIABLE = re.compile(
    rf"(?:^|_)(?:{_SECRET_WORDS}|TOKEN|PASS|AUTH|DSN|SECRET_KEY|WEBHOOK_URL|KEY)(?:_(?:ID|VALUE|JSON|BASE64|\d+))?$",
    re.I,
)
# PWD and OLDPWD are folders.
_NO_SECRET_VARIABLES = ("PWD", "OLDPWD", "GPG_KEY")

# Each is replaced by its first group and the mark. Repetitions are bounded, so that no
# text takes long.
_PATTERNS = (
    # user:password@ of a URL; the password may contain @ and /. Paths merge the two
    # slashes.
    re.compile(r"(:/{1,2})[^/\s\"'<>]{1,400}(?=@)"),
    re.compile(r"(:/{1,2})[^/\s:@\"']{1,200}:(?!\d+/)[^\s@\"']{1,400}(?=@)"),
    # what follows the address of a webhook
    re.compile(
        r"(https?:/{1,2}[^\s\"'<>]{0,200}?/(?:hook|webhook|webhooks|webhookb2)/)[^\s?\"'<>]+",
        re.I,
    ),
    re.compile(r"(https?:/{1,2}hooks\.[\w.]{1,60}/)[^\s\"'<>]+", re.I),
    # signatures, keys and tokens in the query of a URL
    re.compile(
        r"([?&;][\w.-]{0,40}?(?:key|token|secret|passw|pwd|sig|credential|auth|sas)[\w.-]{0,40}=)[^&\s\"'<>]+",
        re.I,
    ),
    # name = "value", as in a config file, and "name": "value"
    re.compile(
        rf"((?<![a-z])(?:{_SECRET_WORDS}|token|feishu_alert_address|light_monitor_address)"
        r"[\"']?\]?\s{0,9}[=:]\s{0,9}[\"'])[^\"'\n]+",
        re.I,
    ),
    # name=value, as in arguments and messages
    re.compile(
        rf"((?<![a-z])(?:{_SECRET_WORDS})\s?=\s?)(?![\"'\s<])[^\s&,;)\"']+", re.I
    ),
    # HTTP headers
    re.compile(r"(authorization\W{1,9}(?:bearer|basic|token)\s)[\w.~+/=-]+", re.I),
    re.compile(r"(\bbearer\s)[\w.~+/=-]{16,}", re.I),
    # keys of well-known services, by their form
    re.compile(r"\b()(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    re.compile(
        r"\b()(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abprs]-|npm_|pypi-)[\w-]{20,}"
    ),
    re.compile(r"\b()AIza[\w-]{30,}"),
    re.compile(r"\b()eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"),
    re.compile(r"(-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----)[^-]*"),
)


def redact_text(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Hide secrets in any text: values of secret variables, and whatever has the form of a secret."""
    return _hide(text, secret_values(environment))


def _hide(text: str, secrets: Sequence[str]) -> str:
    for value in secrets:
        text = text.replace(value, REDACTED)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\1{REDACTED}", text)
    return text


def redact_setting(key: str, text: str, secrets: Sequence[str]) -> str:
    """Hide a config value that is secret as a whole by its key; in any other, what ``redact_text`` hides.

    Args:
        key: dotted key of the resolved config.
        secrets: ``secret_values``, found once for all settings of a config.
    """
    if _VARIABLE_REFERENCE.fullmatch(text):
        return text
    return REDACTED if holds_secrets(key) and text else _hide(text, secrets)


def holds_secrets(key: str) -> bool:
    """Return whether the value of a config key, or a part of it, is a secret by the key's name."""
    below = f"{key}."
    if any(secret == key or secret.startswith(below) for secret in SECRET_KEYS):
        return True
    return _SECRET_NAME.search(key) is not None


def secret_values(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the values to hide, in each of the forms in which they may be written, the longest first."""
    values: set[str] = set()
    for name, value in environment.items():
        for secret in _secrets_of_variable(name, value):
            if len(secret) >= SHORTEST_SECRET:
                values |= {secret, quote(secret, safe=""), repr(secret)[1:-1]}
    # A secret may be a part of a longer one.
    return sorted(values, key=len, reverse=True)


def _secrets_of_variable(name: str, value: str) -> Iterator[str]:
    if name not in _NO_SECRET_VARIABLES and _SECRET_VARIABLE.search(name):
        yield value
        yield from value.splitlines()
    # The address of a proxy or a database may contain a password.
    found = re.search(r"://[^/\s:@]*:([^\s]+)@", value)
    if found is not None:
        yield found[1]
        yield unquote(found[1])


class RedactingStream:
    """A text stream that hides secrets in what is written to it; in everything else it is the stream that it wraps."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact_text(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
