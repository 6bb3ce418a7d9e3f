"""``monitor``: where alerts and heartbeats go, and when an alert is raised.

An address or a password is a secret. It may be written as ``"env:NAME"``: then it is read
from that environment variable where it is needed, and the recorded config keeps the
name, from which a watcher beside the run finds it again.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field

from evomesh.config.finding import ConfigFinding
from evomesh.config.section import Section
from evomesh.config.watchdog import WatchdogConfig

ENVIRONMENT_PREFIX = "env:"
CHANNELS = "monitor.alert.channels"
# Options of a channel that are not secrets; those of a custom channel may be.
PUBLIC_OPTIONS = ("type", "server", "sender", "to", "user", "security")

_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_CUSTOM_TYPE = re.compile(r"[\w.]+:[A-Za-z_]\w*")  # module:callable
_MAIL_ADDRESS = re.compile(r"[^\s@<>,;]+@[^\s@<>,;]+")
# Options with a form: the pattern, and what is wrong with a value of another form.
_OPTION_FORMS = {
    "sender": (_MAIL_ADDRESS, "is not a mail address"),
    "server": (re.compile(r"[\w.-]+(:\d{1,5})?"), "is not HOST or HOST:PORT"),
    "security": (
        re.compile("starttls|tls|none"),
        "is not one of starttls, tls, none",
    ),
}


class AlertConfig(Section):
    enable_feishu_alert: bool = Field(
        False, description="Send alerts to feishu_alert_address."
    )
    feishu_alert_address: str | None = Field(
        None,
        description="Feishu webhook, or env:NAME; never written to a log or checkpoint.",
    )
    light_monitor_address: str | None = Field(
        None,
        description="URL, or env:NAME, that gets the figures of a step as JSON: a heartbeat.",
    )
    alert_file_path: str | None = Field(
        None, description="Text file to which each alert that is sent is added."
    )
    channels: tuple[dict[str, Any], ...] = Field(
        (),
        description="More receivers, such as dict(type='slack', url='env:SLACK_WEBHOOK_URL').",
    )
    min_interval: float = Field(
        600.0,
        ge=0,
        description="Seconds until an alert of the same kind is sent again; others are counted.",
    )
    loss_spike_ratio: float = Field(
        1.5,
        gt=1,
        description="A loss above this many times its running mean is a spike.",
    )
    min_free_gb: float = Field(
        2.0,
        ge=0,
        description="A disk with less free space than this, or than two checkpoints, is nearly full.",
    )

    @property
    def secrets(self) -> list[str]:
        """The addresses, passwords and other texts of channels that are written into the config itself."""
        texts = [self.feishu_alert_address, self.light_monitor_address]
        for channel in self.channels:
            for option, value in channel.items():
                if option not in PUBLIC_OPTIONS and isinstance(value, str):
                    texts.append(value)
        return [
            text for text in texts if text and not text.startswith(ENVIRONMENT_PREFIX)
        ]

    @property
    def sends(self) -> bool:
        """Return whether alerts have a receiver outside the run folder."""
        return self.enable_feishu_alert or bool(self.channels)


class MonitorConfig(Section):
    alert: AlertConfig = Field(AlertConfig(), description="Alerts and heartbeats.")
    trackers: tuple[dict[str, Any], ...] = Field(
        (),
        description="Where the figures are sent too, such as dict(type='wandb', project='x').",
    )
    watchdog: WatchdogConfig = Field(
        WatchdogConfig(), description="What finds a rank that is stuck."
    )


@dataclass(frozen=True)
class ChannelOptions:
    """The options of one type of channel, beside ``type``."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


CHANNEL_TYPES = {
    "webhook": ChannelOptions(("url",)),
    "slack": ChannelOptions(("url",)),
    "feishu": ChannelOptions(("url",), ("secret",)),
    "dingtalk": ChannelOptions(("url",), ("secret",)),
    "wecom": ChannelOptions(("url",)),
    "email": ChannelOptions(
        ("server", "sender", "to"), ("user", "password", "security")
    ),
}


def address_problem(address: str) -> str | None:
    """Return what is wrong with the URL of a webhook, None if nothing is.

    The sentence does not repeat the URL, which is a secret.
    """
    if address.startswith(ENVIRONMENT_PREFIX):
        return _variable_problem(address)
    if any(char.isspace() or not char.isprintable() for char in address):
        return "is not a URL: it contains a space or a control character"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return "is not a URL: its host or port cannot be read"
    if parts.scheme not in ("http", "https"):
        return "is not a URL: it does not begin with http:// or https://"
    if not parts.hostname or port == 0:
        return "is not a URL: it names no host"
    if not address.isascii():
        return "is not a URL: it contains characters outside ASCII"
    return None


def _variable_problem(text: str) -> str | None:
    name = text.removeprefix(ENVIRONMENT_PREFIX)
    if _VARIABLE.fullmatch(name):
        return None
    return "does not name an environment variable after env:"


def alert_findings(alert: AlertConfig) -> Iterator[ConfigFinding]:
    """Yield the receivers of alerts and heartbeats that cannot be used."""
    if alert.enable_feishu_alert and alert.feishu_alert_address is None:
        yield ConfigFinding(
            ("monitor.alert.feishu_alert_address", "monitor.alert.enable_feishu_alert"),
            "alerts are enabled, and there is no address to send them to",
            expected="the URL of a Feishu webhook, or env:NAME",
            fix="set monitor.alert.feishu_alert_address, or enable_feishu_alert=False",
            code="EVO-ALERT-001",
        )
    for name in ("feishu_alert_address", "light_monitor_address"):
        address = getattr(alert, name)
        problem = None if address is None else address_problem(address)
        if problem is not None:
            yield ConfigFinding(
                (f"monitor.alert.{name}",),
                f"the address {problem}",
                expected="https://HOST/PATH, or env:NAME",
                code="EVO-ALERT-001",
            )
    for index, channel in enumerate(alert.channels):
        yield from _channel_findings(f"channel {index}", channel)


def _channel_findings(name: str, channel: Mapping[str, Any]) -> Iterator[ConfigFinding]:
    kind = channel.get("type")
    known = ", ".join(CHANNEL_TYPES)
    if not isinstance(kind, str):
        yield ConfigFinding(
            (CHANNELS,),
            f"{name} has no type",
            expected=f"type=..., one of {known}, or module:callable of your code",
            code="EVO-ALERT-001",
        )
        return
    if _CUSTOM_TYPE.fullmatch(kind):
        return  # its options are its own matter; see ``build_channel``
    if kind not in CHANNEL_TYPES:
        similar = difflib.get_close_matches(kind, CHANNEL_TYPES, n=1)
        yield ConfigFinding(
            (CHANNELS,),
            f"{name} has the unknown type {kind!r}",
            expected=f"one of {known}, or module:callable of your code",
            fix=f"did you mean {similar[0]!r}?" if similar else "",
            code="EVO-ALERT-001",
        )
        return
    yield from _option_findings(f"{name} ({kind})", CHANNEL_TYPES[kind], channel)


def _option_findings(
    name: str, options: ChannelOptions, channel: Mapping[str, Any]
) -> Iterator[ConfigFinding]:
    allowed = (*options.required, *options.optional)
    listed = ", ".join(allowed)
    for option in options.required:
        if option not in channel:
            yield ConfigFinding(
                (CHANNELS,),
                f"{name} has no {option}",
                expected=f"options {listed}",
                code="EVO-ALERT-001",
            )
    for option, value in channel.items():
        if option == "type":
            continue
        if option not in allowed:
            yield ConfigFinding(
                (CHANNELS,),
                f"{name} has the unknown option {option!r}",
                expected=f"options {listed}",
                code="EVO-ALERT-001",
            )
            continue
        problem = _option_problem(option, value)
        if problem is not None:
            yield ConfigFinding(
                (CHANNELS,), f"{name}: its {option} {problem}", code="EVO-ALERT-001"
            )


def _option_problem(option: str, value: Any) -> str | None:
    """Return what is wrong with the value of an option, which may be a secret and is not repeated."""
    if option == "to":
        return _receivers_problem(value)
    if not isinstance(value, str) or not value:
        return "is not a text in quotes"
    if value.startswith(ENVIRONMENT_PREFIX):
        return _variable_problem(value)
    if option == "url":
        return address_problem(value)
    if option in _OPTION_FORMS:
        form, words = _OPTION_FORMS[option]
        return None if form.fullmatch(value) else words
    return None


def _receivers_problem(value: Any) -> str | None:
    addresses = [value] if isinstance(value, str) else value
    is_list = isinstance(addresses, list | tuple) and len(addresses) > 0
    if is_list and all(_is_mail_address(address) for address in addresses):
        return None
    return "is not a mail address or a list of them"


def _is_mail_address(value: Any) -> bool:
    return isinstance(value, str) and _MAIL_ADDRESS.fullmatch(value) is not None


def alert_warnings(alert: AlertConfig) -> Iterator[tuple[str, str]]:
    """Yield the keys that do nothing, with the reason."""
    if alert.feishu_alert_address is not None and not alert.enable_feishu_alert:
        yield (
            "monitor.alert.feishu_alert_address",
            "has no effect while monitor.alert.enable_feishu_alert is False",
        )
    if alert.alert_file_path is not None and not alert.sends:
        yield (
            "monitor.alert.alert_file_path",
            "has no effect while monitor.alert.enable_feishu_alert is False and there are no channels; the run "
            "folder's alerts.jsonl has every alert",
        )
