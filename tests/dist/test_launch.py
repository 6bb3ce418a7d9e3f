"""``launch`` in real processes with torchrun's variables."""

from __future__ import annotations

import pytest

from evomesh.config.schema import Config
from evomesh.parallel.collectives import all_reduce_no_grad
from evomesh.train.launch import launch
from evomesh.train.signals import StopRequest
from tests.support.covers import covers
from tests.support.interpreter import Interpreter

pytestmark = covers("promise:start-lines")


def join_and_count() -> None:
    import torch
    import torch.distributed as dist

    config = Config.model_validate(
        {"parallel": {"tensor": {"size": 2}, "timeout": 77.0}}
    )
    with launch(config) as place:
        groups = [dist.group.WORLD, place.grid.tp.group, place.grid.dp.group]
        # A group bound to a device is made by all ranks at once, and so would hang with
        # groups that only their members make (``build_grid``).
        assert all(group.bound_device_id is None for group in groups)
        cpu = torch.device("cpu")
        print(
            "timeouts",
            *[
                group._get_backend(cpu).options._timeout.total_seconds()
                for group in groups
            ],
        )
        print(
            "sum",
            int(
                all_reduce_no_grad(
                    torch.tensor(place.rank), place.grid.tp, place.grid.dp
                )
            ),
            place.started,
        )
    assert not dist.is_initialized()


@covers("parallel.timeout")
def test_two_data_by_two_tensor_ranks(interpreter: Interpreter) -> None:
    finished = [
        running.wait(60) for running in interpreter.start_ranks(join_and_count, 4)
    ]
    assert [one.returncode for one in finished] == [0] * 4, "\n".join(
        one.stderr for one in finished
    )
    sums = {
        line
        for one in finished
        for line in one.stdout.splitlines()
        if line.startswith("sum")
    }
    assert all("timeouts 77.0 77.0 77.0\n" in one.stdout for one in finished)
    assert len(sums) == 1 and sums.pop().startswith("sum 6 "), "one sum, one time"
    assert (
        " in launch -- Distributed environment is initialized, data parallel size: 2, "
        "pipeline parallel size: 1, tensor parallel size: 2\n"
    ) in finished[0].stdout
    assert (
        " in set_seed -- initialized seed on rank 0, numpy: 1024, python random: 1024"
        in finished[0].stdout
    )
    assert [",tp:1,pp=0,dp=0====" in one.stdout for one in finished] == [
        False,
        True,
        False,
        False,
    ]


def test_an_error_does_not_wait_for_collectives_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Destroying an NCCL group waits for its collectives, which the other ranks may never join."""
    left: list[bool] = []
    monkeypatch.setattr("evomesh.train.launch.leave_world", lambda: left.append(True))
    with pytest.raises(ZeroDivisionError), launch(Config()):
        raise ZeroDivisionError
    assert not left
    with launch(Config()):
        pass
    assert left == [True]


def test_the_command_line_ends_in_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, gloo may abort where two ranks destroy a group at once."""
    left: list[bool] = []
    monkeypatch.setattr("evomesh.train.launch.leave_world", lambda: left.append(True))
    request = StopRequest().watch()
    try:
        with launch(Config()):
            pass
    finally:
        request.restore()
    assert not left
