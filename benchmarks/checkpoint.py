"""Cost of checkpoints, each figure relative to a plain reference measured in the same run.

    python benchmarks/checkpoint.py [--mib 512] [--folder DIR] [--repeat 5]

stall      time that a background save blocks training / time of one memory copy of the same bytes
slowdown   steps (matrix products) while a save is written / steps with nothing written
write      durable save / writing and syncing one file of the same size
verify, load, reshard in GB/s; load verifies every hash.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.checkpoint.native.verify import verify
from evomesh.config.schema import ModelConfig, ParallelConfig


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def state(mib: int) -> dict[str, torch.Tensor]:
    """As of a model in training: large matrices, and many small vectors."""
    side = 1024
    count = max(1, mib // 4)
    tensors = {f"layers.{i}.w": torch.randn(side, side) for i in range(count)}
    return tensors | {f"layers.{i}.norm": torch.randn(side) for i in range(count)}


def plain_write(path: str, data: memoryview) -> None:
    with open(path, "wb", buffering=0) as file:
        view = data
        while view:
            view = view[file.write(view[: 16 << 20]) :]
        os.fsync(file.fileno())
    os.unlink(path)


def step(weight: torch.Tensor, x: torch.Tensor) -> None:
    for _ in range(4):
        x = torch.nn.functional.normalize(x @ weight)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="ckpt-bench", dir=options.folder)
    try:
        measure(folder, options.mib, options.repeat)
    finally:
        shutil.rmtree(folder)


def measure(folder: str, mib: int, repeat: int) -> None:
    tensors = state(mib)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    copies = {name: torch.empty_like(t).zero_() for name, t in tensors.items()}
    flat = memoryview(torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().data)
    writer = CheckpointWriter(f"{folder}/c", keep_last=2)
    writer.prepare(tensors, blocking=False)
    weight, x = torch.randn(512, 512), torch.randn(512, 512)
    quiet = statistics.median(timed(lambda: step(weight, x)) for _ in range(50))
    stalls, copied, busy, writes, plain = [], [], [], [], []
    for number in range(1, repeat + 1):
        copied.append(timed(lambda: [copies[n].copy_(t) for n, t in tensors.items()]))
        stalls.append(
            timed(lambda n=number: writer.save(2 * n, tensors, {}, {}, blocking=False))
        )
        while writer.saving:
            busy.append(timed(lambda: step(weight, x)))
        writer.wait()
        plain.append(timed(lambda: plain_write(f"{folder}/plain", flat)))
        writes.append(timed(lambda n=number: writer.save(2 * n + 1, tensors, {}, {})))
    found = CheckpointReader().newest(writer.folder, verify="record")
    assert found is not None
    choice = writer.folder.candidates()[0]
    verifying = statistics.median(
        timed(lambda: verify(choice, "data")) for _ in range(3)
    )
    loading = statistics.median(
        timed(lambda: CheckpointReader().load(found, copies)) for _ in range(3)
    )
    resharding = timed(lambda: _reshard(folder, writer))
    rows = [
        ("state", f"{size / 2**20:.0f} MiB in {len(tensors)} tensors"),
        (
            "stall",
            f"{_ratio(stalls, copied)} of one memory copy ({statistics.median(copied):.3f} s)",
        ),
        (
            "slowdown",
            f"{statistics.median(busy) / quiet:.2f}x while a save is written"
            if busy
            else "too short to see",
        ),
        (
            "write",
            f"{_ratio(writes, plain)} of a plain synced file ({size / statistics.median(writes) / 1e9:.2f} GB/s)",
        ),
        ("verify", f"{size / verifying / 1e9:.2f} GB/s"),
        ("load", f"{size / loading / 1e9:.2f} GB/s, every piece checked"),
        ("reshard", f"{size / resharding / 1e9:.2f} GB/s, one process"),
    ]
    for name, text in rows:
        print(f"{name:10}{text}")
    writer.close()


def _ratio(ours: list[float], reference: list[float]) -> str:
    ratios = [a / b for a, b in zip(ours, reference, strict=True)]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"


def _reshard(folder: str, writer: CheckpointWriter) -> None:
    from evomesh.checkpoint.native.reshard import reshard

    found = CheckpointReader().newest(writer.folder, verify="record")
    assert found is not None
    model = ModelConfig(
        model_type="LLAMA2",
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        vocab_size=64,
    )
    reshard(found, f"{folder}/r", model, ParallelConfig(), 1)


if __name__ == "__main__":
    main()
