"""Folders that hold two sets of weights or contradict themselves: read as transformers reads them, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.huggingface.folder import HfFolder
from evomesh.checkpoint.huggingface.stock_logits import has_transformers
from evomesh.checkpoint.restore import restore_model
from evomesh.errors import UserError
from evomesh.storage.local import LocalStorage
from tests.unit.checkpoint.huggingface.hf_models import export, model_config, save_model

HEAD = "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file, model.safetensors."""
    _, found = save_model(tmp_path / "native", model_config(dtype="float32"))
    return export(
        found,
        tmp_path / "hf",
        ExportOptions(tokenizer="none", compare=False),
        lambda line: None,
    )


def add_shards(folder: Path, change: float) -> None:
    """Write an earlier save, in shards with an index, beside the whole file."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(
            {name: tensors[name] + change for name in part},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def head_of(folder: Path) -> torch.Tensor:
    return HfFolder(LocalStorage(), str(folder)).read(HEAD)


@pytest.mark.parametrize("lost", [(), ("model-00001-of-00002.safetensors",)])
def test_a_whole_file_beside_shards_of_an_earlier_save(
    folder: Path, lost: tuple[str, ...]
) -> None:
    add_shards(folder, change=0.5)
    for name in lost:
        (folder / name).unlink()
    expected = load_file(folder / "model.safetensors")[HEAD]
    if has_transformers():
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32
        )
        assert torch.equal(theirs.lm_head.weight, expected)
    assert torch.equal(head_of(folder), expected)
    ours = dict(restore_model(str(folder)).model.named_parameters())["head.weight"]
    assert torch.equal(ours[: len(expected)], expected)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    add_shards(folder, change=0.0)
    (folder / "model.safetensors").unlink()
    second = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(second)
    extra = next(iter(load_file(folder / "model-00001-of-00002.safetensors").items()))
    save_file({**tensors, extra[0]: extra[1] + 1}, second, metadata={"format": "pt"})
    with pytest.raises(
        UserError,
        match=f"'{extra[0]}' is in model-00001(.|\\n)*each tensor in one shard",
    ):
        head_of(folder)
