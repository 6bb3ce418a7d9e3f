"""model.attention_kernel: which package's flash attention torch calls, and what it refuses before the first step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import attention

from evomesh.config.model import AttentionKernel, ModelConfig
from evomesh.errors import UserError
from evomesh.layers.attention_kernel import attention_kernel
from tests.support.covers import covers
from tests.support.interpreter import Interpreter
from tests.support.runs import write_run

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def model(name: str = "FA3", dtype: str = "bfloat16", **keys: Any) -> ModelConfig:
    return ModelConfig(
        attention_kernel=name,
        dtype=dtype,
        hidden_size=256,
        num_attention_heads=2,
        **keys,
    )


class Gpu:
    """A GPU that torch reports, and a torch that records which flash attention is activated."""

    def __init__(self) -> None:
        self.capability = (9, 0)
        self.known = ["FA3", "FA4"]
        self.calls: list[str] = []

    def activate(self, name: str) -> None:
        self.calls.append(f"activate {name}")

    def restore(self) -> None:
        self.calls.append("restore")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "get_device_capability", lambda device: gpu.capability)
    monkeypatch.setattr(cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(attention, "list_flash_attention_impls", lambda: gpu.known)
    monkeypatch.setattr(attention, "activate_flash_attention_impl", gpu.activate)
    monkeypatch.setattr(attention, "restore_flash_attention_impl", gpu.restore)
    for name in ("flash_attn_interface", "flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    interface = "flash_attn.cute.interface"
    monkeypatch.setitem(sys.modules, interface, ModuleType(interface))
    return gpu


@covers("model.attention_kernel")
@pytest.mark.parametrize("name", ["FA3", "FA4"])
def test_a_package_is_activated_once_and_taken_back(
    gpu: Gpu, name: AttentionKernel
) -> None:
    with attention_kernel(model(name), CUDA):
        assert gpu.calls == [f"activate {name}"]
    assert gpu.calls == [f"activate {name}", "restore"]


def test_an_error_of_the_run_takes_it_back_too(gpu: Gpu) -> None:
    with pytest.raises(ZeroDivisionError), attention_kernel(model(), CUDA):
        raise ZeroDivisionError
    assert gpu.calls == ["activate FA3", "restore"]


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_auto_calls_nothing(gpu: Gpu, device: torch.device) -> None:
    with attention_kernel(model("auto", "float32"), device):
        pass
    assert gpu.calls == []


def refusal(
    name: AttentionKernel = "FA3",
    dtype: str = "bfloat16",
    device: torch.device = CUDA,
    **keys: Any,
) -> UserError:
    config = model(name, dtype, **keys)
    with pytest.raises(UserError) as caught, attention_kernel(config, device):
        raise AssertionError("the context is entered")
    error = caught.value
    assert error.where == "model.attention_kernel"
    assert error.expected
    assert 'model.attention_kernel="auto"' in error.fix
    assert error.code == "EVO-MODEL-008"
    return error


def test_a_cpu_is_refused(gpu: Gpu) -> None:
    assert "computes on cpu" in refusal(device=CPU).found
    assert gpu.calls == []


@pytest.mark.parametrize(
    ("name", "capability"),
    [("FA3", (8, 0)), ("FA3", (10, 0)), ("FA4", (8, 9)), ("FA4", (12, 0))],
)
def test_a_gpu_of_another_generation_is_refused(
    gpu: Gpu, name: AttentionKernel, capability: tuple[int, int]
) -> None:
    gpu.capability = capability
    error = refusal(name)
    major, minor = capability
    assert f"NVIDIA A100 (compute capability {major}.{minor})" in error.found
    assert "9.x" in error.expected
    assert gpu.calls == []


def test_the_generations_are_those_of_torch(gpu: Gpu) -> None:
    """FA4 has kernels for Blackwell, FA3 for Hopper alone: torch/nn/attention/_fa3.py and _fa4.py check the same."""
    gpu.capability = (10, 0)
    with attention_kernel(model("FA4"), CUDA):
        assert gpu.calls == ["activate FA4"]


def test_a_dtype_that_it_does_not_take_is_refused(gpu: Gpu) -> None:
    assert "torch.float32" in refusal(dtype="float32").found
    assert gpu.calls == []


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("FA3", {"head_dim": 100}, "heads of 100 columns"),
        ("FA3", {"head_dim": 264}, "heads of 264 columns"),
        ("FA4", {"head_dim": 256}, "heads of 256 columns"),
        ("FA3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("FA3", {"attn_drop_rate": 0.1}, "attn_drop_rate"),
    ],
)
def test_attention_that_no_flash_kernel_computes_is_refused(
    gpu: Gpu, name: AttentionKernel, keys: dict[str, Any], words: str
) -> None:
    """Torch would compute it without the package, and the key would do nothing."""
    assert words in refusal(name, **keys).found
    assert gpu.calls == []


def test_a_torch_without_it_is_refused(gpu: Gpu) -> None:
    gpu.known = ["FA4"]
    error = refusal()
    assert f"torch {torch.__version__} has no FA3" in error.found
    assert "FA4" in error.expected
    assert gpu.calls == []


@pytest.mark.parametrize(
    ("name", "module"),
    [("FA3", "flash_attn_interface"), ("FA4", "flash_attn.cute.interface")],
)
def test_a_missing_package_is_named(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, name: AttentionKernel, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    error = refusal(name)
    assert module in error.found
    assert "github.com/Dao-AILab" in error.fix
    assert gpu.calls == []


def test_a_package_without_kernels_is_refused(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch raises where the module is another one of the same name."""

    def activate(name: str) -> None:
        raise RuntimeError("does not expose FA3 kernels")

    monkeypatch.setattr(attention, "activate_flash_attention_impl", activate)
    assert "does not expose FA3 kernels" in refusal().found


def test_torch_knows_these_names() -> None:
    """Of the torch in use, without a GPU: the names that a config may have are its own."""
    assert {"FA3", "FA4"} <= set(attention.list_flash_attention_impls())


def train_with_a_recorder() -> None:
    """Train on a machine that seems to have FA3, and print what is called in which order."""
    from evomesh.config.loader import load_config
    from evomesh.layers import attention_kernel as kernels
    from evomesh.models.decoder import Decoder
    from evomesh.train.main import run_training

    calls: list[str] = []
    forward = Decoder.forward

    def recorded(self: Decoder, *args: Any, **named: Any) -> Any:
        calls.append("forward")
        return forward(self, *args, **named)

    Decoder.forward = recorded  # type: ignore[method-assign]
    kernels._check_device = lambda name, device: None
    kernels._check_attention = lambda name, model: None
    sys.modules["flash_attn_interface"] = ModuleType("flash_attn_interface")
    attention.activate_flash_attention_impl = calls.append
    attention.restore_flash_attention_impl = lambda: calls.append("restore")
    changes = ["model.attention_kernel=FA3", "data.total_steps=2", "data.valid_every=0"]
    run_training(load_config("config.py", changes))
    print("calls", *(name for name, _ in groupby(calls)), calls.count("forward") > 1)


def test_a_run_activates_it_once_before_its_first_forward(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    write_run(tmp_path)
    done = interpreter.start(train_with_a_recorder, cwd=tmp_path).wait(60)
    assert done.returncode == 0, done.stderr
    assert "calls FA3 forward restore True\n" in done.stdout


def test_the_command_refuses_it_on_a_cpu(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    write_run(tmp_path)
    command = ["evomesh", "train", "config.py", "--set", "model.attention_kernel=FA3"]
    done = interpreter.start(command, cwd=tmp_path).wait(60)
    assert done.returncode == 2
    assert "EVO-MODEL-008" in done.stdout + done.stderr
