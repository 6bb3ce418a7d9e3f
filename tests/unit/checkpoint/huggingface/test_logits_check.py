"""The logits check finds mistakes of our reading and writing: its reference is what transformers reads itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from evomesh.checkpoint.huggingface import export as export_module
from evomesh.checkpoint.huggingface import load as load_module
from evomesh.checkpoint.huggingface.checklist import checklist
from evomesh.checkpoint.huggingface.data_files import DataFiles
from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.huggingface.folder import HfFolder
from evomesh.checkpoint.huggingface.stock_logits import fixed_batch, stock_logits
from evomesh.checkpoint.huggingface.to_native import from_hf
from evomesh.checkpoint.native.read import read_tensor
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.config.record import config_to_dict
from evomesh.config.schema import Config
from evomesh.errors import UserError
from evomesh.storage.local import LocalStorage
from tests.unit.checkpoint.huggingface.hf_models import (
    VOCAB,
    export,
    found_in,
    model_config,
    random_model,
    save_model,
)

COMPARED = ExportOptions(tokenizer="none")
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _, found = save_model(tmp_path / "native", model_config(dtype="float32"))
    return export(found, tmp_path / "hf", replace(COMPARED, compare=False), print)


def read_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let our reader of Hugging Face folders return one weight with a mistake."""
    right = HfFolder.read

    def wrong(self: HfFolder, name: str, box: Any = None) -> torch.Tensor:
        value = right(self, name, box)
        return value.flip(0) if name == WEIGHT else value

    monkeypatch.setattr(HfFolder, "read", wrong)


def test_import_checks_against_the_folder_as_transformers_reads_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_wrongly(monkeypatch)
    with pytest.raises(UserError, match="between the native model and transformers"):
        from_hf(str(folder), str(tmp_path / "c"), None, True, print)
    assert not list((tmp_path / "c").rglob("*.json"))


def test_checklist_compares_what_evomesh_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def transformers_line() -> Any:
        (item,) = [i for i in checklist(str(folder)) if i.name == "transformers"]
        return item

    assert transformers_line().passed
    read_wrongly(monkeypatch)
    assert not transformers_line().passed
    assert "logits differ" in transformers_line().detail


def test_export_checks_the_bytes_of_the_data_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in reading the checkpoint by its index is exported, and found."""
    _, found = save_model(tmp_path / "c", model_config(dtype="float32"))

    def wrong(found: Any, record: Any, *rest: Any) -> torch.Tensor:
        value = read_tensor(found, record, *rest)
        return (
            value.flip(0) if record.name.endswith("1.feed_forward.w3.weight") else value
        )

    monkeypatch.setattr(export_module, "read_tensor", wrong)
    with pytest.raises(UserError, match="between the native model and transformers"):
        export(found, tmp_path / "hf", COMPARED, print)
    assert not (tmp_path / "hf").exists()


def test_a_round_trip_compares_original_and_export_in_transformers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_hf(str(folder), str(tmp_path / "c"), "bfloat16", False, print)
    lines: list[str] = []
    options = replace(COMPARED, dtype="float16")
    export(found_in(tmp_path / "c"), tmp_path / "again", options, lines.append)
    (line,) = [line for line in lines if "the original" in line]
    assert line.startswith("largest logit difference between the exported folder and")
    assert line.endswith("both in transformers: 0")

    # An import that went wrong where nobody compared it: native and export agree.
    right = load_module.foreign_to_native
    monkeypatch.setattr(
        load_module,
        "foreign_to_native",
        lambda link, values, *rest: right(
            link, [value.flip(0) for value in values], *rest
        ),
    )
    from_hf(str(folder), str(tmp_path / "wrong"), None, False, print)
    with pytest.raises(UserError, match="between the exported folder and the original"):
        export(found_in(tmp_path / "wrong"), tmp_path / "third", COMPARED, print)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("change", ["weights", "gone"])
def test_an_original_that_changed_is_not_compared(
    change: str, folder: Path, tmp_path: Path
) -> None:
    from_hf(str(folder), str(tmp_path / "c"), None, False, print)
    if change == "gone":
        (folder / "config.json").unlink()
    else:
        state = load_file(folder / "model.safetensors")
        save_file(state | {WEIGHT: state[WEIGHT] + 1}, folder / "model.safetensors")
    lines: list[str] = []
    export(found_in(tmp_path / "c"), tmp_path / "again", COMPARED, lines.append)
    assert not any("the original" in line for line in lines)
    assert any("the native model and transformers" in line for line in lines)


@pytest.mark.parametrize("kind", ["internlm", "internlm2"])
def test_folders_without_a_class_are_computed_as_the_llama_they_describe(
    kind: str, folder: Path
) -> None:
    """The InternLM folders are made here from a Llama of transformers, whose logits are known."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 if kind == "internlm" else 2,
        rope_theta=300.0,
        rms_norm_eps=1e-4,
        attention_bias=kind == "internlm",
        initializer_range=0.4,
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter))
    state = {name: value.clone() for name, value in llama.state_dict().items()}
    if kind == "internlm2":
        state = as_internlm2(state)
    save_file(state, folder / "model.safetensors")
    record = config.to_dict()
    for key in ("rope_parameters", "rope_scaling", "rope_theta", "attention_bias"):
        record.pop(key, None)
    record |= {
        "model_type": kind,
        "bias": kind == "internlm",
        "rotary": {"base": 300.0},
    }
    (folder / "config.json").write_text(json.dumps(record))

    with torch.no_grad():
        expected = llama(fixed_batch(VOCAB)).logits
    found = stock_logits(folder, ["float32"])
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    (item,) = [i for i in checklist(str(folder)) if i.name == "transformers"]
    assert item.passed, item.detail
    assert f"no class for {kind}" in item.detail


def as_internlm2(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a Llama of 4 query and 2 key/value heads of width 8, and fuse q0 q1 k0 v0 q2 q3 k1 v1."""
    names = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    renamed = {}
    for name, value in state.items():
        if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            continue
        fitting = [part for part in names if part in name]
        internlm2 = name.replace(fitting[0], names[fitting[0]]) if fitting else name
        renamed[internlm2] = value
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        q, k, v = (
            state[f"{prefix}self_attn.{part}_proj.weight"].split(8) for part in "qkv"
        )
        groups = (q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1])
        renamed[f"{prefix}attention.wqkv.weight"] = torch.cat(groups)
    return renamed


def test_what_transformers_cannot_load_is_refused_in_one_line(
    folder: Path, tmp_path: Path
) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model-1.bin")
    index = {"weight_map": dict.fromkeys(state, "pytorch_model-1.bin")}  # no metadata
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="transformers cannot load it: KeyError"):
        from_hf(str(folder), str(tmp_path / "c"), None, True, print)


def test_data_files_are_read_by_their_own_headers(tmp_path: Path) -> None:
    """Every tensor equals the one in memory; a file of another attempt in its place is noticed."""
    config = model_config(dtype="bfloat16")
    model = random_model(config)
    tensors = dict(model.named_parameters())
    CheckpointWriter(str(tmp_path / "c")).save(
        1, tensors, {}, config_to_dict(Config(model=config))
    )
    found = found_in(tmp_path / "c")
    files = DataFiles(found)
    for name, tensor in tensors.items():
        assert torch.equal(files.read(name), tensor)
    with pytest.raises(UserError, match="no data file holds absent"):
        files.read("absent")

    # Cut one tensor by hand as two ranks would: with a hole, then overlapping.
    path = Path(found.folder, found.files[0].name)
    state = load_file(path)
    norm = state.pop("norm.weight")
    for second, complete in ((16, True), (20, False), (12, False)):
        parts = {
            "norm.weight@0": norm[:16].clone(),
            f"norm.weight@{second}": norm[16:].clone(),
        }
        save_file(state | parts, path)
        if complete:
            assert torch.equal(DataFiles(found).read("norm.weight"), norm)
            continue
        with pytest.raises(UserError, match="overlap or leave a hole"):
            DataFiles(found).read("norm.weight")
    assert isinstance(found.storage, LocalStorage)

    # Damage is that of a checkpoint, not of a model folder.
    content = path.read_bytes()
    for damaged in (content[:8] + b"#" + content[9:], content[:100]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="the data file is damaged") as refused:
            DataFiles(found)
        assert refused.value.code == "EVO-CKPT-003"
        assert f"evomesh ckpt verify {found.folder}" in refused.value.fix
