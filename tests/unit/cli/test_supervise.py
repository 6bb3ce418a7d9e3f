"""What the supervisor of a node's ranks makes of torchrun's own errors."""

from __future__ import annotations

import signal
import sys
from typing import Any

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
)

from evomesh.cli.supervise import main


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
