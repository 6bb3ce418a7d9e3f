"""Folders and checkpoints that cannot be converted: the messages, and that nothing is left on disk."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomesh.checkpoint.huggingface import checklist as checklist_module
from evomesh.checkpoint.huggingface import export as export_module
from evomesh.checkpoint.huggingface.checklist import checklist
from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.huggingface.load import load_huggingface
from evomesh.checkpoint.huggingface.to_native import from_hf
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.checkpoint.restore import load_model, restore_model
from evomesh.cli.convert_hf import check
from evomesh.config.record import config_to_dict
from evomesh.config.schema import Config
from evomesh.errors import UserError
from tests.unit.checkpoint.huggingface.hf_models import (
    export,
    found_in,
    model_config,
    save_model,
)
from tests.unit.checkpoint.huggingface.test_tokenizer import train

QUIET = ExportOptions(tokenizer="none", compare=False)


def silent(line: str) -> None:
    return


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export(
        save_model(tmp_path / "c", model_config())[1], tmp_path / "hf", QUIET, silent
    )


def edit_config(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | changes))


def edit_weights(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def drop_two(state: dict[str, torch.Tensor]) -> None:
    del state["lm_head.weight"], state["model.layers.1.mlp.up_proj.weight"]


BAD: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda f: edit_weights(f, drop_two),
        r"(?s)missing \(2\): .*layers.1.mlp.up_proj.weight \[64, 32\].*lm_head",
    ),
    (
        lambda f: edit_weights(f, lambda s: s.update(x=torch.ones(2))),
        r"unexpected \(1\): x \[2\]",
    ),
    (
        lambda f: edit_weights(
            f, lambda s: s.update({"model.norm.weight": torch.ones(31)})
        ),
        r"model.norm.weight is \[31\], not \[32\]",
    ),
    (
        lambda f: edit_config(f, model_type="mamba"),
        "unknown architecture: model_type 'mamba'",
    ),
    (lambda f: edit_config(f, hidden_size="32"), "hidden_size is '32'"),
    (
        lambda f: edit_config(f, head_dim=16),
        r"q_proj.weight is \[32, 32\], not \[64, 32\]",
    ),
    (lambda f: edit_config(f, head_dim="16"), "head_dim is '16'"),
    (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    (
        lambda f: edit_config(f, rope_parameters={"rope_type": "spiral"}, rotary=None),
        "rotary scaling 'spiral' is not supported",
    ),
    (lambda f: edit_config(f, dtype="int8"), "dtype 'int8'"),
    (
        lambda f: train(f, prefix=False),
        "the tokenizer has 3[0-9]+ ids, the embedding 61 rows",
    ),
    (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "a JSON list"),
    (lambda f: (f / "config.json").unlink(), "no config.json"),
    (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
        "not a complete safetensors file",
    ),
    (
        lambda f: (
            (f / "model.safetensors")
            .rename(f / "model.safetensors.index.json")
            .write_text('{"weight_map": {"a": "../x.safetensors"}}')
        ),
        "lists the shard '../x.safetensors'",
    ),
]


@pytest.mark.parametrize(("spoil", "words"), BAD)
def test_bad_folder_leaves_no_checkpoint(
    spoil: Callable[[Path], object], words: str, folder: Path
) -> None:
    spoil(folder)
    out = folder.parent / "out"
    with pytest.raises(UserError, match=words):
        from_hf(str(folder), str(out), None, False, silent)
    assert not list(out.rglob("*")) if out.exists() else True
    assert not all(item.passed for item in checklist(str(folder)))


def test_a_tokenizer_that_does_not_fit_can_be_left_out(folder: Path) -> None:
    train(folder, prefix=False)
    out = folder.parent / "out"
    with pytest.raises(UserError, match=r"fix: .*--tokenizer none"):
        from_hf(str(folder), str(out), None, False, silent)
    # Whatever reads the weights alone needs none.
    assert restore_model(str(folder)).config.model.vocab_size == 61
    from_hf(str(folder), str(out), None, False, silent, "none")
    assert restore_model(str(out)).config.data.tokenizer_path is None


def test_a_tokenizer_that_cannot_be_used_is_named(folder: Path) -> None:
    train(folder, prefix=False)
    settings = {"tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    lines: list[str] = []
    from_hf(str(folder), str(folder.parent / "out"), None, False, lines.append)
    reason = "the folder's tokenizer is a BertTokenizer"
    assert any("names no tokenizer" in line and reason in line for line in lines)
    with pytest.raises(UserError, match=reason):
        load_model(str(folder))


def test_the_option_that_exports_a_tokenizer_is_named_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = save_model(tmp_path / "c", model_config())
    export(found, tmp_path / "hf", QUIET, silent)
    monkeypatch.setattr(checklist_module, "has_transformers", lambda: False)
    with pytest.raises(UserError, match="2 of the checks above failed") as refused:
        check(str(tmp_path / "hf"))
    assert "--tokenizer PATH" in refused.value.fix
    assert "FAILED  tokenizer: no tokenizer in" in capsys.readouterr().out


def test_no_code_in_a_pickle_is_run(folder: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"a": Payload()}, file)
    with pytest.raises(UserError, match="cannot be read as tensors alone"):
        from_hf(str(folder), str(tmp_path / "out"), None, False, silent)
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_another_model_is_refused_before_training(folder: Path) -> None:
    # Head counts show in no shape.
    other = model_config(num_attention_heads=8, num_layers=3)
    with pytest.raises(
        UserError,
        match="num_layers=2, the run's is 3; num_attention_heads=4, the run's is 8",
    ):
        list(load_huggingface(str(folder), other.model_dump()))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match="neither an existing folder nor a model in the local Hugging Face cache",
    ):
        from_hf("internlm/internlm2-7b", str(tmp_path / "out"), None, False, silent)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "layernorm"}, "norm_type 'layernorm' cannot be represented"),
        ({"use_swiglu": False}, "use_swiglu=False cannot be represented"),
        (
            {"apply_post_layer_norm": True},
            "apply_post_layer_norm=True cannot be represented",
        ),
    ],
)
def test_models_without_a_form_there(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    _, found = save_model(tmp_path / "c", model_config("INTERNLM2_PUBLIC", **changes))
    with pytest.raises(UserError, match=words):
        export(found, tmp_path / "hf", QUIET, silent)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_export_that_differs_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = save_model(tmp_path / "c", model_config(qk_interleaved=True))
    monkeypatch.setattr(
        export_module,
        "native_to_foreign",
        lambda link, value, config, naming: _unturned(link, value, config),
    )
    with pytest.raises(UserError, match="logits differ by up to"):
        export(found, tmp_path / "hf", replace(QUIET, compare=True), silent)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def _unturned(link: Any, value: torch.Tensor, config: Any) -> list[torch.Tensor]:
    """The mistake: rotary rows keep their order."""
    from evomesh.checkpoint.huggingface.names import LLAMA, native_to_foreign

    return native_to_foreign(
        link, value, config.model_copy(update={"qk_interleaved": False}), LLAMA
    )


def test_places_that_cannot_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = save_model(tmp_path / "d", model_config())
    with pytest.raises(UserError, match="exists and is not empty"):
        export(found, folder, QUIET, silent)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})()
    )
    with pytest.raises(UserError, match=r"the export needs .* free"):
        export(found, tmp_path / "new", QUIET, silent)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    model, _ = save_model(tmp_path / "c", model_config())
    tensors = dict(model.named_parameters())
    tensors["own.weight"] = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    tensors["norm.weight"] = torch.nn.Parameter(torch.ones(31, dtype=torch.float64))
    del tensors["layers.1.feed_forward.w2.weight"]
    config = config_to_dict(Config(model=model_config()))
    CheckpointWriter(str(tmp_path / "d")).save(1, tensors, {}, config)
    words = r"missing \['layers.1.feed_forward.w2.weight \[32, 64\]'\], unknown \['own.weight'\].*instead of \[32\]"
    with pytest.raises(UserError, match=words):
        export(found_in(tmp_path / "d"), tmp_path / "hf", QUIET, silent)
    assert not (tmp_path / "hf").exists()
