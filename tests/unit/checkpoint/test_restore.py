"""A model back from a checkpoint of ours and from the Hugging Face folder made of it: the same function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evomesh.checkpoint.huggingface import export as export_module
from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.restore import RestoredModel, load_model, restore_model
from evomesh.config.data import DataConfig
from evomesh.config.schema import GenerationConfig
from evomesh.errors import UserError
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.serve.load import ModelOptions, load_service
from tests.support.serving import byte_tokenizer
from tests.unit.checkpoint.huggingface.hf_models import export, model_config, save_model

IDS = torch.tensor([3, 7, 11, 20, 5])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``ckpts``, and ``hf``, the folder made of it, with a tokenizer of single bytes."""
    byte_tokenizer(tmp_path / "tok")
    config = model_config(
        "INTERNLM2_PUBLIC",
        vocab_size=256,
        qk_interleaved=True,
        use_dynamic_ntk_rope=True,
    )
    settings = GenerationConfig(eos_id=(2, 9), bos_id=1)
    _, found = save_model(tmp_path / "ckpts", config, str(tmp_path / "tok"), settings)
    export(found, tmp_path / "hf", ExportOptions(compare=False), lambda line: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def logits(restored: RestoredModel) -> torch.Tensor:
    with torch.inference_mode():
        return restored.model.logits(restored.model(IDS, single_sequence(len(IDS))))


def test_a_hugging_face_folder_is_the_same_model(place: Path) -> None:
    ours, theirs = restore_model("ckpts"), restore_model("hf")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-11, atol=1e-12)
    assert not theirs.model.training
    assert theirs.config.model.use_dynamic_ntk_rope
    assert ours.source == "step 7 of ckpts" and theirs.source == "hf"


def test_a_model_of_the_hubs_cache(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = place / "hub/models--some--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("abc")
    (cache / "snapshots").mkdir()
    (place / "hf").rename(cache / "snapshots/abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(place / "hub"))
    assert torch.isfinite(logits(restore_model("some/model"))).all()


def test_the_fingerprint_tells_weights_apart(place: Path) -> None:
    before = restore_model("hf").fingerprint
    assert restore_model("hf").fingerprint == before
    file = place / "hf/model.safetensors"
    data = bytearray(file.read_bytes())
    record = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = (
        8
        + int.from_bytes(data[:8], "little")
        + record["model.norm.weight"]["data_offsets"][0]
    )
    data[start] ^= 1  # the last bit of a float64
    file.write_bytes(data)
    assert restore_model("hf").fingerprint != before


def test_the_service_of_a_folder(place: Path) -> None:
    ours, theirs = (
        load_service(name, "cpu", ModelOptions()).model for name in ("ckpts", "hf")
    )
    assert theirs.name == "hf"
    assert theirs.fingerprint.startswith("hf-")
    for key in ("vocab_size", "trained_length", "rotary_type"):
        assert getattr(theirs, key) == getattr(ours, key)
    assert set(theirs.eos_ids) == set(ours.eos_ids) == {2, 9}
    assert theirs.tokenizer.encode("ab") == ours.tokenizer.encode("ab")


def test_a_service_is_refused_at_once_where_keys_and_values_cannot_be_paged(
    place: Path,
) -> None:
    with pytest.raises(UserError, match="paged keys and values: it is on cpu"):
        load_service("hf", "cpu", ModelOptions(paged="on"))


def test_other_folders_are_named(place: Path) -> None:
    for name, words in (
        ("model_tp0_pp0.pt", "an InternEvo checkpoint"),
        ("weights.pth", "pickled PyTorch files"),
    ):
        folder = place / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(b"")
        with pytest.raises(UserError, match=f"is {words}(.|\n)*evomesh convert"):
            restore_model(str(folder))
    (place / "hf/model.safetensors").unlink()
    with pytest.raises(UserError, match="no checkpoint at 'hf'"):
        restore_model("hf")


def test_a_relative_tokenizer_path_is_the_run_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    byte_tokenizer(tmp_path / "tok")
    config = model_config("LLAMA2", vocab_size=256)
    _, found = save_model(tmp_path / "ckpts", config, "tok", GenerationConfig())
    ckpts = str(tmp_path / "ckpts")
    assert load_model(ckpts).tokenizer.vocab_size == 256

    def warnings(data: DataConfig, given: str | None) -> list[str]:
        return [f"of {data.tokenizer_path} and {given}"]

    monkeypatch.setattr(export_module, "other_tokenizer", warnings)
    exported: list[str] = []
    options = ExportOptions(compare=False, tokenizer=str(tmp_path / "tok"))
    export(found, tmp_path / "hf", options, exported.append)
    assert f"warning: of tok and {tmp_path / 'tok'}" in exported

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    words = f"no tokenizer at tok in {elsewhere}: the path is relative to where the run was started"
    with pytest.raises(UserError) as refusal:
        load_model(ckpts)
    assert refusal.value.where == f"data.tokenizer_path in the config of {ckpts}"
    assert words in str(refusal.value)
    assert "fix: give one with --tokenizer PATH" in str(refusal.value)
    with pytest.raises(UserError, match="no tokenizer at other") as refusal:
        load_model(ckpts, tokenizer="other")
    assert refusal.value.where == "--tokenizer"
    lines: list[str] = []
    export(found, elsewhere / "hf", ExportOptions(compare=False), lines.append)
    assert f"no tokenizer is exported: {words}; give one with --tokenizer PATH" in lines
