"""Wrong keys are limited per client and in all; a right key gets through again, and memory stays bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from evomesh.models.language_model import LanguageModel
from evomesh.serve import key_gate
from evomesh.serve.key_gate import KeyGate
from evomesh.serve.requests import ApiError
from evomesh.serve.service import ServiceLimits
from tests.support.serving import serving, tiny_service

KEY = "s3cret"


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Door:
    """A gate that keys are tried at; ``statuses`` are 200, 401 or 429."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.gate = KeyGate(KEY, self.clock)

    def status(self, key: str, client: str = "10.0.0.1") -> int:
        headers = [(b"authorization", f"Bearer {key}".encode())]
        scope: dict[str, Any] = {
            "type": "http",
            "headers": headers,
            "client": (client, 1),
        }
        try:
            self.gate.check(scope)
        except ApiError as error:
            assert (error.headers or {}).keys() == {
                "WWW-Authenticate" if error.status == 401 else "Retry-After"
            }
            return error.status
        return 200

    def guess(self, count: int, client: str = "10.0.0.1") -> list[int]:
        return [
            self.status(f"guess {self.clock.now} {number}", client)
            for number in range(count)
        ]


@pytest.fixture
def door() -> Door:
    return Door()


def test_a_client_has_few_tries_and_gets_them_back(door: Door) -> None:
    assert door.guess(12) == [401] * 10 + [429] * 2
    # Or the answer would still say whether a guess is right.
    assert door.status(KEY) == 429
    assert door.status(KEY, "10.0.0.2") == 200
    door.clock.now += 5.9
    assert door.status(KEY) == 429
    door.clock.now += 0.2  # refused requests have not made the wait longer
    assert door.status(KEY) == 200
    assert door.guess(2) == [401, 429]
    door.clock.now += 3600
    assert door.guess(11) == [401] * 10 + [429]


def test_a_right_key_takes_no_try(door: Door) -> None:
    assert [door.status(KEY) for _ in range(1000)] == [200] * 1000
    assert door.guess(11) == [401] * 10 + [429]


def test_one_wrong_key_again_and_again_takes_one_try(door: Door) -> None:
    assert [door.status("old key") for _ in range(500)] == [401] * 500
    assert door.status(KEY) == 200
    assert door.guess(10) == [401] * 9 + [429]


def test_all_clients_together_have_a_limit(door: Door) -> None:
    assert door.status(KEY, "10.9.9.9") == 200
    for network in range(10):
        assert door.guess(10, f"10.1.{network}.1") == [401] * 10
    assert door.guess(1, "10.1.99.1") == [429]
    assert door.status(KEY, "10.9.9.9") == 200  # has given the right key before
    assert door.guess(11, "10.9.9.9") == [401] * 10 + [429]
    assert door.status(KEY, "10.9.9.8") == 429
    door.clock.now += 11.0  # the ten of 10.9.9.9 are made up for
    assert door.status(KEY, "10.9.9.8") == 200


@pytest.mark.parametrize(
    ("clients", "expected"),
    [
        (["2001:db8:0:1::1", "2001:db8:0:1:ffff::2"], 429),  # one network
        (["2001:db8:0:1::1", "2001:db8:0:2::1"], 401),
        (["::ffff:10.0.0.1", "10.0.0.1"], 429),  # one address in two notations
        (["::ffff:10.0.0.1", "::ffff:10.0.0.2"], 401),
    ],
)
def test_addresses_of_one_client_share_their_tries(
    door: Door, clients: list[str], expected: int
) -> None:
    first, second = clients
    assert door.guess(10, first) == [401] * 10
    assert door.guess(1, second) == [expected]


def test_memory_is_bounded(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_gate, "MAX_CLIENTS", 50)
    assert door.guess(10, "10.0.0.1")
    for number in range(49):
        door.guess(1, f"10.2.0.{number}")
    assert door.guess(1, "10.0.0.1") == [429]
    for number in range(200):
        door.guess(1, f"10.3.0.{number}")
    assert len(door.gate._clients) == 50


def test_api_and_page_share_the_limit(model: LanguageModel, tmp_path: Path) -> None:
    page = pytest.importorskip("evomesh.serve.page")
    service = tiny_service(tmp_path, model, ServiceLimits(64))
    extended = serving(
        service, key=KEY, extend=lambda app: page.mount_page(app, service, KEY)
    )
    with (
        extended as served,
        httpx.Client(base_url=served.url, timeout=60, verify=False) as client,
    ):

        def log_in(key: str) -> int:
            return client.post(
                "/login", data={"username": "evomesh", "password": key}
            ).status_code

        def list_models(key: str) -> int:
            return client.get(
                "/v1/models", headers={"authorization": f"Bearer {key}"}
            ).status_code

        assert [log_in(KEY) for _ in range(12)] == [200] * 12
        assert [log_in(f"guess {number}") for number in range(6)] == [400] * 6
        assert [list_models(f"guess {number}") for number in range(4)] == [401] * 4
        assert (log_in("guess"), log_in(KEY), list_models(KEY)) == (429, 429, 429)
        assert client.get("/config").status_code == 200  # who is logged in stays so
        assert client.get("/healthz").status_code == 200
