"""Hugging Face folders that a run writes while it trains: in every layout, after a kill, without a trace in the run."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evomesh.checkpoint.huggingface.compare_logits import native_logits
from evomesh.checkpoint.huggingface.data_files import DataFiles
from evomesh.checkpoint.huggingface.export import ExportOptions
from evomesh.checkpoint.huggingface.stock_logits import fixed_batch
from evomesh.checkpoint.native.load import resolve
from evomesh.cli.convert_hf import write_folder
from evomesh.config.record import config_from_dict
from tests.e2e.conftest import Run
from tests.support.covers import covers
from tests.support.interpreter import Interpreter
from tests.support.runs import losses, write_run

STEPS = 4
COMMON = f"""
data |= dict(total_steps={STEPS}, valid_every=0)
lr_scheduler["total_steps"] = {STEPS}
ckpt |= dict(checkpoint_every=2)
"""
EXPORTS = "ckpt |= dict(enable_internevo2hf_ckpt=True, export_hf=dict(every=4))\n"
TRAIN = ["evomesh", "train", "config.py"]
EXPORTED = f"step {STEPS} exported: ckpts/hf/hf-{STEPS:08d} ("


@covers("ckpt.enable_internevo2hf_ckpt")
@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ("", 1),
        ('tensor=dict(size=2, mode="mtp")', 2),
        ("pipeline=dict(size=2)", 2),
        ("zero1=dict(size=-1, fsdp=True)", 2),
        ('tensor=dict(size=2, mode="isp"), weight=dict(size=2)', 2),
    ],
    ids=["one", "tensor", "pipeline", "fsdp", "isp"],
)
def test_the_export_is_that_of_the_command(
    layout: str, ranks: int, tmp_path: Path, interpreter: Interpreter
) -> None:
    parallel = f"parallel = dict({layout})\n"
    write_run(tmp_path, COMMON + EXPORTS + parallel)
    if ranks == 1:
        running = [interpreter.start(TRAIN, cwd=tmp_path)]
    else:
        running = interpreter.start_ranks(TRAIN, ranks, cwd=tmp_path)
    finished = [one.wait(250) for one in running]
    said = "".join(one.stdout + one.stderr for one in finished)
    assert [one.returncode for one in finished] == [0] * ranks, said
    assert said.count(EXPORTED) == 1
    assert said.count(f"waiting for the export of step {STEPS}") <= 1

    checkpoint = f"ckpts/step-{STEPS:08d}"
    by_command = str(tmp_path / "by-hand")
    write_folder(str(tmp_path / checkpoint), by_command, ExportOptions(compare=False))
    folder = tmp_path / f"ckpts/hf/hf-{STEPS:08d}"
    exported = load_file(folder / "model.safetensors")
    by_hand = load_file(tmp_path / "by-hand" / "model.safetensors")
    assert exported.keys() == by_hand.keys()
    for name, tensor in by_hand.items():
        assert torch.equal(exported[name], tensor), name

    # The checkpoint, read without the index that the export used, and transformers.
    found = resolve(str(tmp_path / checkpoint))
    model = config_from_dict(found.config).model
    ours = native_logits(model, DataFiles(found).read, "float32")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        theirs = stock(fixed_batch(model.vocab_size)).logits
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_run_with_exports_has_the_losses_of_one_without(
    tmp_path: Path, run: Run
) -> None:
    """The export of step 2 runs beside steps 3 and 4."""
    plain, exporting = tmp_path / "plain", tmp_path / "exporting"
    write_run(plain, COMMON)
    write_run(exporting, COMMON + EXPORTS.replace("every=4", "every=2"))
    run(*TRAIN, cwd=plain)
    said = run(*TRAIN, cwd=exporting)
    assert "step 2 exported" in said and EXPORTED in said
    assert losses(exporting) == losses(plain)
    assert not list(plain.glob("ckpts/hf*"))


def test_a_killed_run_leaves_no_half_folder_and_the_next_one_exports(
    tmp_path: Path, interpreter: Interpreter, run: Run
) -> None:
    write_run(tmp_path, COMMON + EXPORTS)
    running = interpreter.start(TRAIN, cwd=tmp_path)
    root = tmp_path / "ckpts" / "hf"
    deadline = time.monotonic() + 200
    while not list(root.glob(".hf-*.tmp/.evomesh-export.json")):
        assert time.monotonic() < deadline and running.is_alive
        time.sleep(0.01)
    running.signal(signal.SIGKILL)
    running.wait()
    assert not list(root.glob("hf-*"))

    said = run(*TRAIN, cwd=tmp_path)
    assert EXPORTED in said
    assert not list(root.glob(".hf-*"))
    assert (root / f"hf-{STEPS:08d}" / "model.safetensors").is_file()


def test_a_model_that_has_no_folder_is_refused_before_the_first_step(
    tmp_path: Path, run: Run
) -> None:
    write_run(tmp_path, COMMON + EXPORTS + 'model |= dict(norm_type="layernorm")\n')
    for command in (TRAIN, ["evomesh", "config", "check", "config.py"]):
        said = run(*command, cwd=tmp_path, code=2)
        assert "checkpoints of this model cannot be exported" in said
        assert "set ckpt.enable_internevo2hf_ckpt=False" in said
    assert not (tmp_path / "ckpts").exists()
