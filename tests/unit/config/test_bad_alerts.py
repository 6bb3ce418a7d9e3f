"""Receivers of alerts that cannot be used: one message each, without the address."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.config.alert import AlertConfig, address_problem
from evomesh.config.loader import load_config
from evomesh.config.record import config_from_dict, config_to_dict
from evomesh.config.redact import REDACTED
from evomesh.errors import ConfigError

BASE = 'data = dict(train_folder="x")\nmodel = dict(dtype="torch.float32")\n'
SECRET = "T0pSecret"
MAIL = "type='email', server='h:25', sender='a@b.c', to='d@e.f'"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.py"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("enable_feishu_alert=True", ["feishu_alert_address", "no address to send"]),
        (f"light_monitor_address='host/{SECRET}'", ["light_monitor", "http://"]),
        (f"light_monitor_address='ftp://h/{SECRET}'", ["http:// or https://"]),
        (f"channels=[dict(type='slack', url='{SECRET}')]", ["channel 0 (slack)", "is not a URL"]),
        ("channels=[dict(type='slak', url='http://h')]", ["'slak'", "did you mean 'slack'?", "wecom"]),
        ("channels=[dict(url='http://h')]", ["channel 0 has no type", "webhook"]),
        ("channels=[dict(type='slack')]", ["channel 0 (slack) has no url"]),
        ("channels=[dict(type='slack', url='http://h', x=1)]", ["unknown option 'x'"]),
        (f"channels=[dict({MAIL}, security='ssl')]", ["security is not one of starttls"]),
        ("channels=[dict(type='email', server='h', sender='a', to='d@e.f')]", ["sender is not a mail"]),
        ("channels=[dict(type='email', server='h', sender='a@b.c', to=[])]", ["to is not a mail"]),
        ("channels=[dict(type='slack', url='env:1X')]", ["does not name an environment"]),
        (f"channels='http://h/{SECRET}'", ["found a value of type str"]),
        (f"channels=['http://h/{SECRET}']", ["found a value of type str"]),
        ("min_interval=-1.0", ["min_interval", "found -1.0", ">= 0"]),
        ("loss_spike_ratio=1.0", ["loss_spike_ratio", "> 1"]),
        ("chanels=[]", ["did you mean monitor.alert.channels?"]),
    ],
)  # fmt: skip
def test_a_bad_receiver_is_one_message(
    setting: str, parts: list[str], base: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(str(base), [f"monitor.alert.{setting}"])
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == 1
    message = str(caught.value)
    assert [part for part in parts if part not in message] == []
    assert SECRET not in message


@pytest.mark.parametrize(
    "address",
    ["http://h", "https://h.example:8080/a?b=c#d", "http://[::1]:80/x", "env:MY_HOOK"],
)
def test_addresses_that_may_be_used(address: str) -> None:
    assert address_problem(address) is None


@pytest.mark.parametrize(
    "address",
    ["", "h", "//h/x", "http://", "http:///x", "http://h:99999/", "http://h:0/", "http://h:x/", "http://[::1/",
     "http://h/a b", "http://h/\n", "http://h/ü", "env:", "file:///etc/passwd"],
)  # fmt: skip
def test_addresses_that_may_not(address: str) -> None:
    assert address_problem(address) is not None


def test_the_record_has_names_of_variables_and_no_secrets(base: Path) -> None:
    channels = (
        f"[dict(type='webhook', url='http://h/{SECRET}'), dict(type='slack', url='env:HOOK'), "
        f"dict({MAIL}, user='u', password='{SECRET}')]"
    )
    config = load_config(str(base), [f"monitor.alert.channels={channels}"]).config
    record = config_to_dict(config)
    assert SECRET not in str(record)
    hidden, named, mail = config_from_dict(record).monitor.alert.channels
    assert hidden["url"] == REDACTED
    assert named["url"] == "env:HOOK"
    assert (mail["to"], mail["password"]) == ("d@e.f", REDACTED)
    assert config.monitor.alert.secrets.count(f"http://h/{SECRET}") == 1


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"alert_file_path": "x"}, 1),
        ({"feishu_alert_address": "http://h"}, 1),
        ({"alert_file_path": "x", "channels": ({"type": "a:b"},)}, 0),
    ],
)
def test_what_has_no_effect_is_a_warning(
    settings: dict[str, object], count: int, base: Path
) -> None:
    AlertConfig.model_validate(settings)
    sets = [f"monitor.alert.{name}={value!r}" for name, value in settings.items()]
    warnings = load_config(str(base), sets).warnings
    assert len([one for one in warnings if "no effect" in one]) == count
