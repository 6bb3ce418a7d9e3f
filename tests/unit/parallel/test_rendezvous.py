"""Ranks that cannot meet: every cause is a sentence that names the variable and the value."""

from __future__ import annotations

import os
import re
import resource
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from evomesh.errors import UserError
from evomesh.parallel import rendezvous
from evomesh.parallel.peer_watch import PeerFailedError
from evomesh.parallel.rendezvous import (
    JobAddress,
    call_roll,
    open_store,
    report_early_failure,
)
from tests.support.interpreter import Interpreter, free_port

pytestmark = pytest.mark.slow

LIMIT_S = 0.3


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "PAUSE_S", 0.01)


def here(
    rank: int = 0, world_size: int = 2, host: str = "127.0.0.1", port: int = 0
) -> JobAddress:
    return JobAddress(rank, world_size, host, port or free_port())


def test_a_port_that_is_taken(taken_port: int) -> None:
    with pytest.raises(
        UserError, match=f"MASTER_PORT: port {taken_port} is in use on this host"
    ) as caught:
        open_store(here(port=taken_port))
    assert caught.value.exit_code == 2 and "export MASTER_PORT=" in caught.value.fix


def listen_without_a_descriptor() -> None:
    address = here()
    limit = os.open(os.devnull, os.O_RDONLY) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    try:
        open_store(address)
    except UserError as error:
        print(error)


def test_no_descriptor_for_the_store(interpreter: Interpreter) -> None:
    finished = interpreter.run(listen_without_a_descriptor)
    assert finished.stdout.startswith("environment: too many open files"), finished
    assert "ulimit -n" in finished.stdout


@pytest.mark.parametrize(
    "host", ["no-such-host.invalid", "a..b", "x" * 300, "bad host", "nöt.invalid"]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_name_without_an_address(host: str, rank: int) -> None:
    message = re.escape(f"MASTER_ADDR: {host!r} has no address on this host")
    with pytest.raises(UserError, match=message):
        open_store(here(rank=rank, host=host), limit_s=LIMIT_S)


def test_nobody_listens() -> None:
    address = here(rank=1)
    with pytest.raises(
        UserError, match=f"rank 0 does not answer at {address}: Connection refused"
    ) as caught:
        open_store(address, limit_s=LIMIT_S)
    assert caught.value.exit_code == 75  # the node of rank 0 may come up


def test_ranks_that_never_come_are_named() -> None:
    address = here(world_size=12)
    store = open_store(address)
    store.set("host/7", "n7")
    with pytest.raises(
        UserError, match=r"ranks 1, 2, 3, 4, 5, 6, 8, 9, \.\.\. of 12 did not start"
    ) as caught:
        call_roll(store, address, LIMIT_S)
    assert caught.value.exit_code == 75


def test_what_is_waited_for_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr(rendezvous.time, "monotonic", lambda: float(next(times)))
    with pytest.raises(UserError):
        open_store(here(rank=1, host="no-such-host.invalid"), limit_s=100)
    assert (
        "waiting for the name no-such-host.invalid (MASTER_ADDR) to resolve"
        in caplog.text
    )


def call_all(addresses: list[JobAddress], stores: list[Any]) -> list[Any]:
    """What the roll call gives on each rank: the hosts or the error."""
    outcomes: list[Any] = [None] * len(addresses)

    def call(rank: int) -> None:
        try:
            outcomes[rank] = call_roll(stores[rank], addresses[rank], 20)
        except UserError as error:
            outcomes[rank] = error

    threads = [
        threading.Thread(target=call, args=(rank,)) for rank in range(len(addresses))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes


def test_all_ranks_learn_all_hosts() -> None:
    port = free_port()
    addresses = [here(rank, 3, port=port) for rank in range(3)]
    stores = [open_store(address) for address in addresses]
    host = socket.gethostname()
    assert call_all(addresses, stores) == [{0: host, 1: host, 2: host}] * 3


def test_a_rank_that_fails_before_they_meet_ends_the_others() -> None:
    port = free_port()
    addresses = [here(rank, 3, port=port) for rank in range(3)]
    stores = [open_store(address) for address in addresses[:2]]
    assert not report_early_failure(addresses[2], "no such folder\n  fix: make it", 2)
    for outcome in call_all(addresses[:2], stores):
        assert isinstance(outcome, PeerFailedError)
        assert (
            outcome.found == f"rank 2 on {socket.gethostname()} ended: no such folder"
        )
        assert outcome.exit_code == 2


def test_equal_early_failures_are_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    elsewhere: dict[int, bool] = {}

    def fail(rank: int) -> None:
        elsewhere[rank] = report_early_failure(
            here(rank, 4, port=port), "3 problems in the config", 2
        )

    threads = [threading.Thread(target=fail, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(elsewhere.values()) == [False, True, True, True]


def test_a_failure_is_kept_when_nobody_can_be_told(
    monkeypatch: pytest.MonkeyPatch, taken_port: int
) -> None:
    monkeypatch.setattr(rendezvous, "EARLY_LIMIT_S", LIMIT_S)
    assert not report_early_failure(here(rank=1), "x", 2)
    assert not report_early_failure(here(port=taken_port), "x", 2)


def test_a_restarted_attempt_does_not_see_the_verdict_of_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert here().prefix == "evomesh/0"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert here().prefix == "evomesh/2" and not here().is_served_here
