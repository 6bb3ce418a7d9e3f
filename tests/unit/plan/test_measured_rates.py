"""Measured rates: lines between points, the file that holds them, ranks that take turns, by counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evomesh.config.schema import Config
from evomesh.errors import UserError
from evomesh.parallel.traffic import CollectiveCall
from evomesh.pipeline.action_order import one_forward_one_backward
from evomesh.plan.device import Device, load_device
from evomesh.plan.device_file import write_device
from evomesh.plan.measure import message_rates, operator_rates
from evomesh.plan.measured_rates import RateCurve
from evomesh.plan.operator_times import TimedKernel
from evomesh.plan.pipeline_time import StageSeconds, last_end, timed_actions
from evomesh.plan.shared_cores import SharedCores
from evomesh.plan.simulate import AxisPlacement, kernel_seconds, simulate
from evomesh.plan.step_time import predict_step
from evomesh.plan.timeline import COMPUTE, Kernel, KernelKind, Transfer, Wait

MEGA = 10**6


def product(operator: str, size: int, flops: int) -> Kernel:
    kind = KernelKind.MATRIX
    return Kernel(COMPUTE, kind, flops, 1, size, operator, "float32")


def moved(operator: str, nbytes: int) -> Kernel:
    return Kernel(COMPUTE, KernelKind.MEMORY, 0, nbytes, 0, operator, "float32")


def facts(factor: float = 1.0, cores: int = 2) -> dict[str, Any]:
    """A device whose rates are ``factor`` times those of a machine that is easy to count with."""

    def curve(name: str, size: int, rate: float) -> dict[str, Any]:
        return {
            "name": name,
            "dtype": "float32",
            "size": size,
            "work": [1e6, 1e9],
            "rate": [rate * factor, rate * factor],
        }

    def messages(operation: str, ranks: int, processes: int) -> dict[str, Any]:
        return {
            "operation": operation,
            "ranks": ranks,
            "processes": processes,
            "latency": 100 / factor,
            "work": [1e6, 1e9],
            "rate": [factor, factor],
        }

    operations = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send")
    return {
        "name": "Hand",
        "kind": "cpu",
        "memory_gib": 1,
        "gpus_per_node": 4,
        "rates": {"bfloat16": 1, "float16": 1, "float32": 1, "memory": 1},
        "links": {"node": 1, "network": 1, "node_latency": 0, "network_latency": 0},
        "host": {"cores": cores, "launch": 10 / factor},
        "operators": [
            curve("mm", 64, 10.0),
            curve("mm", 256, 40.0),
            curve("elementwise *", 0, 2.0),
            curve("attention *", 0, 5.0),
            curve("matrix products *", 64, 5.0),
        ],
        "messages": [messages(one, n, n) for one in operations for n in (2, 4)],
    }


def device(factor: float = 1.0, cores: int = 2) -> Device:
    return Device.model_validate(facts(factor, cores))


def test_between_two_points_time_is_a_power_of_work() -> None:
    # 1 ms for 1 MB, 4 ms for 16 MB: the square root, 2 ms at 4 MB.
    curve = RateCurve(work=(1e6, 16e6), rate=(1.0, 4.0))
    assert curve.seconds(4e6) == pytest.approx(0.002)
    assert curve.seconds(10) == pytest.approx(0.001)
    assert curve.seconds(160e6) == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("size", "milliseconds"), [(32, 10), (64, 10), (128, 5), (256, 2.5), (999, 2.5)]
)
def test_the_size_of_a_product_chooses_its_curve(
    size: int, milliseconds: float
) -> None:
    one = device().measured_seconds(product("mm", size, 100 * MEGA))
    assert one == pytest.approx(milliseconds / 1e3)


def test_an_operator_that_was_not_measured_is_like_its_kind() -> None:
    assert device().measured_seconds(moved("tan", 2 * MEGA)) == pytest.approx(0.001)
    half = Kernel(COMPUTE, KernelKind.MEMORY, 0, 2 * MEGA, 0, "tan", "bfloat16")
    assert device().measured_seconds(half) == pytest.approx(0.001)


@pytest.mark.parametrize(("world", "turns"), [(1, 1), (2, 1), (4, 2), (8, 2)])
def test_more_ranks_than_cores_take_turns(world: int, turns: int) -> None:
    """1 ms of memory and 10 us to the next operator; a node has four processes at most."""
    crowded = device().in_world(world)
    found = kernel_seconds(moved("add", 2 * MEGA), crowded, "float32")
    assert found == pytest.approx(turns * 0.00101)


def test_messages_are_those_of_groups_like_the_axis_and_are_not_hidden() -> None:
    places = {"dp": AxisPlacement(2, 1)}
    call = CollectiveCall("all_reduce", "dp", 4 * MEGA)
    events = [Transfer(COMPUTE, call, 1), moved("add", 2 * MEGA), Wait(COMPUTE, 1)]
    found = simulate(events, device().in_world(2), "float32", places)
    assert found.end == pytest.approx(0.004 + 0.00101)
    short = device().transfer_seconds("all_reduce", 8, 2, 1)
    assert short == pytest.approx(0.001)


def test_stages_on_two_cores_share_them() -> None:
    """Two pipelines of two stages on two cores, one micro-batch: both pipelines compute one stage at any time."""
    order = one_forward_one_backward(2, 1)
    stages = [StageSeconds(1.0, 2.0)] * 2
    alone = timed_actions(order, stages, 0.0, SharedCores(2, 2))
    assert last_end(alone) == pytest.approx(6.0)
    # On one core each of the two has half.
    crowded = timed_actions(order, stages, 0.0, SharedCores(1, 2))
    assert last_end(crowded) == pytest.approx(12.0)


def test_stages_on_one_core_take_turns() -> None:
    """Two micro-batches of one pipeline. Stages by number, F 1 s, B 2 s, one core.

    0 to 1: F0 of the first. 1 to 3: F0 of the second beside F1 of the first, at half speed.
    3 to 5: B1 of the first alone. 5 to 9: B0 of the first beside F1 and then B1 of the second, of
    which 1 s is left, to 10. B0 of the second to 12: all 12 s of work without a pause.
    """
    order = one_forward_one_backward(2, 2)
    stages = [StageSeconds(1.0, 2.0)] * 2
    timed = timed_actions(order, stages, 0.0, SharedCores(1, 1))
    ends = [[action.end for action in timed[rank]] for rank in (0, 1)]
    assert ends[0] == pytest.approx([1, 3, 9, 12])
    assert ends[1] == pytest.approx([3, 5, 7, 10])


@pytest.mark.parametrize("pipelines", [1, 2])
def test_enough_cores_are_like_separate_devices(pipelines: int) -> None:
    order = one_forward_one_backward(3, 5)
    stages = [StageSeconds(1.0, 2.5), StageSeconds(0.5, 1.0), StageSeconds(2.0, 2.0)]
    own = timed_actions(order, stages, 0.25)
    shared = timed_actions(order, stages, 0.25, SharedCores(3 * pipelines, pipelines))
    assert last_end(shared) == pytest.approx(last_end(own))


def config(parallel: dict[str, Any]) -> Config:
    model = dict(
        model_type="LLAMA2",
        dtype="float32",
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        vocab_size=64,
        mlp_ratio=2.0,
        multiple_of=8,
    )
    data = dict(seq_len=32, micro_bsz=1, micro_num=2)
    return Config.model_validate({"model": model, "data": data, "parallel": parallel})


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {}),
        (2, {"tensor": {"size": 2, "mode": "mtp"}}),
        (2, {"pipeline": {"size": 2}}),
    ],
)
def test_half_the_rates_predict_twice_the_time(
    ranks: int, parallel: dict[str, Any]
) -> None:
    whole = predict_step(config(parallel), ranks, device()).seconds
    half = predict_step(config(parallel), ranks, device(0.5)).seconds
    assert half == pytest.approx(2 * whole)


def test_one_core_computes_for_two_ranks_in_twice_the_time() -> None:
    """Without messages to wait for, as these take no time here."""
    quick = facts()
    slow = facts(cores=1)
    for table in (quick, slow):
        for messages in table["messages"]:
            messages |= {"latency": 0, "rate": [1e12, 1e12]}
    two = predict_step(config({}), 2, Device.model_validate(quick)).seconds
    one = predict_step(config({}), 2, Device.model_validate(slow)).seconds
    assert one == pytest.approx(2 * two, rel=1e-3)


def test_a_device_file_holds_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    named = device().model_copy(update={"name": 'a "machine" \\ here'})
    write_device(named, path, "A comment.")
    assert load_device(str(path)) == named
    assert path.read_text().startswith("# A comment.\n")


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"work": [1e6, 1e5]}, "not ascending"),
        ({"work": [1e6]}, "1 values of work, 2 rates"),
        ({"rate": [0, 1]}, "greater than 0"),
        ({"speed": 1}, "speed"),
    ],
)
def test_a_file_with_wrong_rates_is_refused(
    changed: dict[str, Any], part: str, tmp_path: Path
) -> None:
    text = Path(tmp_path / "bad.toml")
    write_device(device(), text, "bad")
    lines = text.read_text()
    key = next(iter(changed))
    old = (
        "size = 64"
        if key == "speed"
        else next(line for line in lines.splitlines() if line.startswith(f"{key} = "))
    )
    text.write_text(lines.replace(old, f"{key} = {changed[key]}", 1))
    with pytest.raises(UserError, match=part):
        load_device(str(text))


def test_medians_of_kernels_become_curves() -> None:
    timed = [
        TimedKernel(moved("add", 1000), 1e-6),
        TimedKernel(moved("add", 1100), 3e-6),
        TimedKernel(moved("add", 10**6), 1e-3),
        TimedKernel(product("mm", 60, 10**6), 1e-4),
    ]
    curves = {(curve.name, curve.size): curve for curve in operator_rates(timed)}
    add = curves["add", 0]
    assert add.work == (1000, 10**6)
    assert add.rate == (0.5, 1.0)  # 1,000 bytes in 2 us, a megabyte in 1 ms
    assert curves["mm", 64].rate == (10.0,)
    assert curves["elementwise *", 0].work == add.work


def test_ranks_agree_on_the_time_of_a_message_by_its_mean() -> None:
    answers = [
        {("send", 1000, 2): 1e-6, ("send", 10**6, 2): 1e-3},
        {("send", 1000, 2): 3e-6, ("send", 10**6, 2): 1e-3},
    ]
    (rate,) = message_rates(answers, 4)
    assert (rate.operation, rate.ranks, rate.processes) == ("send", 2, 4)
    assert rate.latency == pytest.approx(2)
    assert rate.message_seconds(10**6) == pytest.approx(1e-3)
