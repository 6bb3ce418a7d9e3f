"""``evomesh ckpt average`` against the mean computed here, over checkpoints of different layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from evomesh.checkpoint.native.average import average
from evomesh.checkpoint.native.commit import commit_tensors
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.load import CheckpointReader, resolve
from evomesh.checkpoint.native.reshard import reshard
from evomesh.checkpoint.restore import restore_model
from evomesh.config.record import config_to_dict
from evomesh.config.schema import Config, ModelConfig, ParallelConfig
from evomesh.errors import UserError
from evomesh.models.registry import build_model, initialize_weights
from evomesh.parallel.grid import Grid
from tests.support.tolerances import assert_equal_bits
from tests.unit.checkpoint.test_cli import ckpt

MODEL = ModelConfig(
    model_type="LLAMA2",
    num_layers=2,
    hidden_size=32,
    vocab_size=50,
    num_attention_heads=4,
    mlp_ratio=2.0,
    multiple_of=16,
    no_bias=True,
    dtype="bfloat16",
)


def weights_of(seed: int, model: ModelConfig = MODEL) -> dict[str, Tensor]:
    built = build_model(model)
    initialize_weights(built, seed, Grid())
    return {name: weight.detach() for name, weight in built.named_parameters()}


def save(
    root: Path, step: int, weights: dict[str, Tensor], model: ModelConfig = MODEL
) -> Checkpoint:
    state = {
        f"optim.exp_avg.{name}": weight.float() for name, weight in weights.items()
    }
    record = config_to_dict(Config(model=model))
    folder = commit_tensors(str(root), step, weights | state, {"step": step}, record)
    return resolve(folder)


@pytest.mark.parametrize("given", [None, [1.0, 1.0, 6.0]])
def test_mean_of_checkpoints_in_other_layouts(
    tmp_path: Path, given: list[float] | None
) -> None:
    all_weights = [weights_of(seed) for seed in range(3)]
    sources = []
    for number, weights in enumerate(all_weights):
        sources.append(save(tmp_path / str(number), 10 * (number + 1), weights))
    layout = ParallelConfig.model_validate(
        {"tensor": {"size": 2}, "pipeline": {"size": 2}}
    )
    sources[1] = resolve(reshard(sources[1], str(tmp_path / "four"), MODEL, layout, 4))
    assert len(sources[1].files) == 4

    folder = average(sources, given, str(tmp_path / "out"))

    found = restore_model(str(tmp_path / "out"))
    assert found.source.startswith("step 30") and folder.endswith("step-00000030")
    shares = given or [1.0, 1.0, 1.0]
    for name, weight in found.model.named_parameters():
        terms = [
            w[name].double() * share
            for w, share in zip(all_weights, shares, strict=True)
        ]
        mean = sum(terms[1:], terms[0]) / sum(shares)
        # One rounding, of a number that float64 has to within its own rounding.
        assert_equal_bits(weight.detach(), mean.bfloat16(), name)
    stored = resolve(folder)
    assert not any(name.startswith("optim.") for name in stored.index().names())
    assert stored.state["averaged"][0]["folder"] == sources[0].folder
    CheckpointReader().resolve(folder, "data")


def test_mean_of_one_tensor_in_several_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces of the result do not begin where those of the sources do."""
    tensors = [torch.randn(9, 7), torch.randn(9, 7)]
    record = config_to_dict(Config())
    sources = []
    for number, tensor in enumerate(tensors):
        monkeypatch.setattr(
            "evomesh.checkpoint.native.format.PIECE_BYTES", 60 + 30 * number
        )
        folder = commit_tensors(
            str(tmp_path / str(number)), 1, {"w": tensor}, {}, record
        )
        sources.append(resolve(folder))
    monkeypatch.setattr("evomesh.checkpoint.native.format.PIECE_BYTES", 100)
    folder = average(sources, [3.0, 1.0], str(tmp_path / "out"))
    found = torch.empty(9, 7)
    CheckpointReader().load(resolve(folder), {"w": found})
    expected = 0.75 * tensors[0].double() + 0.25 * tensors[1].double()
    assert_equal_bits(found, expected.float())


def test_other_models_are_refused(tmp_path: Path) -> None:
    first = save(tmp_path / "a", 1, weights_of(0))
    wide = MODEL.model_copy(update={"vocab_size": 60})
    second = save(tmp_path / "b", 1, weights_of(0, wide), wide)
    with pytest.raises(
        UserError, match=r"embedding.weight: BF16\[50, 32\] and BF16\[60, 32\]"
    ):
        average([first, second], None, str(tmp_path / "out"))
    rotated = MODEL.model_copy(update={"rope_base": 500_000})
    third = save(tmp_path / "c", 1, weights_of(0), rotated)
    with pytest.raises(UserError, match="rope_base"):
        average([first, third], None, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_command(tmp_path: Path) -> None:
    for number in range(2):
        save(tmp_path / str(number), 5, weights_of(number))
    paths = [str(tmp_path / name) for name in ("0", "1", "out")]
    assert "wrote " in ckpt("average", *paths, "--weights", "1,3")
    assert "committed" in ckpt("ls", paths[-1])
    for weights, words in (
        ("1", "1 weights for 2"),
        ("1,-1", "found -1"),
        ("a,b", "'a,b'"),
        ("0,1", "found 0"),
    ):
        with pytest.raises(UserError, match=words):
            ckpt("average", *paths, "--weights", weights)
    with pytest.raises(UserError, match="1 checkpoint to average"):
        ckpt("average", paths[0], str(tmp_path / "alone"))
