"""What the supervisor of a node's ranks makes of torchrun's own errors."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
)

from evomesh.cli.supervise import main
from evomesh.parallel import rendezvous
from evomesh.train.signals import StopRequest


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    yield
    request = StopRequest.installed()
    assert request is not None
    request.restore()


def failure(exit_code: int) -> ChildFailedError:
    failed = ProcessFailure(
        local_rank=1, pid=7, exitcode=exit_code, error_file="/none/error.json"
    )
    return ChildFailedError("train.py", {3: failed})


@pytest.mark.parametrize(
    ("ended", "code", "message"),
    [
        (SignalException("stopped", signal.SIGTERM), 75, ""),
        (SignalException("stopped", signal.SIGINT), 130, ""),
        (failure(2), 2, ""),
        (failure(6), 6, ""),
        (failure(75), 75, ""),
        (failure(-9), 75, "error: rank 3 was killed by SIGKILL"),
        (DistNetworkError("address in use\nframe"), 75, "cannot meet: address in use"),
    ],
    ids=lambda value: str(value).partition("\n")[0] or "no message",
)
def test_exit_codes(
    ended: Exception,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(arguments: Any) -> None:
        assert "SIGUSR1" in arguments.signals_to_handle
        raise ended

    monkeypatch.setattr("torch.distributed.run.run", run)
    monkeypatch.setattr(sys, "argv", ["supervise", "--nproc_per_node=2", "train.py"])
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == code
    printed = capsys.readouterr().err
    assert message in printed
    assert bool(printed) == bool(message)


def test_a_first_node_without_an_address_is_refused_before_torchrun_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = partial(rendezvous.wait_for_name, limit_s=0.1)
    monkeypatch.setattr(rendezvous, "wait_for_name", quick)
    monkeypatch.setattr("torch.distributed.run.run", lambda arguments: None)
    words = "supervise --nnodes=2 --master_addr=no-such-host.invalid --master_port=29500 train.py"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    message = "MASTER_ADDR: 'no-such-host.invalid' has no address on this host"
    assert message in capsys.readouterr().err
