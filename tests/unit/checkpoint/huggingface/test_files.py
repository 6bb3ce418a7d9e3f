"""Foreign weights read by byte range: what each rank reads, from a disk or a store, and how much is held at once."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evomesh.checkpoint.huggingface import compare_logits, output_folder
from evomesh.checkpoint.huggingface import export as export_module
from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.huggingface.files import SafetensorsFile
from evomesh.checkpoint.huggingface.load import load_huggingface
from evomesh.checkpoint.huggingface.to_native import from_hf
from evomesh.checkpoint.loaders import fill
from evomesh.checkpoint.native.boxes import Box
from evomesh.checkpoint.native.plan import describe
from evomesh.checkpoint.native.read import read_tensor
from evomesh.errors import UserError
from evomesh.models.registry import build_model
from evomesh.parallel.grid import Axis, Grid
from evomesh.storage import s3
from evomesh.storage.base import join
from evomesh.storage.local import LocalReader, LocalStorage
from evomesh.storage.urls import open_storage
from tests.support.moto_store import moto_store
from tests.unit.checkpoint.huggingface.hf_models import (
    export,
    found_in,
    model_config,
    save_model,
)

QUIET = ExportOptions(tokenizer="none", compare=False)
BUCKET = "models"


def silent(line: str) -> None:
    return


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all reads from local files."""
    sizes: list[int] = []
    original = LocalReader.read_into

    def counted(self: LocalReader, start: int, buffer: memoryview) -> None:
        sizes.append(len(buffer))
        original(self, start, buffer)

    monkeypatch.setattr(LocalReader, "read_into", counted)
    return sizes


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("arch", ["llama", "internlm2"])
def test_a_rank_reads_the_bytes_it_holds(
    arch: Any, interleaved: bool, tmp_path: Path, read: list[int]
) -> None:
    config = model_config(
        "INTERNLM2_PUBLIC", qk_interleaved=interleaved, no_bias=False, vocab_size=61
    )
    model, found = save_model(tmp_path / "c", config)
    folder = str(
        export(
            found,
            tmp_path / "hf",
            replace(QUIET, arch=arch, max_shard_bytes=30000),
            silent,
        )
    )
    truth = {name: value.detach() for name, value in model.named_parameters()}
    records = [
        *(tmp_path / "hf").glob("*.json"),
        *(tmp_path / "hf").glob("*.safetensors"),
    ]
    besides = sum(file.stat().st_size for file in records if file.suffix == ".json")
    besides += sum(
        8 + int.from_bytes(file.read_bytes()[:8], "little")
        for file in records
        if file.suffix != ".json"
    )
    for rank in range(4):
        grid = Grid(tp=Axis("tp", 2, rank % 2), pp=Axis("pp", 2, rank // 2))
        layers = range(rank // 2, rank // 2 + 1)
        local = build_model(config, grid=grid, layer_range=layers)
        parts = describe(dict(local.named_parameters()), grid)
        read.clear()
        fill(
            parts,
            load_huggingface(folder, config.model_dump()),
            folder,
            elsewhere=truth,
        )
        held = sum(
            part.tensor.nbytes for tensor in parts.values() for part in tensor.parts
        )
        assert held <= sum(read) <= held + besides
        for name, tensor in parts.items():
            for part in tensor.parts:
                whole = Box((0,) * len(tensor.shape), tensor.shape)
                assert torch.equal(part.tensor, truth[name][part.box.within(whole)]), (
                    name
                )


def test_any_box_of_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    value = torch.arange(5 * 7 * 3, dtype=torch.float64).view(5, 7, 3)
    save_file({"a": value, "b": torch.tensor(2.0)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(LocalStorage(), str(tmp_path / "x.safetensors"))
    whole = Box((0, 0, 0), (5, 7, 3))
    for box in (
        Box((1, 2, 1), (3, 4, 2)),
        whole,
        Box((4, 0, 0), (1, 7, 3)),
        Box((2, 3, 0), (2, 1, 3)),
    ):
        assert torch.equal(file.read("a", box), value[box.within(whole)])
    assert file.read("b", Box((), ())).item() == 2.0
    assert file.read("a", Box((0, 0, 0), (0, 7, 3))).shape == (0, 7, 3)


def test_one_layer_at_a_time_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the reference may be whole: transformers loads a folder as its users do.

    Writing holds one native tensor, our side of the comparison one layer, and of the
    reference one module at a time is wider than in the file.
    """
    _, found = save_model(
        tmp_path / "c", model_config("LLAMA2", "float32", num_layers=4)
    )
    build, stages, sizes = compare_logits.build_model, [], []
    read, tensors = export_module.read_tensor, []
    stock, references = export_module.stock_logits, []

    def read_alone(*arguments: Any) -> torch.Tensor:
        assert all(tensor() is None for tensor in tensors)
        value = read(*arguments)
        tensors.append(weakref.ref(value))
        return value

    def counted(*arguments: Any, **named: Any) -> Any:
        assert not references  # a whole reference and a layer of ours never coexist
        assert all(other() is None for other in (*tensors, *stages))
        model = build(*arguments, **named)
        stages.append(weakref.ref(model))
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        return model

    def reference(*arguments: Any) -> torch.Tensor:
        assert all(other() is None for other in (*tensors, *stages))
        references.append(arguments)
        return stock(*arguments)

    theirs: list[torch.nn.Module] = []

    def check(module: torch.nn.Module, _: Any) -> None:
        """Before a module of transformers runs, all that ran have the weights of the file again."""
        if not type(module).__module__.startswith("evomesh"):
            for other in theirs:
                for weight in other.parameters(recurse=False):
                    assert weight.dtype is torch.bfloat16
            theirs.append(module)

    monkeypatch.setattr(export_module, "read_tensor", read_alone)
    monkeypatch.setattr(export_module, "stock_logits", reference)
    monkeypatch.setattr(compare_logits, "build_model", counted)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(check)
    try:
        # Narrower than what is computed in, so that a module that stays wide is seen.
        options = replace(QUIET, compare=True, dtype="bfloat16")
        export(found, tmp_path / "hf", options, silent)
    finally:
        handle.remove()
    total = sum(math.prod(record.shape) for record in found.records().values())
    assert len(tensors) == len(found.records())
    assert len(sizes) == 4
    assert max(sizes) < total / 2
    assert len(references) == 1
    with_weights = [
        module
        for module in theirs
        if next(module.parameters(recurse=False), None) is not None
    ]
    assert len(with_weights) == 4 * 9 + 3


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with moto_store(BUCKET) as address:
        yield f"boto3:s3://{BUCKET}.{address}"


@pytest.mark.slow
def test_folders_in_a_store(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("S3_SECRET_ACCESS_KEY_ID", "s")
    from evomesh.checkpoint.huggingface.export import export as export_checkpoint

    model, found = save_model(tmp_path / "c", model_config("INTERNLM", "float32"))
    lines: list[str] = []
    url = f"{store}/hf"
    export_checkpoint(
        found, url, replace(QUIET, compare=True, max_shard_bytes=20000), lines.append
    )
    from_hf(url, f"{store}/ckpts", None, True, lines.append)
    from_hf(url, str(tmp_path / "back"), None, False, lines.append)
    assert sum("largest logit difference" in line for line in lines) == 2
    records = found_in(tmp_path / "back").records()
    for name, parameter in model.named_parameters():
        assert torch.equal(
            read_tensor(found_in(tmp_path / "back"), records[name]), parameter.detach()
        )
    with pytest.raises(UserError, match="exists and is not empty"):
        export_checkpoint(found, url, QUIET, silent)

    def broken(storage: Any, work: Path, target: str) -> None:
        (work / "zz").write_bytes(b"x")
        monkeypatch.setattr(
            s3.S3Writer,
            "finish",
            lambda self: (_ for _ in ()).throw(OSError(5, "link down")),
        )
        upload(storage, work, target)

    upload = output_folder._upload
    monkeypatch.setattr(output_folder, "_upload", broken)
    with pytest.raises(UserError, match="link down"):
        export_checkpoint(found, f"{store}/other", QUIET, silent)
    storage, path = open_storage(f"{store}/other")
    assert storage.list(path) == [] and not storage.exists(join(path, "config.json"))


def test_disk_too_small_for_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = save_model(tmp_path / "c", model_config())
    folder = export(found, tmp_path / "hf", QUIET, silent)
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda self, folder: 1000)
    with pytest.raises(UserError, match=r"the checkpoint needs .* are free"):
        from_hf(str(folder), str(tmp_path / "out"), None, False, silent)
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_no_folders(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "model"
    with pytest.raises(RuntimeError), output_folder.new_folder(str(target), 1) as work:
        (work / "config.json").write_text("{}")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with output_folder.new_folder(str(target), 1) as work:
        (work / "config.json").write_text("{}")
    assert [path.name for path in target.iterdir()] == ["config.json"]
