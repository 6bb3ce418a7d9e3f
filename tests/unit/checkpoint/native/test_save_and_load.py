"""Save, find, verify and load on one process."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evomesh.checkpoint.native.find import SaveFolder
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.errors import UserError
from tests.support.covers import covers


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "embedding.weight": torch.randn(103, 16, generator=g).to(torch.bfloat16),
        "layers.0.w": torch.randn(16, 43, generator=g),
        "optim.exp_avg.layers.0.w": torch.randn(
            16, 43, generator=g, dtype=torch.float64
        ),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "f8": torch.randn(5, generator=g).to(torch.float8_e4m3fn),
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def bits(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous().reshape(-1).view(torch.uint8)

    return all(torch.equal(bits(a[k]), bits(b[k])) for k in a)


STATE = {
    "step": 3,
    "scaler": {"scale": math.inf, "bad": math.nan},
    "rng": b"\x00\xff",
    "text": "中文",
    "big": 2**60,
}


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    writer = CheckpointWriter(f"local:{tmp_path}/ckpts")
    source = tensors()
    folder = writer.save(3, source, STATE, {"lr": 0.1})
    assert folder == f"{tmp_path}/ckpts/step-00000003"
    found = CheckpointReader().newest(SaveFolder.open(str(tmp_path / "ckpts")))
    assert found is not None and found.step == 3 and found.config == {"lr": 0.1}
    target = {name: torch.zeros_like(t) for name, t in source.items()}
    state = CheckpointReader().load(found, target)
    assert same(source, target)
    assert state["scaler"]["scale"] == math.inf and math.isnan(state["scaler"]["bad"])
    assert (
        state["rng"] == b"\x00\xff"
        and state["text"] == "中文"
        and state["big"] == 2**60
    )


def test_any_safetensors_reader_opens_the_data_file(tmp_path: Path) -> None:
    source = tensors()
    folder = CheckpointWriter(str(tmp_path)).save(1, source, {}, {})
    (file,) = Path(str(folder)).glob("*.safetensors")
    loaded = load_file(file)
    assert same({k: v for k, v in source.items() if v.numel()}, loaded)
    names = {p.suffix for p in Path(str(folder)).iterdir()}
    assert names == {".safetensors", ".jsonl", ".json"}


def test_a_damaged_newest_checkpoint_is_skipped_with_the_reason(tmp_path: Path) -> None:
    said: list[str] = []
    writer = CheckpointWriter(str(tmp_path))
    for step in (1, 2, 3):
        writer.save(step, tensors(step), {"step": step}, {})
    (tmp_path / "step-00000003" / "commit.json").unlink()
    (data,) = (tmp_path / "step-00000002").glob("*.safetensors")
    raw = bytearray(data.read_bytes())
    raw[-1] ^= 1
    data.write_bytes(raw)
    found = CheckpointReader(report=said.append).newest(writer.folder)
    assert found is not None and found.step == 1
    text = "\n".join(said)
    lost = "no commit.json: an interrupted save, or a checkpoint that lost its record"
    assert f"step-00000003: {lost}" in text
    assert "does not match its hash" in text and data.name in text and "using" in text


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path))
    writer.save(1, tensors(), {}, {})
    (tmp_path / "step-00000001" / "commit.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint verifies"):
        CheckpointReader().newest(writer.folder)


def test_an_absent_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointReader().newest(SaveFolder.open(str(tmp_path / "none"))) is None


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path))
    writer.save(1, {"a.weight": torch.zeros(2, 3), "b": torch.zeros(1)}, {}, {})
    found = CheckpointReader().newest(writer.folder)
    assert found is not None
    with pytest.raises(
        UserError,
        match=r"a\.weight: checkpoint has F32\[2,3\], the model wants F32\[2,4\]",
    ):
        CheckpointReader().load(
            found, {"a.weight": torch.zeros(2, 4), "b": torch.zeros(1)}
        )
    with pytest.raises(UserError) as caught:
        CheckpointReader().load(
            found, {"a.weight": torch.zeros(2, 4), "b": torch.zeros(7)}
        )
    assert str(caught.value).splitlines()[:3] == [
        f"{found.folder}: 2 tensors differ:",
        "  a.weight: checkpoint has F32[2,3], the model wants F32[2,4]",
        "  b: checkpoint has F32[1], the model wants F32[7]",
    ]
    with pytest.raises(UserError, match=r"wants BF16\[2,3\]"):
        CheckpointReader().load(
            found, {"a.weight": torch.zeros(2, 3, dtype=torch.bfloat16)}, strict=False
        )
    with pytest.raises(
        UserError,
        match=r"no 'a\.wieght' \(1 name\); the closest name there is 'a\.weight'",
    ):
        CheckpointReader().load(
            found, {"a.wieght": torch.zeros(2, 3), "b": torch.zeros(1)}
        )
    with pytest.raises(
        UserError, match=r"unexpected tensors in the checkpoint: 'b' \(1 name\)"
    ):
        CheckpointReader().load(found, {"a.weight": torch.zeros(2, 3)})
    CheckpointReader().load(found, {"a.weight": torch.zeros(2, 3)}, strict=False)


@covers("ckpt.save_ckpt_folder")
@pytest.mark.parametrize(
    "form", ["", "/", "/2", "/2/", "/step-00000002", "/step-00000002/"]
)
def test_every_form_of_a_path_resolves(tmp_path: Path, form: str) -> None:
    writer = CheckpointWriter(str(tmp_path))
    for step in (1, 2):
        writer.save(step, {"a": torch.ones(2) * step}, {}, {})
    for prefix in ("", "local:"):
        assert CheckpointReader().resolve(f"{prefix}{tmp_path}{form}").step == 2
    assert CheckpointReader().resolve(f"{tmp_path}/1").step == 1
    with pytest.raises(UserError, match="has steps 2, 1"):
        CheckpointReader().resolve(f"{tmp_path}/7")
    with pytest.raises(UserError, match="no checkpoint at"):
        CheckpointReader().resolve(f"{tmp_path}/other")


def test_a_committed_step_is_not_rewritten(tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path))
    first = writer.save(1, {"a": torch.ones(2)}, {}, {})
    before = json.loads((tmp_path / "step-00000001" / "commit.json").read_text())
    assert writer.save(1, {"a": torch.zeros(2)}, {}, {}) == first
    again = CheckpointWriter(str(tmp_path))  # another run, which did not resume from it
    writer.close()
    second = again.save(1, {"a": torch.zeros(2)}, {}, {})
    assert second != first
    assert (
        json.loads((tmp_path / "step-00000001" / "commit.json").read_text()) == before
    )


@pytest.mark.parametrize("url", ["s4:bucket/x", "volc:vc://b.e/k", "local:"])
def test_unknown_prefixes_are_refused(url: str) -> None:
    with pytest.raises(UserError):
        CheckpointWriter(url)


def test_large_tensors_are_cut_into_pieces(tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path))
    big = torch.randn(3, 1100, 1000)  # 13.2 MB, rows of 4.4 MB
    writer.save(1, {"big": big, "t": big.transpose(0, 2)}, {}, {})
    found = CheckpointReader().newest(writer.folder)
    assert found is not None
    records = found.records()
    assert len(records["big"].pieces) == 6
    assert max(p.box.numel * 4 for r in records.values() for p in r.pieces) <= 4 << 20
    target = {"big": torch.zeros_like(big), "t": torch.zeros(1000, 1100, 3)}
    CheckpointReader().load(found, target)
    assert torch.equal(target["big"], big) and torch.equal(
        target["t"], big.transpose(0, 2)
    )
