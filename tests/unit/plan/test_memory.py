"""The predicted peak of a step against arithmetic on shapes; and that shipped configs fit on the hardware they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks._memory import Sizes, bytes_in_16_bits
from evomesh.cli.app import app
from evomesh.config.data import DataConfig
from evomesh.config.loader import load_config
from evomesh.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from evomesh.config.size import parameter_count
from evomesh.layers.loss import tokens_per_chunk
from evomesh.plan import memory_timeline
from evomesh.plan.device import load_device
from evomesh.plan.memory import GIB, peak_memory
from evomesh.plan.memory_timeline import MemoryTimeline
from evomesh.plan.step_memory import trace_step_memory

CONFIGS = Path(__file__).parents[3] / "configs"
# GB that a config names -> GiB of the GPU of this size that has the least.
LEAST_GIB = {
    "80": min(load_device(name).memory_gib for name in ("A100", "A800", "H100"))
}
SHIPPED = sorted([*CONFIGS.glob("*.py"), *CONFIGS.glob("xtuner/*.py")])
T, D, F, V, N, L = 2048, 256, 704, 4000, 4, 8
CHUNK = min(T, tokens_per_chunk(V, on_cuda=True))


def config(parallel: dict[str, Any] | None = None, **model: Any) -> Config:
    shape: dict[str, Any] = dict(
        model_type="LLAMA2",
        dtype="bfloat16",
        num_layers=L,
        hidden_size=D,
        num_attention_heads=N,
        vocab_size=V,
        mlp_ratio=F / D,
        multiple_of=1,
        no_bias=True,
    )
    return Config(
        model=ModelConfig(**shape | model),
        data=DataConfig(seq_len=T, micro_bsz=1, micro_num=4),
        parallel=ParallelConfig.model_validate(parallel or {}),
    )


@pytest.mark.parametrize("recompute", [0.0, 0.5, 1.0])
def test_the_peak_is_that_of_arithmetic(recompute: float) -> None:
    sizes = Sizes(L, D, N, F, V, T, chunk=CHUNK)
    found = peak_memory(config(checkpoint=recompute), 1)
    assert found.total == pytest.approx(bytes_in_16_bits(sizes, recompute), rel=0.02)
    weights = 2 * sizes.parameters
    assert found.kinds["weights"] == weights
    assert found.kinds["gradients"] == found.kinds["masters"] == 2 * weights
    assert found.kinds["moments"] == 4 * weights


def test_schedule_free_and_an_average_are_counted() -> None:
    parameters = Sizes(L, D, N, F, V, T, chunk=CHUNK).parameters
    for values, number in (
        ({"type": "schedule_free"}, 2),
        ({"ema": {"decay": 0.9}}, 3),
    ):
        optimizer = OptimizerConfig.model_validate(values)
        found = peak_memory(config().model_copy(update={"optimizer": optimizer}), 1)
        assert found.kinds["moments"] == 4 * number * parameters
        assert found.kinds["masters"] == 4 * parameters


@pytest.mark.parametrize("rule", ["muon", "lion"])
def test_each_rule_remembers_its_own(rule: str) -> None:
    """Lion one float32 number for each weight; Muon one for those of the blocks' matrices, two for the others."""
    optimizer = OptimizerConfig.model_validate({"type": rule})
    found = peak_memory(config().model_copy(update={"optimizer": optimizer}), 1)
    parameters = Sizes(L, D, N, F, V, T, chunk=CHUNK).parameters
    matrices = L * (4 * D * D + 3 * D * F)
    once = parameters if rule == "lion" else matrices
    assert found.kinds["moments"] == 4 * (
        once + 2 * (parameters - once) * (rule == "muon")
    )


@pytest.mark.slow
def test_fsdp_holds_a_share_and_gathers_layers() -> None:
    alone = peak_memory(config(), 4).kinds
    sharded = peak_memory(config({"zero1": {"fsdp": True}}), 4).kinds
    for kind in ("weights", "gradients"):
        assert sharded[kind] == pytest.approx(alone[kind] / 4, rel=0.01)
    block = 2 * (4 * D * D + 3 * D * F + 2 * D)
    head = 2 * V * D
    assert "gathered layers" not in alone
    assert min(block, head) <= sharded["gathered layers"] <= 3 * max(block, head)
    # Whatever is gathered, a token's activations are the same.
    assert sharded["kept activations"] == pytest.approx(
        alone["kept activations"], rel=0.02
    )


def most(timeline: MemoryTimeline, kind: str) -> int:
    return max(timeline.nbytes[timeline.kinds.index(kind)])


def test_a_stage_keeps_the_micro_batches_that_are_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1F1B on four stages of two layers: the first keeps four micro-batches, the last one."""
    # Every point: a compressed timeline has the highest one of all kinds together.
    monkeypatch.setattr(memory_timeline, "STRETCHES", 10**6)
    pipeline = config({"pipeline": {"size": 4}})
    first, last = (trace_step_memory(pipeline, 4, rank) for rank in (0, 3))
    whole = trace_step_memory(config(num_layers=2), 1)
    of_two_layers = most(whole, "kept activations")
    message = 2 * T * D
    # The last norm, after the last layer only, keeps its input in float32, and its
    # output is no message.
    of_a_stage = of_two_layers - 4 * T * D - message
    assert most(first, "kept activations") == pytest.approx(4 * of_a_stage, rel=0.01)
    assert most(last, "kept activations") == pytest.approx(of_two_layers, rel=0.01)
    # What it has sent is the output that backward begins from, which torch keeps before
    # 2.15 and gives up after the transfer from then on; and a gradient arrives.
    outputs = 4 if torch.__version__ < "2.15" else 1
    assert most(first, "pipeline buffers") == (outputs + 1) * message
    # An input, its gradient that is being sent, and the next input.
    assert most(last, "pipeline buffers") == 3 * message


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_fits_on_the_hardware_that_it_names(path: Path) -> None:
    if path.stem == "7B_internlm2" and torch.__version__ < "2.13":
        pytest.skip("attention of torch 2.11 repeats key/value heads: 1.5 GiB more")
    hardware = re.search(r"^Hardware: *(.*)$", path.read_text(), re.MULTILINE)
    assert hardware is not None, "a config names its hardware"
    gpus = re.match(r"(\d+) GPUs? of (\d+) GB", hardware[1])
    if gpus is None:
        memory = re.search(r"(\d+) GiB of memory", hardware[1])
        assert memory is not None
        found = peak_memory(load_config(str(path)).config, 1)
        assert found.total < int(memory[1]) * GIB
        return
    sets = ["parallel.zero1.fsdp=True"] if "deepspeed_zero3" in hardware[1] else []
    found = peak_memory(load_config(str(path), sets).config, int(gpus[1]))
    capacity = int(LEAST_GIB[gpus[2]] * GIB)
    assert found.missing(capacity) <= 0, found


@pytest.mark.slow
def test_the_command_says_by_how_much_a_step_does_not_fit() -> None:
    path = str(CONFIGS / "7B_llama2.py")
    options = ["--gpus", "8", "--set", "model.num_layers=2"]
    result = CliRunner().invoke(app, ["plan", path, *options])
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert re.search(
        r"peak of a step, in the loss: [\d.]+ GiB of tensors weights [\d.]+ GiB", words
    )
    spare = re.search(r"fits in 79\.1 GiB: ([\d.]+) GiB to spare", words)
    assert spare is not None
    total = re.search(r"in total ([\d.]+) GiB", words[words.index("peak of") :])
    assert total is not None
    # The total is what is compared with the GPU.
    assert float(total[1]) + float(spare[1]) == pytest.approx(79.1, abs=0.06)
    result = CliRunner().invoke(app, ["plan", path, *options, "--gpu-memory", "4"])
    words = " ".join(result.output.split())
    assert re.search(r"does not fit in 4 GiB by [\d.]+ GiB", words)
    # What is named is true.
    named = re.search(r"fits with any of: ([^;]+) --trace", words)
    assert named is not None
    changes = []
    for change in named[1].split(", "):
        changes += ["--set", change]
    changed = ["plan", path, *options, "--gpu-memory", "4", *changes]
    result = CliRunner().invoke(app, changed)
    assert "fits in 4 GiB: " in result.output
    result = CliRunner().invoke(app, ["plan", path, *options, "--gpu-memory", "2"])
    words = " ".join(result.output.split())
    assert "no single change of the layout makes it fit" in words
    needed = 79.1 - float(spare[1])
    options += ["--gpu-memory", str(needed - 0.5)]
    result = CliRunner().invoke(app, ["plan", path, *options])
    words = " ".join(result.output.split())
    assert "fits with any of: model.checkpoint=0.25;" in words


@pytest.mark.slow
def test_the_command_prints_the_same_as_json() -> None:
    path = str(CONFIGS / "7B_llama2.py")
    sets = ["model.num_layers=2"]
    options = ["--gpus", "8", "--json", "--trace", "--set", sets[0]]
    result = CliRunner().invoke(app, ["plan", path, *options])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    config = load_config(path, sets).config
    peak = peak_memory(config, 8)
    assert (facts["gpus"], facts["rank"]) == (8, 0)
    assert facts["peak"]["total"] == peak.total == sum(facts["peak"]["kinds"].values())
    timeline = facts["memory_timeline"]
    assert len(timeline["kinds"]) == len(timeline["bytes"])
    totals = [sum(nbytes) for nbytes in zip(*timeline["bytes"], strict=True)]
    assert len(totals) == len(timeline["positions"])
    assert totals[timeline["peak"]] == max(totals) == peak.total
    assert facts["model_parameters"] == parameter_count(config.model)
    data = config.data
    tokens = data.seq_len * data.micro_bsz * data.micro_num * 8
    assert facts["tokens_per_step"] == tokens
    assert all(row["calls"] > 0 and row["bytes"] >= 0 for row in facts["traffic"])
    assert facts["traffic"]
