"""InternEvo's optimizer, counters and data position, written here by its own rules and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evomesh.checkpoint.internevo.optimizer import read_counters, read_optimizer
from evomesh.config.data import DataConfig
from evomesh.data.build import build_train_data
from evomesh.errors import UserError
from tests.support.golden import write_folder
from tests.support.interpreter import Interpreter
from tests.support.runs import metrics
from tests.unit.checkpoint.internevo.test_model import FAMILIES, equal, heads_of, make

KINDS = ("master", "exp_avg", "exp_avg_sq")


def make_training(
    root: Path, family: str, tp: int, pp: int, zero: int, norms: torch.dtype
) -> dict[str, Tensor]:
    """A checkpoint with optimizer after 9 updates; returns the optimizer tensors that we must read."""
    expected = {}
    local: dict[str, dict[str, dict[str, Tensor]]] = {}
    for seed, kind in enumerate(KINDS):
        whole = make(root / kind, family, tp, pp, seed=seed)
        for name, tensor in whole.items():
            if kind != "master" or norms is not torch.float32 or "norm" not in name:
                expected[f"optim.{kind}.{name}"] = (
                    tensor.abs() if kind == "exp_avg_sq" else tensor
                )
        local[kind] = {file.name: torch.load(file) for file in (root / kind).iterdir()}
    for file in local["exp_avg_sq"].values():
        file |= {name: tensor.abs() for name, tensor in file.items()}
    step = root / "9"
    step.mkdir()
    for t in range(tp):
        for p in range(pp):
            name = f"model_tp{t}_pp{p}.pt"
            master = local["master"][name]
            weights = {
                n: w.to(norms if "norm" in n else torch.bfloat16)
                for n, w in master.items()
            }
            torch.save(weights, step / name)
            groups = [
                [n for n in weights if "norm" not in n],
                [n for n in weights if "norm" in n],
            ]
            if norms is not torch.float32:
                groups = [list(weights)]
            files: list[dict[str, Any]] = [
                {
                    "grad_scaler": {
                        "_scale": torch.tensor(1024.0),
                        "_growth_step": 5,
                        "_hysteresis_step": 1,
                    },
                    "flat_fp32_weights": {},
                    "base_optim_states": {"state": {}, "param_groups": []},
                }
                for _ in range(zero)
            ]
            for group, names in enumerate(groups):
                ranks: list[list[str]] = [[] for _ in range(zero)]
                for n in sorted(names, key=lambda n: weights[n].numel(), reverse=True):
                    min(
                        ranks, key=lambda own: sum(weights[o].numel() for o in own)
                    ).append(n)
                for own, file in zip(ranks, files, strict=True):
                    file["base_optim_states"]["param_groups"].append(
                        {"lr": 1e-3, "params": [group]}
                    )
                    if not own:
                        continue
                    flat = {
                        kind: torch.cat([local[kind][name][n].flatten() for n in own])
                        for kind in KINDS
                    }
                    file["flat_fp32_weights"][group] = flat.pop("master")
                    file["base_optim_states"]["state"][group] = {
                        "step": torch.tensor(9.0),
                        **flat,
                    }
            for z, file in enumerate(files):
                torch.save(file, step / f"optimizer_tp{t}_pp{p}_zo{z}.pt")
    torch.save({"batch_count": 9, "step_count": 9, "num_consumed_tokens": 999, "inf_nan_skip_batches": 1},
               step / "context.pt")  # fmt: skip
    torch.save({"last_epoch": 9, "base_lrs": [1e-3]}, step / "schedulder.pt")
    torch.save({"batch_size": 2, "raw_rampup_batch_size": None, "rng_state": np.random.RandomState(7).get_state(),
                "epoch": 0, "seed": 7, "data_world_size": 2, "num_consumed_samples_in_epoch": 20, "batch_count": 10,
                "indices": np.arange(40)}, step / "sampler.pt")  # fmt: skip
    return expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tp", "pp", "zero"), [(1, 1, 1), (2, 1, 3), (2, 2, 2)])
@pytest.mark.parametrize("norms", [torch.bfloat16, torch.float32])
def test_optimizer(
    tmp_path: Path, family: str, tp: int, pp: int, zero: int, norms: torch.dtype
) -> None:
    expected = make_training(tmp_path, family, tp, pp, zero, norms)
    tensors, state = read_optimizer(str(tmp_path / "9"), heads_of(family))
    assert equal(tensors, expected)
    assert state == {
        "optimizer": {"steps": 9},
        "scaler": {"scale": 1024.0, "good_steps": 5, "overflows": 1},
    }


def test_what_cannot_be_proved_is_refused_by_name(tmp_path: Path) -> None:
    make_training(tmp_path, "LLAMA2", 1, 1, 2, torch.bfloat16)
    folder = tmp_path / "9"
    file = folder / "optimizer_tp0_pp0_zo1.pt"
    content = torch.load(file)

    def refused(part: str) -> None:
        with pytest.raises(UserError, match=part) as caught:
            read_optimizer(str(folder), heads_of("LLAMA2"))
        assert "--weights-only" in str(caught.value)

    content["flat_fp32_weights"][0] = content["flat_fp32_weights"][0].flip(0)
    torch.save(content, file)
    refused(r"optimizer_tp0_pp0_zo1.pt: the master of .* is not its weight")
    content["flat_fp32_weights"][0] = content["flat_fp32_weights"][0][:-1]
    torch.save(content, file)
    refused(
        r"optimizer_tp0_pp0_zo1.pt: master of group 0 has \d+ elements, its parameters have \d+"
    )
    torch.save({"flat_fp32_weights": {}}, file)
    refused("optimizer_tp0_pp0_zo1.pt: has no base_optim_states")
    (folder / "optimizer_tp0_pp0_zo0.pt").unlink()
    refused("is incomplete; the folder has: optimizer_tp0_pp0_zo1.pt")
    (folder / "model_tp0_pp0.pt").rename(folder / "model_tp0_wp0_pp0.pt")
    refused("optimizer files of isp")
    torch.save({"last_epoch": 8}, folder / "schedulder.pt")
    with pytest.raises(
        UserError,
        match=r"schedulder.pt: the schedule is at 8 updates, the counters at 9",
    ):
        read_counters(str(folder))


def test_the_data_position_is_the_one_after_as_many_steps(
    tmp_path: Path, write_tokens: Any
) -> None:
    make_training(tmp_path, "LLAMA2", 1, 1, 1, torch.bfloat16)
    counters = read_counters(str(tmp_path / "9"))
    train = counters["train"]
    assert (train["step"], train["step_count"], train["num_consumed_tokens"]) == (
        10,
        9,
        999,
    )
    config = DataConfig(
        train_folder=str(write_tokens), seq_len=16, micro_num=2, seed=7, num_worker=0
    )
    data = build_train_data(config, 256)
    there = data.stream(0, 2, counters["sampler"])
    straight = data.stream(0, 2)
    for _ in range(10):
        next(straight)
    assert torch.equal(next(there).tokens, next(straight).tokens)
    for change in ({"seed": 8}, {"micro_num": 4}):
        other = build_train_data(config.model_copy(update=change), 256)
        with pytest.raises(
            UserError,
            match="InternEvo was at another position of the data after 10 steps",
        ):
            other.stream(0, 2, counters["sampler"])


@pytest.fixture
def write_tokens(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data")


CONFIG = """
model_type = "LLAMA2"
model = dict(num_layers=5, hidden_size=8, vocab_size=20, num_attention_heads=4, num_kv_attention_heads=2,
    mlp_ratio=1.5, multiple_of=4, no_bias=True, dtype="torch.bfloat16")
data = dict(seq_len=8, micro_num=4, seed=7, total_steps=12, train_folder=None)
ckpt = dict(save_ckpt_folder="local:out", checkpoint_every=100)
enable_tb = False
"""


def train(
    place: Path, interpreter: Interpreter, name: str, *sets: str
) -> list[dict[str, Any]]:
    """The run's records of its steps."""
    arguments = [word for text in sets for word in ("--set", text)]
    run = interpreter.run(
        ["evomesh", "train", "config.py", "--run-dir", name, *arguments], cwd=place
    )
    assert run.returncode == 0, run.stderr
    return [row for row in metrics(place / name) if "loss" in row]


def test_trained_on_after_conversion_and_without(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    """Convert and resume on the command line: a run continues with the optimizer, counters and position."""
    make_training(tmp_path, "LLAMA2", 2, 1, 2, torch.bfloat16)
    (tmp_path / "config.py").write_text(CONFIG)
    made = interpreter.run(
        [
            "evomesh",
            "convert",
            "from-internevo",
            "local:9",
            "out",
            "--config",
            "config.py",
        ],
        cwd=tmp_path,
    )
    assert made.returncode == 0, made.stderr
    assert "data position: step 10 with data.seed=7, 4 packs per step" in made.stdout
    rows = train(tmp_path, interpreter, "run")
    assert [row["step"] for row in rows] == [10, 11]
    assert rows[0]["num_consumed_tokens"] == 999 + 4 * 8

    given = (
        "ckpt.load_ckpt_info=dict(path='local:9', ckpt_type='internevo', content=(%s,))"
    )
    start = ["ckpt.auto_resume=False", "ckpt.save_ckpt_folder='direct'"]
    direct = train(tmp_path, interpreter, "direct_run", *start, given % "'all'")
    same = ("step", "loss", "grad_norm", "num_consumed_tokens")
    assert [[row[key] for key in same] for row in direct] == [
        [row[key] for key in same] for row in rows
    ]

    start[1] = "ckpt.save_ckpt_folder='parts'"
    sets = [*start, "data.total_steps=2"]
    weights, both = (
        train(tmp_path, interpreter, part[1:8], *sets, given % part) for part in PARTS
    )
    assert [row["step"] for row in weights + both] == [0, 1, 0, 1]
    assert weights[0]["loss"] == both[0]["loss"]
    # An update with moments of nine others.
    assert weights[1]["loss"] != both[1]["loss"]


PARTS = ("'model'", "'model', 'optimizer'")
