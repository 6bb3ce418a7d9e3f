"""Device files, and the arithmetic of transfers."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.errors import UserError
from evomesh.plan.device import Device, device_names, load_device

GOOD = """
name = "Test"
memory_gib = 10
gpus_per_node = 4
launch = 0
rates = {bfloat16 = 100, float16 = 100, float32 = 10, memory = 1000}
links = {node = 100, network = 10, node_latency = 0, network_latency = 0}
efficiencies = {matrix = 0.5, attention = 0.5, memory = 0.5, link = 1}
"""


@pytest.fixture
def device(tmp_path: Path) -> Device:
    file = tmp_path / "test.toml"
    file.write_text(GOOD)
    return load_device(str(file))


@pytest.mark.parametrize("name", device_names())
def test_every_device_of_the_package_can_be_loaded(name: str) -> None:
    device = load_device(name.lower())
    assert device.name == name
    assert device.rates.bfloat16 > device.rates.float32


# GiB of `torch.cuda.get_device_properties().total_memory`, as logs and error messages of
# different drivers have it ("GPU 0 has a total capacity of 79.10 GiB").
REPORTED = {
    "A100": (79.14, 79.15, 79.25, 79.32, 79.35),
    "A800": (79.14, 79.15, 79.25, 79.32, 79.35),  # the A100's chip and memory
    "B200": (178.35, 178.36),
    "H100": (79.10, 79.11, 79.18, 79.19),
    "H200": (139.72, 139.80, 139.81),
}


@pytest.mark.parametrize("name", device_names())
def test_memory_is_the_least_that_torch_reports(name: str) -> None:
    """A layout that fits does so with every driver; the data sheet's 80 GB are more than there is."""
    least = min(REPORTED[name])
    assert least - 0.015 < load_device(name).memory_gib <= least


def test_products_and_memory_at_their_share_of_the_rate(device: Device) -> None:
    assert device.product_seconds(10**12, "bfloat16", 0.5) == pytest.approx(0.02)
    assert device.product_seconds(10**12, "float32", 0.5) == pytest.approx(0.2)
    assert device.memory_seconds(10**9) == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("operation", "ranks", "nodes", "seconds"),
    [
        # Each rank passes on 3 of 4 parts of 8 GB at 100 GB/s.
        ("all_gather", 4, 1, 0.06),
        ("reduce_scatter", 4, 1, 0.06),
        ("all_reduce", 4, 1, 0.12),
        # Two nodes with two ranks each: two ports of 10 GB/s.
        ("all_gather", 4, 2, 0.3),
        # One rank in each node has one port.
        ("all_gather", 2, 2, 0.4),
        ("send", 2, 1, 0.08),
        ("send", 2, 2, 0.8),
    ],
)
def test_a_ring_moves_all_parts_but_one(
    device: Device, operation: str, ranks: int, nodes: int, seconds: float
) -> None:
    found = device.transfer_seconds(operation, 8 * 10**9, ranks, nodes)
    assert found == pytest.approx(seconds)


def test_latency_grows_with_the_hops(tmp_path: Path) -> None:
    file = tmp_path / "slow.toml"
    file.write_text(GOOD.replace("node_latency = 0", "node_latency = 5", 1))
    device = load_device(str(file))
    few = device.transfer_seconds("all_gather", 8, 2, 1)
    many = device.transfer_seconds("all_gather", 8, 256, 1)
    assert few == pytest.approx(5e-6, rel=1e-3)
    assert many == pytest.approx(40e-6, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("memory_gib = ", "not TOML"),
        (GOOD.replace("memory_gib = 10", ""), "memory_gib"),
        (GOOD.replace("memory_gib = 10", "memory_gib = -1"), "memory_gib"),
        (GOOD.replace("launch = 0", "lunch = 0"), "lunch"),
        (GOOD.replace("float32 = 10,", ""), "rates.float32"),
    ],
)
def test_a_bad_file_is_refused_with_its_key(
    tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load_device(str(file))
    assert "bad.toml" in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="no device X100") as caught:
        load_device("X100")
    assert "H100" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.toml"):
        load_device(str(tmp_path / "gone.toml"))
