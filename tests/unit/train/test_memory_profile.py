"""The memory profile: what is counted, under which kind and name, and what is written when memory runs out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from evomesh.outside_errors import is_out_of_memory
from evomesh.train.memory_profile import (
    ACTIVATIONS,
    BACKWARD,
    GRADIENTS,
    MemoryProfile,
    MemoryTracker,
)

ROWS = 16


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))


def tracker_of(model: nn.Module) -> MemoryTracker:
    return MemoryTracker({id(module): name for name, module in model.named_modules()})


def profile_of(
    model: nn.Module, folder: Path, moment: torch.Tensor | None = None
) -> MemoryProfile:
    parameters = dict(model.named_parameters())
    stages = SimpleNamespace(models=[model], parameters=lambda: parameters)
    moments = {} if moment is None else {"optim.exp_avg.0.weight": moment}
    optimizer = SimpleNamespace(slots=[], state_tensors=lambda: moments)
    return MemoryProfile(folder, "dp=0", stages, optimizer, torch.device("cpu"))  # type: ignore[arg-type]


def test_activations_are_counted_under_their_module_until_they_are_gone() -> None:
    model = net()
    tracker = tracker_of(model)
    inputs = torch.ones(ROWS, 4)
    with tracker.watching():
        output = model(inputs)
        view = output.view(-1)
        view.add_(1)
        found = {(one.kind, one.name, one.nbytes) for one in tracker.largest()}
        # Of float32; views add nothing. Backward needs the output of ReLU, not its input.
        assert found == {
            (ACTIVATIONS, "1: aten.relu.default", 4 * ROWS * 8),
            (ACTIVATIONS, "2: aten.addmm.default", 4 * ROWS * 2),
        }
        del output, view
    assert tracker.largest() == []
    assert tracker.peak == 4 * ROWS * (8 + 8)  # input and output of ReLU
    assert tracker.peak_kinds == {ACTIVATIONS: tracker.peak}


def test_a_step_has_gradients_by_name_and_a_peak_by_kind(tmp_path: Path) -> None:
    model = net()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    moment = torch.zeros(8, 4)
    profile = profile_of(model, tmp_path, moment)
    with profile:
        for step in range(2):
            model(torch.ones(ROWS, 4)).sum().backward()
            profile.after_step(step)
        kinds = {one.name: one.kind for one in profile.tracker.largest(99)}
    assert kinds["0.weight.grad"] == GRADIENTS
    assert kinds["optim.exp_avg.0.weight"] == "moments"
    assert kinds["2.bias"] == "weights"
    lines = (tmp_path / "memory/dp=0.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert (first["step"], second["step"]) == (0, 1)
    for row in (first, second):
        assert sum(row["kinds"].values()) == row["peak"]
        assert row["kinds"]["weights"] == weights
        assert row["kinds"]["moments"] == moment.nbytes
    # The gradients of the first step are alive during the second.
    assert second["kinds"][GRADIENTS] == weights
    assert second["peak"] > first["peak"]
    assert {ACTIVATIONS, BACKWARD} & set(first["kinds"])


class Greedy(nn.Module):
    """A layer that asks for more than there is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.empty(2**58)


def test_when_memory_runs_out_the_largest_tensors_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Each layer's output is larger than the one before.
    layers = [nn.Linear(size, size + 1) for size in range(4, 16)]
    model = nn.Sequential(*layers, Greedy())
    inputs = torch.ones(1000, 4)
    with pytest.raises(RuntimeError) as caught, profile_of(model, tmp_path):
        model(inputs)
    assert is_out_of_memory(caught.value)
    table = (tmp_path / "memory/dp=0.out-of-memory.txt").read_text().splitlines()
    assert len(table) == 10
    largest = table[0].split()
    assert largest[2:] == [
        "activations",
        "1000x16",
        "float32",
        "11:",
        "aten.addmm.default",
    ]
    assert largest[:2] == ["62.5", "KiB"]
    assert [row.split()[5] for row in table] == [
        f"{number}:" for number in range(11, 1, -1)
    ]
    assert "the largest tensors" in caplog.text


def test_what_was_alive_at_the_last_failure_is_remembered() -> None:
    tracker = MemoryTracker({})
    with tracker.watching():
        for size in (8, 16):
            kept = torch.ones(size)
            with pytest.raises(RuntimeError):
                torch.empty(2**58)
            del kept
    assert tracker.largest() == []
    assert tracker.at_failure is not None
    assert [one.shape for one in tracker.at_failure] == [(16,)]


def test_another_error_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), profile_of(net(), tmp_path):
        1 / 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
