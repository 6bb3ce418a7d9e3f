"""Layouts as a user writes them: what they set, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.diagnose.layouts import layout_overrides, ranks_for, read_layouts
from evomesh.errors import UserError

CONFIG = """
model_type = "LLAMA2"
model = dict(num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=64, dtype="torch.float32", no_bias=True)
data = dict(seq_len=32, micro_num=4, total_steps=1)
parallel = dict(tensor=dict(size=4, mode="msp"), zero1=dict(size=2))
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "config.py").write_text(CONFIG)
    return str(tmp_path / "config.py")


def test_a_layout_says_all_of_itself(path: str) -> None:
    layout = "pipeline=2, chunks=2,schedule=interleaved"
    own, written = read_layouts(path, [layout, "config"])
    parallel = own.config.parallel
    assert (parallel.pipeline.size, own.config.model.num_chunks) == (2, 2)
    assert parallel.pipeline.schedule == "interleaved"
    # Nothing of the file's layout is left.
    assert (parallel.tensor.size, parallel.tensor.mode) == (1, "mtp")
    assert parallel.zero1.size == -1 and not parallel.zero1.fsdp
    assert written.config.parallel.tensor.mode == "msp"
    assert written.config.parallel.zero1.size == 2


@pytest.mark.parametrize(
    ("names", "ranks"),
    [
        (["tensor=2"], 2),
        (["tensor=2", "pipeline=2,tensor=2"], 4),
        (["tensor=2,mode=isp,weight=4", "config"], 4),
        (["zero1=-1"], 1),
    ],
)
def test_the_fewest_ranks_in_which_all_layouts_fit(
    path: str, names: list[str], ranks: int
) -> None:
    assert ranks_for(read_layouts(path, names)) == ranks


@pytest.mark.parametrize("name", ["tensr=2", "tensor", "tensor=", ""])
def test_a_layout_that_cannot_be_read_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="KEY=VALUE with one of tensor, mode") as caught:
        layout_overrides(name)
    assert caught.value.exit_code == 2 and repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["tensor=3", "mode=xyz", "tensor=2;pipeline=2"])
def test_a_layout_that_the_config_does_not_allow_is_refused(
    path: str, name: str
) -> None:
    with pytest.raises(UserError, match=r"parallel\.tensor"):
        read_layouts(path, [name])
