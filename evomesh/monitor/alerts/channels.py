"""``AlertChannel``, and the channels that a config asks for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from evomesh.config.alert import (
    CHANNELS,
    ENVIRONMENT_PREFIX,
    AlertConfig,
    address_problem,
)
from evomesh.config.redact import REDACTED
from evomesh.config.user import expand_home
from evomesh.errors import UserError
from evomesh.monitor.alerts.alert import Alert
from evomesh.monitor.alerts.chat import (
    DingTalkChannel,
    FeishuChannel,
    SlackChannel,
    WebhookChannel,
    WeComChannel,
)
from evomesh.monitor.alerts.files import (
    ALERTS_FILE,
    JsonLinesChannel,
    TextFileChannel,
)
from evomesh.monitor.alerts.mail import EmailChannel


class AlertChannel(Protocol):
    """A way to a person. A custom one is named in the config: ``type="module:callable"``.

    The callable gets the other options of the channel as keywords, with the values of
    environment variables in place of ``env:NAME``, and returns the channel.
    """

    def send(self, alert: Alert) -> None:
        """Deliver an alert within a few seconds; runs on a thread.

        Raises:
            OSError, DeliveryError: it did not arrive. It is tried again.
        """


_CHANNELS: Mapping[str, Callable[..., AlertChannel]] = {
    "webhook": WebhookChannel,
    "slack": SlackChannel,
    "feishu": FeishuChannel,
    "dingtalk": DingTalkChannel,
    "wecom": WeComChannel,
    "email": EmailChannel,
}


def build_channels(
    config: AlertConfig,
    environment: Mapping[str, str],
    on_error: Callable[[UserError], object] | None = None,
) -> dict[str, AlertChannel]:
    """Return name -> channel of everything that a config names.

    Args:
        on_error: gets the error of a channel that cannot be made, which is then left out.

    Raises:
        UserError: without ``on_error``: a variable that is not set, or a custom channel
            that cannot be made.
    """
    channels: dict[str, AlertChannel] = {}
    for name, options in _named_options(config):
        try:
            channels[name] = build_channel(name, options, environment)
        except UserError as error:
            if on_error is None:
                raise
            on_error(error)
    if config.alert_file_path is not None and config.sends:
        path = expand_home(config.alert_file_path)
        channels["monitor.alert.alert_file_path"] = TextFileChannel(path)
    return channels


def _named_options(config: AlertConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield name and options of each channel; InternEvo's keys describe one of Feishu."""
    if config.enable_feishu_alert:
        options = {"type": "feishu", "url": config.feishu_alert_address}
        yield "monitor.alert.feishu_alert_address", options
    for index, channel in enumerate(config.channels):
        yield f"{CHANNELS}[{index}] ({channel['type']})", channel


def build_channel(
    name: str, options: Mapping[str, Any], environment: Mapping[str, str]
) -> AlertChannel:
    """Return the channel of one entry of ``monitor.alert.channels``."""
    settings = {}
    for option, value in options.items():
        if option == "url" and isinstance(value, str):
            settings[option] = address_of(f"{name}: url", value, environment)
        elif option != "type":
            settings[option] = _resolved(f"{name}: {option}", value, environment)
    kind = options["type"]
    if kind in _CHANNELS:
        return _CHANNELS[kind](**settings)
    return _custom_channel(name, kind, settings)


def file_of_run(folder: Path) -> AlertChannel:
    """Return the channel to ``alerts.jsonl`` of a run folder."""
    return JsonLinesChannel(folder / ALERTS_FILE)


def address_of(key: str, text: str, environment: Mapping[str, str]) -> str:
    """Return a URL, read from the environment if the config names a variable.

    Raises:
        UserError: the variable is not set, or what it contains is not a URL.
    """
    address = str(_resolved(key, text, environment))
    problem = address_problem(address)
    if problem is None:
        return address
    raise UserError(
        f"the address in {text} {problem}",
        where=key,
        expected="https://HOST/PATH",
        code="EVO-ALERT-001",
    )


def _resolved(key: str, value: Any, environment: Mapping[str, str]) -> Any:
    if not isinstance(value, str):
        return value
    if value == REDACTED:
        raise UserError(
            "the recorded config does not contain this secret",
            where=key,
            expected="env:NAME in the config, and the variable in this process's environment",
            code="EVO-ALERT-001",
        )
    if not value.startswith(ENVIRONMENT_PREFIX):
        return value
    name = value.removeprefix(ENVIRONMENT_PREFIX)
    if not environment.get(name):
        raise UserError(
            f"the environment variable {name} is not set",
            where=key,
            fix=f"export {name}=..., in the environment of every rank",
            code="EVO-ALERT-001",
        )
    return environment[name]


def _custom_channel(name: str, kind: str, settings: Mapping[str, Any]) -> AlertChannel:
    module_name, _, attribute = kind.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        channel = factory(**settings)
    except Exception as error:
        reason = type(error).__name__
        if isinstance(error, ImportError | AttributeError):
            reason = str(error)
        raise UserError(
            f"the channel cannot be made: {reason}",
            where=name,
            expected="module:callable that can be imported and takes the other options as keywords",
            code="EVO-ALERT-001",
        ) from None
    if not callable(getattr(channel, "send", None)):
        raise UserError(
            f"{kind} returned a {type(channel).__name__} without a method send",
            where=name,
            expected="an object with send(alert)",
            code="EVO-ALERT-001",
        )
    result: AlertChannel = channel
    return result
