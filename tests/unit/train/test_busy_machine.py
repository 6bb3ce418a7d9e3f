"""A run on a CPU says that other programs use its cores, and only then."""

from __future__ import annotations

import os

import pytest
import torch

from evomesh.config.schema import Config
from evomesh.train.busy_machine import others_at_work
from evomesh.train.launch import launch

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, load: float, cores: int | None) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)


def test_more_programs_than_cores_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 4.06, 2)
    (line,) = others_at_work(CPU)
    assert "busy" in line
    assert "4.1 programs wanted to run on its 2 cores" in line


@pytest.mark.parametrize(("load", "cores"), [(0.1, 2), (3.0, 2), (4.06, 64)])
def test_what_the_cores_can_bear_is_not(
    monkeypatch: pytest.MonkeyPatch, load: float, cores: int
) -> None:
    pretend(monkeypatch, load, cores)
    assert others_at_work(CPU) == []


def test_a_load_beyond_what_was_just_used_is_named_on_one_core_of_unknown_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, 1.6, None)
    assert len(others_at_work(CPU)) == 1


def test_a_run_on_a_gpu_is_not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 400.0, 2)
    assert others_at_work(torch.device("cuda")) == []


def test_a_system_that_does_not_count_is_taken_as_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses() -> None:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", refuses)
    assert others_at_work(CPU) == []


def test_the_start_of_a_run_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, 8.0, 2)
    with launch(Config()):
        pass
    captured = capfd.readouterr()
    assert (captured.out + captured.err).count("this machine is busy") == 1
