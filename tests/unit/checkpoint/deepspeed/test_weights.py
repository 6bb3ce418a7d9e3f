"""Checkpoints of XTuner and DeepSpeed: every weight as it was, or a refusal that says what is wrong."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evomesh.checkpoint.deepspeed.load import load_xtuner_state
from evomesh.checkpoint.deepspeed.weights import XTunerWeights
from evomesh.checkpoint.native.boxes import Box
from evomesh.errors import UserError
from tests.support.covers import covers
from tests.support.deepspeed import Zero, meta_of, save, write_file


def tensors(*shapes: tuple[int, ...], prefix: str = "llm.p") -> dict[str, Tensor]:
    """Named tensors of numbers that are all different, and that bfloat16 would round."""
    numbers = iter(range(1, 10**6))
    return {
        f"{prefix}{n}.weight": torch.tensor(
            [next(numbers) + 0.001 for _ in range(torch.Size(shape).numel())]
        ).view(shape)
        for n, shape in enumerate(shapes)
    }


# 35, 1, 24 and 7 numbers: no count of ranks below divides all of them.
MATRICES = tensors((5, 7), (1,), (4, 6))
VECTORS = tensors((7,), (2,), prefix="llm.v")
FROZEN = tensors((3, 3), (5,), prefix="llm.f")


def bare(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("llm."): value for name, value in named.items()}


def assert_holds(path: Path, expected: dict[str, Tensor]) -> XTunerWeights:
    weights = XTunerWeights(str(path))
    assert weights.shapes == {k: tuple(v.shape) for k, v in expected.items()}
    for name, value in expected.items():
        read = weights.read(name)
        assert read.dtype == value.dtype and torch.equal(read, value), name
    return weights


CASES: dict[str, dict[str, Any]] = {
    "zero1": dict(stage=1, prefix=""),
    "zero2": dict(stage=2),
    "zero2-gaps": dict(stage=2, gap=3),
    "zero2-no-gaps": dict(stage=2, gap=0),
    "zero3": dict(stage=3),
    "zero3-parts-in-two-flats": dict(stage=3, flats=3),
}


@covers("promise:xtuner-checkpoints")
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_every_rank_count_gives_the_same_weights(
    case: str, ranks: int, tmp_path: Path
) -> None:
    zero = Zero(
        [MATRICES, VECTORS],
        ranks=ranks,
        frozen=FROZEN,
        buffers={"llm.count": torch.arange(3)},
        alias={"llm.head.weight": "llm.p0.weight"},
        **CASES[case],
    )
    expected = bare({**MATRICES, **VECTORS, **FROZEN})
    expected |= {"count": torch.arange(3), "head.weight": MATRICES["llm.p0.weight"]}
    weights = assert_holds(zero.write(tmp_path / "iter_9.pth"), expected)
    assert weights.stage == zero.stage
    part = weights.read("p2.weight", Box((1, 2), (2, 3)))
    assert torch.equal(part, MATRICES["llm.p2.weight"][1:3, 2:5])


def test_without_the_optimizers_files_the_models_own_weights_are_read(
    tmp_path: Path,
) -> None:
    folder = Zero([MATRICES]).write(tmp_path / "iter_9.pth")
    for file in folder.glob("*optim_states.pt"):
        file.unlink()
    expected = {name: value.bfloat16() for name, value in bare(MATRICES).items()}
    assert assert_holds(folder, expected).stage == 0


@pytest.mark.parametrize("name", ["llm.{}", "module.llm.{}", "{}"])
def test_a_file_of_mmengine(name: str, tmp_path: Path) -> None:
    state = {
        name.format(bare_name): value for bare_name, value in bare(MATRICES).items()
    }
    state |= {name.format("model.rotary_emb.inv_freq"): torch.ones(4)}
    file = write_file(tmp_path / "iter_9.pth", state)
    assert_holds(file, bare(MATRICES))
    # A state dict alone, as torch.save(model.state_dict()) writes it.
    assert_holds(save(state, tmp_path / "plain.pth"), bare(MATRICES))


def test_the_newest_checkpoint_of_a_folder(tmp_path: Path) -> None:
    for number, case in ((9, "zero2"), (12, "zero3")):
        Zero([MATRICES], **CASES[case]).write(tmp_path / f"iter_{number}.pth")
    assert XTunerWeights(str(tmp_path)).stage == 3
    (tmp_path / "last_checkpoint").write_text("/elsewhere/work_dirs/x/iter_9.pth")
    assert XTunerWeights(f"local:{tmp_path}").stage == 2
    (tmp_path / "latest").write_text("iter_12.pth\n")
    assert XTunerWeights(str(tmp_path)).stage == 3


@pytest.mark.parametrize("text", ["../out", "/etc", "iter_77.pth", "", "."])
def test_latest_names_nothing_outside_its_folder(text: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    for folder in (work, tmp_path / "out"):
        Zero([MATRICES]).write(folder / "iter_9.pth")
    Zero([MATRICES]).write(tmp_path / "out")
    (work / "latest").write_text(text)
    with pytest.raises(UserError, match="is not in this folder"):
        XTunerWeights(str(work))


def refused(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        XTunerWeights(str(path))
    assert str(path) in str(caught.value)


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def copy(source: str, target: str) -> Any:
    return lambda folder: shutil.copy(folder / source, folder / target)


def replace(name: str, **changes: Any) -> Any:
    """Overwrite one file with that of a checkpoint of other settings."""

    def change(folder: Path) -> None:
        other = Zero(**{"groups": [MATRICES], "ranks": 3, **changes})
        shutil.copy(other.write(folder / "other") / name, folder / name)

    return change


SHARD = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt".format
STAGE_3 = "zero_pp_rank_{}_mp_rank_00_model_states.pt".format
WRONG: dict[str, tuple[int, Any, str]] = {
    "missing-shard": (2, remove(SHARD(1)), r"2 files \*_optim_states.*3 ranks.*rank 1"),
    "missing-last-shard": (3, remove(SHARD(2)), r"2 files.*3 ranks.*rank 2"),
    "missing-model-of-stage-3": (3, remove(STAGE_3(1)), r"2 files \*_model_states.*1"),
    "no-model": (2, remove("mp_rank_00_model_states.pt"), "no mp_rank_00_model_states"),
    "one-shard-too-many": (2, copy(SHARD(0), SHARD(3)), "4 files.*3 ranks"),
    "another-world-size": (2, replace(SHARD(1), ranks=2), "is of 2 ranks, others are"),
    "another-stage": (2, replace(SHARD(1), stage=1), r"is of stage 2.*is of stage 1"),
    "both-stages": (2, copy("mp_rank_00_model_states.pt", STAGE_3(0)), "mixes ZeRO"),
    "two-runs": (
        2,
        copy(SHARD(0), SHARD(0).removeprefix("bf16_")),
        "two files of rank 0",
    ),
    "tensor-parallel": (
        2,
        copy(SHARD(0), "zero_pp_rank_0_mp_rank_01_optim_states.pt"),
        "tensor parallel",
    ),
    "experts": (
        2,
        copy(SHARD(0), "layer_0_expert_0_mp_rank_00_model_states.pt"),
        "experts",
    ),
    "shard-of-another-model": (
        2,
        replace(SHARD(1), groups=[VECTORS]),
        r"have 60 numbers, the parts of 3 ranks 44",
    ),
    "shard-of-another-model-3": (
        3,
        replace(SHARD(1), stage=3, groups=[VECTORS]),
        r"21 numbers on each of 3 ranks, the file of rank 1 has 4",
    ),
    "another-number-of-groups": (
        2,
        replace("mp_rank_00_model_states.pt", groups=[MATRICES, VECTORS]),
        r"2 optimizer groups.*\[1\]",
    ),
    "part-of-stage-3": (
        3,
        lambda folder: [os.unlink(folder / SHARD(n)) for n in range(3)],
        "keeps its weights in",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_together_is_named_with_its_numbers(
    case: str, tmp_path: Path
) -> None:
    stage, change, message = WRONG[case]
    folder = Zero([MATRICES], stage=stage, ranks=3).write(tmp_path / "iter_9.pth")
    change(folder)
    refused(folder, message)


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    folder = Zero([MATRICES]).write(tmp_path / "iter_9.pth")
    file = folder / SHARD(1)
    file.write_bytes(file.read_bytes()[:-200])
    refused(file.parent, "cannot be read")


def test_a_changed_byte_is_found_when_the_weight_is_read(tmp_path: Path) -> None:
    file = write_file(tmp_path / "iter_9.pth", MATRICES)
    number = MATRICES["llm.p0.weight"][0, :2].numpy().tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(number)] ^= 1
    file.write_bytes(content)
    weights = XTunerWeights(str(file))
    assert torch.equal(weights.read("p2.weight"), MATRICES["llm.p2.weight"])
    with pytest.raises(UserError, match="checksum"):
        weights.read("p0.weight")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["llm.base_model.model.model.norm.lora_A.weight"], "LoRA adapters are not"),
        (["llm.model.layers.0.q_proj.lora_B.default.weight"], "LoRA adapters are not"),
        (["llm.model.norm.weight", "projector.model.0.weight"], "1 tensors are not of"),
    ],
)
def test_other_kinds_of_models(names: list[str], message: str, tmp_path: Path) -> None:
    state = {name: torch.ones(2, 2) for name in names}
    refused(write_file(tmp_path / "iter_9.pth", state), message)


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    refused(tmp_path, "no checkpoint of XTuner")
    refused(tmp_path / "absent", "no such file")
    refused(save({"a": 1}, tmp_path / "a.pth"), "no named tensors")
    refused(save([1], tmp_path / "b.pth"), "no named tensors")
    with pytest.raises(UserError, match="local disk"):
        XTunerWeights("boto3:s3://bucket.host/iter_9.pth")


class Command:
    """Runs a command where a reader calls what a pickle names."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_that_a_file_names_is_run(stage: int, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    folder = Zero([MATRICES], stage=stage).write(tmp_path / "iter_9.pth")
    for file in folder.iterdir():
        before = file.read_bytes()
        save({"module": Command(victim)}, file)
        refused(folder, "it names posix.system")
        file.write_bytes(before)
    refused(
        write_file(tmp_path / "iter_8.pth", {}, extra=Command(victim)), "posix.system"
    )
    assert not victim.exists()


@pytest.mark.parametrize(
    "view",
    [
        torch.ones(1).expand(10**12),
        torch.ones(2, 1).expand(2, 10**12),
    ],
    ids=["one", "rows"],
)
def test_a_small_file_does_not_become_a_large_tensor(
    view: Tensor, tmp_path: Path
) -> None:
    file = write_file(tmp_path / "iter_9.pth", {"llm.w": view})
    assert file.stat().st_size < 10**4
    refused(file, "its storage [12] numbers")


@pytest.mark.parametrize("field", ["param_shapes", "frozen_param_shapes"])
def test_shapes_that_the_files_cannot_fill_are_refused(
    field: str, tmp_path: Path
) -> None:
    """The sizes are compared with the stored numbers before anything is allocated."""
    zero = Zero([MATRICES], frozen=FROZEN)
    folder = zero.write(tmp_path / "iter_9.pth")
    for shape, message in (((10**9, 10**9), "numbers"), ((-1,), field), ("x", field)):
        states = zero.model_states(0)
        shapes = states[field][0] if field == "param_shapes" else states[field]
        shapes[next(iter(shapes))] = shape
        save(states, folder / "mp_rank_00_model_states.pt")
        refused(folder, message)


def test_the_steps_of_a_run(tmp_path: Path) -> None:
    folder = Zero([MATRICES], steps=7, skipped=2).write(tmp_path / "iter_21.pth")
    state = load_xtuner_state(str(folder))
    train = state["train"]
    assert (train["step"], train["step_count"], train["inf_nan_skip_batches"]) == (
        7,
        5,
        2,
    )
    assert state["sampler"] == {"xtuner": {"step": 7}}
    # A file counts micro-iterations: 11 of them are 3 whole steps of 3.
    file = write_file(tmp_path / "iter_11.pth", MATRICES, **meta_of(11))
    assert load_xtuner_state(str(file))["train"]["step"] == 3


@pytest.mark.parametrize(
    "meta",
    [{}, {"iter": 9}, {"iter": -9, "cfg": "accumulative_counts = 3"}, {"iter": "9"}]
    + [
        {"iter": 9, "cfg": text}
        for text in (
            "accumulative_counts = 0",
            "accumulative_counts = 3\naccumulative_counts = 4",
        )
    ],
    ids=str,
)
def test_a_file_that_does_not_tell_its_step(
    meta: dict[str, Any], tmp_path: Path
) -> None:
    file = write_file(tmp_path / "iter_9.pth", MATRICES, meta=meta)
    with pytest.raises(UserError, match="does not tell its step"):
        load_xtuner_state(str(file))
