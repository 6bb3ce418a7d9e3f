"""Layouts that cannot be: each one message that names the keys and the nearest sizes that can."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.config.layout import check_world
from evomesh.config.loader import load_config
from evomesh.errors import ConfigError

MODEL = (
    "model=dict(num_layers=8,hidden_size=48,num_attention_heads=12,num_kv_attention_heads=6,mlp_ratio=2.0,"
    "multiple_of=36,vocab_size=64,no_bias=True,dtype='torch.float32')"
)
BAD = [
    (
        ["parallel.tensor=5"],
        ["5 does not divide num_attention_heads=12", "size=4 or 6"],
    ),
    (
        ["parallel.tensor=4"],
        ["4 does not divide num_kv_attention_heads=6", "size=3 or 6"],
    ),
    (
        ["parallel.tensor=dict(size=3,mode='msp')", "data.seq_len=64"],
        ["3 does not divide the packed length 64", "2 or 4"],
    ),
    (["parallel.tensor=dict(size=2,mode='2d')"], ["2d"]),
    (["parallel.weight=2"], ["weight.size=2 needs tensor mode isp"]),
    (
        ["parallel.weight=5", "parallel.tensor.mode=isp"],
        ["5 does not divide the hidden_size, 48", "size=4 or 6"],
    ),
    (
        ["parallel.zero1.fsdp=True", "parallel.tensor.mode=isp"],
        ["redundant with tensor mode isp", "parallel.weight=dict"],
    ),
    (
        ["parallel.pipeline=4", "model.num_chunks=3", "data.micro_num=4"],
        ["need 12 layers, num_layers=8", "at most 2"],
    ),
    (
        ["parallel.pipeline=4", "model.num_chunks=2", "data.micro_num=6"],
        ["micro_num=6", "4 or 8"],
    ),
    (
        [
            "parallel.pipeline=2",
            "model.num_chunks=2",
            "data.micro_num=4",
            "data.rampup_batch_size=1 1 10",
        ],
        [
            "rampup_batch_size=1 1 10 is not a multiple of the 2 stages",
            "start and increment multiples of 2",
        ],
    ),
    (
        ["parallel.pipeline=dict(size=2,schedule='zbv')"],
        ["schedule zbv with num_chunks=1", "zbv has num_chunks=2"],
    ),
    (
        [
            "parallel.pipeline=dict(size=2,schedule='1f1b')",
            "model.num_chunks=2",
            "data.micro_num=2",
        ],
        ["schedule 1f1b with num_chunks=2", "1f1b has num_chunks=1"],
    ),
    (
        [
            "parallel.pipeline=dict(size=2,schedule='zbv')",
            "model.num_chunks=2",
            "model.compile=True",
        ],
        ["zbv cannot be combined with compile", "computes both together"],
    ),
    (
        [
            "parallel.pipeline=dict(size=2,schedule='zbv')",
            "model.num_chunks=2",
            "parallel.zero1.fsdp=True",
        ],
        ["zbv cannot be combined with fsdp", "FSDP2 reshards a block"],
    ),
]


@pytest.mark.parametrize(("sets", "words"), BAD, ids=lambda value: " ".join(value)[:60])
def test_bad_layout(sets: list[str], words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text(
        f'model_type = "LLAMA2"\n{MODEL}\ndata = dict(train_folder="x", seq_len=96)\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), sets)
    for word in words:
        assert word in str(caught.value)


def test_what_fsdp_leaves_whole_is_said(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text(
        f'model_type = "LLAMA2"\n{MODEL}\ndata = dict(train_folder="x", seq_len=96)\n'
    )
    config = load_config(
        str(path), ["parallel.zero1.fsdp=True", "parallel.tensor=2"]
    ).config
    assert check_world(config, 4) == []
    (words,) = check_world(config, 6)
    assert (
        "embedding and head (32 rows per tensor rank)" in words
        and "attention" not in words
    )
    (words,) = check_world(config, 2)
    assert (
        words
        == "parallel.zero1.fsdp: has no effect, because there is only one rank to share the weights"
    )
