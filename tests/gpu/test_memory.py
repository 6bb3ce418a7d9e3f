"""The most bytes that a step needs, against benchmarks/_memory.py: as CUDA's allocator counts them, and without a GPU
as torch's tracker counts tensors on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks._memory import HALF, Sizes, bytes_in_16_bits, state_in_16_bits
from evomesh.config.schema import Config, ModelConfig
from evomesh.layers import attention
from evomesh.layers.loss import tokens_per_chunk
from evomesh.layers.products import adds_wide_products
from evomesh.layers.sequence_bounds import SequenceBounds
from evomesh.models.registry import build_model, initialize_weights
from evomesh.optim.zero import ZeroOptimizer

META = torch.device("meta")


class Training:
    def __init__(self, sizes: Sizes, recompute: float, device: torch.device) -> None:
        config = ModelConfig(
            model_type="LLAMA2",
            num_layers=sizes.layers,
            hidden_size=sizes.hidden,
            vocab_size=sizes.vocab,
            num_attention_heads=sizes.heads,
            mlp_ratio=sizes.mlp / sizes.hidden,
            multiple_of=1,
            dtype="bfloat16",
            no_bias=True,
            checkpoint=recompute,
            compile=False,
        )
        self.model = build_model(config, device=device)
        if device != META:
            initialize_weights(self.model, seed=1)
        whole = Config()
        self.optimizer = ZeroOptimizer(
            self.model.named_parameters(),
            whole.adam,
            whole.hybrid_zero_optimizer,
            model=self.model,
        )
        self.optimizer.refresh_masters()
        self.ids = torch.zeros(sizes.tokens, dtype=torch.long, device=device)
        bounds = torch.tensor([0, sizes.tokens // 2, sizes.tokens], dtype=torch.int32)
        self.documents = SequenceBounds(
            torch.zeros_like(self.ids), bounds.to(device), sizes.tokens, bounds
        )

    def step(self) -> None:
        self.optimizer.expect_micro_batches(1)
        loss = self.model.loss(
            self.model(self.ids, self.documents), self.ids, grad_scale=1 / len(self.ids)
        )
        loss.scaled_sum.backward()  # type: ignore[no-untyped-call]
        del loss
        self.optimizer.step(1e-3, 0.95, 1.0)
        self.optimizer.zero_grad()

    def peak_of_tensors(self) -> int:
        tracker, documents = MemTracker(), self.documents
        accumulated = [
            slot.accumulated_grad
            for slot in self.optimizer.slots
            if slot.accumulated_grad is not None
        ]
        held = (self.ids, documents.position_ids, documents.cu_seqlens, *accumulated)
        tracker.track_external(
            self.model, *self.optimizer.state_tensors().values(), *held
        )
        with tracker:
            self.step()
        return int(tracker.get_tracker_snapshot("peak")[META]["Total"])

    def peak_of_the_allocator(self) -> int:
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated()


def rounded_product(of: Sizes, device: torch.device) -> int:
    """Of the head's gradient, where torch cannot add it up in float32 in one pass: 2.11 on the meta device."""
    if adds_wide_products(device, torch.bfloat16, torch.float32):
        return 0
    return HALF * of.vocab * of.hidden


def check(
    peak: int, of: Sizes, recompute: float, bound: float, device: torch.device
) -> None:
    expected = bytes_in_16_bits(of, recompute) + rounded_product(of, device)
    assert peak == pytest.approx(expected, rel=bound)
    assert peak - state_in_16_bits(of) == pytest.approx(
        expected - state_in_16_bits(of), rel=2 * bound
    )


@pytest.mark.parametrize("recompute", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "shape", [(8, 256, 4, 704, 4000, 4096), (2, 256, 4, 704, 32000, 2048)]
)
def test_peak_of_tensors_on_the_meta_device(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], recompute: float
) -> None:
    monkeypatch.setattr(attention, "_flash_takes", lambda q: True)
    # The meta device stands for CUDA.
    *_, vocab, tokens = shape
    chunk = min(tokens, tokens_per_chunk(vocab, on_cuda=True))
    of = Sizes(*shape, chunk=chunk)
    training = Training(of, recompute, META)
    assert (
        sum(parameter.numel() for parameter in training.model.parameters())
        == of.parameters
    )
    training.step()  # the second step is like all others
    check(training.peak_of_tensors(), of, recompute, 0.02, META)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recompute", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "shape", [(8, 1024, 8, 2816, 32000, 8192), (4, 2048, 16, 5504, 32000, 4096)]
)
def test_peak_of_the_allocator_on_cuda(
    shape: tuple[int, ...], recompute: float
) -> None:
    """Shapes so large that the libraries' workspaces, tens of MiB, are within the bound."""
    # The meta device stands for CUDA.
    *_, vocab, tokens = shape
    chunk = min(tokens, tokens_per_chunk(vocab, on_cuda=True))
    of = Sizes(*shape, chunk=chunk)
    before = torch.cuda.memory_allocated()
    device = torch.device("cuda")
    training = Training(of, recompute, device)
    training.step()
    check(training.peak_of_the_allocator() - before, of, recompute, 0.10, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_grows_on_cuda() -> None:
    training = Training(
        Sizes(1, 64, 4, 192, 1000, 64, tokens_per_chunk(1000, on_cuda=True)),
        0.0,
        torch.device("cuda"),
    )
    held = {}
    for step in range(1000):
        training.step()
        if step in (20, 999):
            held[step] = torch.cuda.memory_allocated()
    assert held[999] == held[20]
