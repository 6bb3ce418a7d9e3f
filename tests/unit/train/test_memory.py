"""Tensor bytes of a step as torch's dispatch tracker counts them, against arithmetic on the shapes.

Shapes: T packed tokens, D model, F feed-forward hidden, V vocabulary, N heads, L layers, C tokens of a loss chunk.
"""

from __future__ import annotations

import ctypes
import gc
import platform

import pytest
import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from evomesh.config.schema import Config, ModelConfig
from evomesh.layers.loss import MIN_CHUNK_TOKENS
from evomesh.layers.sequence_bounds import SequenceBounds
from evomesh.models.registry import build_model, initialize_weights
from evomesh.optim.zero import ZeroOptimizer

pytestmark = pytest.mark.slow

T, D, F, V, N, L = 2 * MIN_CHUNK_TOKENS, 64, 192, 2000, 4, 6
DOCUMENT = 64
BYTES = 4  # float32


class Training:
    def __init__(
        self, recompute: float = 0.0, tokens: int = T, layers: int = L
    ) -> None:
        config = ModelConfig(
            model_type="LLAMA2",
            num_layers=layers,
            hidden_size=D,
            vocab_size=V,
            num_attention_heads=N,
            mlp_ratio=F / D,
            multiple_of=1,
            dtype="float32",
            no_bias=True,
            checkpoint=recompute,
        )
        self.model = build_model(config)
        initialize_weights(self.model, seed=1)
        whole = Config()
        self.optimizer = ZeroOptimizer(
            self.model.named_parameters(),
            whole.adam,
            whole.hybrid_zero_optimizer,
            model=self.model,
        )
        self.ids = torch.randint(
            V, (tokens + 1,), generator=torch.Generator().manual_seed(0)
        )
        bounds = torch.arange(0, tokens + 1, DOCUMENT, dtype=torch.int32)
        self.documents = SequenceBounds(
            torch.arange(DOCUMENT).repeat(tokens // DOCUMENT), bounds, DOCUMENT
        )
        self.labels = self.ids[1:].clone()

    def step(self) -> None:
        self.optimizer.expect_micro_batches(1)
        hidden = self.model(self.ids[:-1], self.documents)
        loss: Tensor = self.model.loss(
            hidden, self.labels, grad_scale=1 / len(self.labels)
        ).scaled_sum
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(1e-3, 0.95, 1.0)
        self.optimizer.zero_grad()

    def weights(self) -> int:
        return BYTES * sum(parameter.numel() for parameter in self.model.parameters())

    def tracker(self) -> MemTracker:
        tracker = MemTracker()
        held = (
            self.ids,
            self.labels,
            self.documents.position_ids,
            self.documents.cu_seqlens,
        )
        tracker.track_external(
            self.model, *self.optimizer.state_tensors().values(), *held
        )
        return tracker

    def total(self, tracker: MemTracker, when: str) -> int:
        return int(tracker.get_tracker_snapshot(when)[torch.device("cpu")]["Total"])


def kept_by_a_layer() -> int:
    """Its input and the sum in its middle, both norms' outputs and scales; q, k, v, attention's output and its log
    sums; gate, up and their product."""
    return BYTES * T * (4 * D + 2 + 4 * D + N + 3 * F)


def held_by_the_loss() -> int:
    """The last sum and its norm, the gradient of the hidden rows and of the head, one chunk of logits."""
    return BYTES * (3 * T * D + V * D + MIN_CHUNK_TOKENS * V)


class TestPeakOfAStep:
    @pytest.mark.parametrize("recompute", [0.0, 0.5])
    def test_is_weights_moments_activations_and_one_chunk_of_logits(
        self, recompute: float
    ) -> None:
        training = Training(recompute)
        training.step()  # the second step is like all others
        tracker = training.tracker()
        with tracker:
            training.step()
        kept = L * (1 - recompute) * kept_by_a_layer() + L * recompute * BYTES * T * D
        expected = 3 * training.weights() + kept + held_by_the_loss()
        assert training.total(tracker, "peak") == pytest.approx(expected, rel=0.03)


class HeapUse(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    names = (
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    )
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def bytes_in_use() -> int:
    """Of this process's heap, small and mapped blocks, by the allocator's own count."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = HeapUse
    use = mallinfo()
    return int(use.uordblks + use.hblkhd)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's allocator")
def test_nothing_grows_over_a_thousand_steps() -> None:
    training = Training(tokens=DOCUMENT, layers=1)
    held = {}
    for step in range(1000):
        training.step()
        if step in (20, 999):
            gc.collect()
            held[step] = bytes_in_use()
    # The smallest tensor that a step could forget, but for scalars.
    kept_a_step = BYTES * DOCUMENT
    assert held[999] - held[20] < 979 * kept_a_step / 4
