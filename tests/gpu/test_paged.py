"""Paged decoding on the device's own kernel: against dense attention, against rows, with and without a graph.

Without a GPU the docstring of the kernel stands in for it, and nothing is captured.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evomesh.generate.engine import GenerationEngine
from evomesh.generate.options import SamplingParams
from evomesh.generate.paged_attention import (
    attend_to_pages,
    fault_of_kernel,
    reason_against_pages,
)
from evomesh.generate.paged_cache import PAGE_SIZE
from evomesh.generate.paged_decoding import (
    PagedDecoding,
    PagedSettings,
    RowDecoding,
)
from evomesh.generate.step_graph import GraphCapture, run_eagerly
from evomesh.models.language_model import LanguageModel
from evomesh.models.registry import build_model, initialize_weights
from tests.support import paged_kernel
from tests.support.decoders import enlarge, tiny_config

CONTEXT_LENGTH = 2 * PAGE_SIZE + 60
BOUND = 4e-2  # of the largest logit, after roundings of bfloat16 in two layers
PROMPTS = [3, PAGE_SIZE - 2, PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE - 3]
STEPS = 12

MODELS = {
    "grouped": {},
    "one head for all": {"num_kv_attention_heads": 1},
    "ungrouped": {"num_kv_attention_heads": 4},
    "window": {"model_type": "MISTRAL", "sliding_window": 100},
    "scale": {"query_pre_attn_scalar": 20.0},
    "dynamic": {"use_dynamic_ntk_rope": True, "max_position_embeddings": 128},
}


@pytest.fixture(autouse=True)
def kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(
            "torch.nn.attention.varlen.varlen_attn", paged_kernel.varlen_attn
        )


def model_of(name: str, dtype: str, device: torch.device) -> LanguageModel:
    config = tiny_config(hidden_size=256, dtype=dtype, **MODELS[name])
    model = build_model(config)
    initialize_weights(model, seed=3)
    enlarge(model)
    return model.eval().to(device)


def skip_without_kernel(model: LanguageModel, device: torch.device) -> None:
    if device.type == "cuda" and (reason := reason_against_pages(model, device)):
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_has_no_fault(device: torch.device, name: str, dtype: str) -> None:
    model = model_of(name, dtype, device)
    skip_without_kernel(model, device)
    assert fault_of_kernel(attend_to_pages, model, device) == ""


def logits_of_steps(
    decoding: RowDecoding | PagedDecoding, device: torch.device
) -> list[Tensor]:
    """The logits of some steps with given tokens; a sequence leaves and another one joins in the middle."""
    draw = torch.Generator().manual_seed(0)

    def read(lengths: list[int]) -> None:
        ids = torch.randint(50, (sum(lengths),), generator=draw)
        bounds, attend = decoding.cache.prefill(lengths, device)
        decoding.model(ids.to(device), bounds, attend)

    found: list[Tensor] = []

    def go_on() -> None:
        for _ in range(STEPS):
            count = len(decoding.cache.lengths)
            tokens = torch.randint(50, (count,), generator=draw).tolist()
            found.append(decoding.next_logits(tokens).cpu())

    with torch.inference_mode():
        read(PROMPTS)
        go_on()
        decoding.cache.release(1)
        go_on()
        read([40])
        go_on()
    return found


def paged(model: LanguageModel, device: torch.device, *, graph: bool) -> PagedDecoding:
    capture = GraphCapture() if graph else run_eagerly
    settings = PagedSettings(attend_to_pages, capture)
    return PagedDecoding(model, len(PROMPTS), CONTEXT_LENGTH, device, settings)


@pytest.mark.parametrize("name", MODELS)
def test_pages_give_the_logits_of_rows(device: torch.device, name: str) -> None:
    model = model_of(name, "bfloat16", device)
    skip_without_kernel(model, device)
    rows = RowDecoding(model, len(PROMPTS), CONTEXT_LENGTH, device)
    expected = logits_of_steps(rows, device)
    found = logits_of_steps(paged(model, device, graph=False), device)
    for ours, theirs in zip(found, expected, strict=True):
        largest = theirs.abs().max()
        assert float((ours - theirs).abs().max() / largest) < BOUND


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_computes_what_its_kernels_compute(
    device: torch.device, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    if device.type == "cpu":
        pytest.skip("there are no graphs on the CPU")
    model = model_of(name, "bfloat16", device)
    skip_without_kernel(model, device)
    expected = logits_of_steps(paged(model, device, graph=False), device)
    found = logits_of_steps(paged(model, device, graph=True), device)
    assert not caplog.records
    for ours, theirs in zip(found, expected, strict=True):
        largest = theirs.abs().max()
        assert float((ours - theirs).abs().max() / largest) < 1e-3


def test_an_engine_decodes_in_pages_where_it_can(device: torch.device) -> None:
    """On a GPU with 16-bit weights; its answers are as long as asked, from more requests than slots."""
    model = model_of("grouped", "bfloat16", device)
    engine = GenerationEngine(
        model, slots=3, context_length=CONTEXT_LENGTH, paged="auto"
    )
    is_paged = isinstance(engine.decoding, PagedDecoding)
    assert is_paged == (reason_against_pages(model, device) == "")
    sampling = SamplingParams(top_p=0.9, max_new_tokens=30)
    for number, length in enumerate(PROMPTS):
        engine.add([7] * length, sampling, (0, number))
    counts = [0] * len(PROMPTS)
    while engine.active:
        for token in engine.step():
            counts[token.request] += 1
    assert counts == [30] * len(PROMPTS)
