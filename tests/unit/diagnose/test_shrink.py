"""A config in small keeps features, layout and divisibility: checked against the sizes of the large one."""

from __future__ import annotations

from typing import Any

import pytest

from evomesh.config.layout import axis_sizes, check_world, layout_findings
from evomesh.config.schema import Config
from evomesh.config.size import parameter_count
from evomesh.diagnose.parity.shrink import in_one_process, shrink, shrunk
from tests.dist.layouts import FAMILIES

LLAMA_7B = {
    "model_type": "LLAMA2",
    "num_layers": 33,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_kv_attention_heads": 8,
    "vocab_size": 32001,
    "mlp_ratio": 3.5,
    "multiple_of": 256,
    "dtype": "bfloat16",
}


def config(model: dict[str, Any], micro_num: int = 16, **parallel: Any) -> Config:
    data = {"seq_len": 4096, "micro_bsz": 2, "micro_num": micro_num}
    sections = {"model": model, "data": data, "parallel": parallel}
    return Config.model_validate(sections)


@pytest.mark.parametrize(
    ("size", "unit", "most", "wanted"),
    [
        (4096, 8, 8, 64),
        (32001, 8, 16, 129),
        (33, 4, 2, 9),
        (5, 8, 2, 5),
        (24, 8, 9, 24),
    ],
)
def test_the_quotient_shrinks_and_the_remainder_stays(
    size: int, unit: int, most: int, wanted: int
) -> None:
    assert shrunk(size, unit, most) == wanted


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, {}),
        (8, {"tensor": {"size": 8, "mode": "msp"}}),
        (16, {"tensor": {"size": 2, "mode": "isp"}, "weight": {"size": 8}}),
        (16, {"pipeline": {"size": 4}, "tensor": {"size": 4}}),
        (64, {"zero1": {"size": -1, "fsdp": True}}),
        (96, {"pipeline": {"size": 3}, "zero1": {"size": 32}}),
    ],
)
def test_what_an_axis_divides_it_still_divides(
    world: int, parallel: dict[str, Any]
) -> None:
    large = config(LLAMA_7B, **parallel)
    small = shrink(large, world)
    sizes = axis_sizes(large.parallel, world)
    assert axis_sizes(small.parallel, world) == sizes
    check_world(small, world)
    assert list(layout_findings(small)) == []
    for axis in (sizes.tp, sizes.wp, sizes.zero):
        for name in ("hidden_size", "vocab_size", "mlp_width", "qkv_width"):
            before = getattr(large.model, name) % axis == 0
            after = getattr(small.model, name) % axis == 0
            assert before == after, f"{name} over {axis}"
    assert small.model.kv_heads % sizes.tp == 0  # heads are shared by tensor ranks only
    assert small.model.num_layers % sizes.pp == large.model.num_layers % sizes.pp
    assert small.model.num_attention_heads == 2 * small.model.kv_heads
    assert small.model.dtype == "bfloat16" and small.model.compile is False
    count = parameter_count(small.model)
    assert count is not None and count < 20_000_000


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_keeps_its_kinds_of_layers(family: str) -> None:
    sizes = {"num_layers": 12, "hidden_size": 512, "num_attention_heads": 8}
    model = sizes | {"num_kv_attention_heads": 4} | FAMILIES[family]
    if "layer_types" in model:
        types = ("sliding_attention",) * 11 + ("full_attention",)
        model["layer_types"] = types
    if "longrope" in str(model.get("rope_scaling")):
        model["rope_scaling"] = dict(
            model["rope_scaling"], short_factor=(1.0,) * 32, long_factor=(2.0,) * 32
        )
    large = config(model)
    small = shrink(large, 1)
    for key, value in small.model.model_dump().items():
        if isinstance(value, bool) and key != "compile":
            assert value == getattr(large.model, key), key
    kinds = [set(), set()]
    for index, one in enumerate((large.model, small.model)):
        for layer in range(one.num_layers):
            kinds[index].add((one.window_of(layer) is None, one.rotates(layer)))
    assert kinds[0] == kinds[1]
    if large.model.layer_types is None:
        assert small.model.num_layers <= 4


@pytest.mark.parametrize(
    ("schedule", "chunks", "micro_num", "wanted"),
    [
        ("1f1b", 1, 64, 8),
        ("1f1b", 1, 3, 3),
        ("interleaved", 2, 64, 8),
        ("zbv", 2, 2, 2),
    ],
)
def test_micro_batches_fit_the_schedule(
    schedule: str, chunks: int, micro_num: int, wanted: int
) -> None:
    pipeline = {"size": 4, "schedule": schedule}
    large = config(LLAMA_7B | {"num_chunks": chunks}, micro_num, pipeline=pipeline)
    small = shrink(large, 4)
    assert small.data.micro_num == wanted
    assert list(layout_findings(small)) == []


def test_one_process_sees_the_packs_of_all_ranks() -> None:
    small = shrink(config(LLAMA_7B, tensor={"size": 2}), 8)
    single = in_one_process(small, 4)
    assert single.data.micro_num == 4 * small.data.micro_num
    assert axis_sizes(single.parallel, 1).tp == 1 and single.model.num_chunks == 1
