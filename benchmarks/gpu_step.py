"""Speed and memory of complete training steps on one GPU, as `evomesh train` runs them, from batch to metrics.

Run: python benchmarks/gpu_step.py [--shape 1.3B 7B-width] [--tokens 2048 4096 8192 32768] [--recompute 0 1] [--packed]
     [--kernel auto FA3]

Model, optimizer and step are those of the product, on synthetic tokens in pinned memory: bfloat16 weights with float32
master weights, compiled blocks, variable-length attention. One row per shape, pack length and fraction of recomputed
layers; seconds are the median over steps, from one host synchronization to the next.

    TFLOPS  by InternEvo's formula (attention counted as a full square, recomputation as one more forward),
    exact   model TFLOP/s: 6 (parameters without embedding) tokens plus causal attention within documents counted
            once, 6 layers hidden (sum of squared lengths), however much is recomputed,
    product the share of exact in the best matrix product of the model's dtype, measured in the same run,
    memory  peak of allocated bytes in a step, next to the estimate of benchmarks/_memory.py, which ignores what
            the compiler chooses to keep.

Without CUDA it reports this and runs on the CPU, in float32, with shapes and packs that fit: the figures then show that
the script works, and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# Where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _memory import Sizes, bytes_in_16_bits
from _product import Training, made_up
from train_step import Shape, model_flops, product_rates

from evomesh.config.model import AttentionKernel
from evomesh.config.schema import ModelConfig
from evomesh.data.batch import Batch
from evomesh.errors import UserError
from evomesh.layers.attention_kernel import attention_kernel
from evomesh.layers.loss import tokens_per_chunk
from evomesh.monitor.metrics import model_tflops
from evomesh.train.allocator import keep_freed_memory

SHAPES = {
    "1.3B": Shape(24, 2048, 16, 5504, 32000, ()),
    "7B-width": Shape(8, 4096, 32, 11008, 32000, ()),
    "8B, half its layers": Shape(16, 4096, 32, 14336, 128256, (), 8),
    "10M": Shape(4, 256, 4, 704, 16000, ()),
}
ON_CUDA, ON_CPU = (
    (("1.3B", "7B-width"), (2048, 4096, 8192, 32768)),
    (("10M",), (256, 1024)),
)
# --packed: documents, as shares of a pack.
LENGTHS = (0.29, 0.02, 0.17, 0.08, 0.25, 0.05, 0.11, 0.03)


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    micro_num: int
    recompute: float
    packed: bool
    dtype: str
    device: torch.device
    kernel: AttentionKernel = "auto"

    @property
    def shape(self) -> Shape:
        return SHAPES[self.name]

    @property
    def title(self) -> str:
        return self.name if self.kernel == "auto" else f"{self.name}, {self.kernel}"

    @property
    def lengths(self) -> tuple[int, ...]:
        if not self.packed:
            return (self.tokens,)
        lengths = [max(int(share * self.tokens), 1) for share in LENGTHS]
        return (*lengths[1:], self.tokens - sum(lengths[1:]))

    def model(self, compiled: bool) -> ModelConfig:
        shape = self.shape
        return ModelConfig(
            model_type="LLAMA2",
            num_layers=shape.layers,
            hidden_size=shape.hidden,
            vocab_size=shape.vocab,
            num_attention_heads=shape.heads,
            num_kv_attention_heads=shape.kv_heads,
            mlp_ratio=shape.mlp / shape.hidden,
            multiple_of=1,
            dtype=self.dtype,  # type: ignore[arg-type]
            no_bias=True,
            checkpoint=self.recompute,
            compile=compiled,
            attention_kernel=self.kernel,
        )

    def batch(self) -> Batch:
        """On the host, as the loader hands it out."""
        ids = torch.randint(
            self.shape.vocab,
            (self.micro_num, self.tokens),
            generator=torch.Generator().manual_seed(0),
        )
        return made_up(ids, self.lengths, pin=self.device.type == "cuda")

    def model_flops(self) -> float:
        """Of a step, however much is recomputed."""
        return self.micro_num * model_flops(self.shape, self.lengths)

    def bytes(self) -> int:
        """By arithmetic, in 16 bits."""
        shape = self.shape
        sizes = Sizes(
            shape.layers,
            shape.hidden,
            shape.heads,
            shape.mlp,
            shape.vocab,
            self.tokens,
            tokens_per_chunk(shape.vocab, True),
            shape.kv_heads,
        )
        return bytes_in_16_bits(sizes, self.recompute)


@dataclass(frozen=True)
class Measured:
    """Attributes:
    seconds: of one step.
    memory: bytes, 0 where nobody counts them.
    """

    seconds: float
    memory: int


def packaged_kernels(device: torch.device) -> list[AttentionKernel]:
    """Kernels of packages that are installed here and run on this device."""
    names: tuple[AttentionKernel, ...] = ("FA3", "FA4")
    usable = []
    for name in names:
        model = ModelConfig(attention_kernel=name, dtype="bfloat16", head_dim=128)
        try:
            with attention_kernel(model, device):
                usable.append(name)
        except UserError:
            continue
    return usable


def measure(case: Case, steps: int, compiled: bool) -> Measured:
    with attention_kernel(case.model(compiled), case.device):
        return measure_with_kernel(case, steps, compiled)


def measure_with_kernel(case: Case, steps: int, compiled: bool) -> Measured:
    on_cuda = case.device.type == "cuda"
    # Not the product's own weights: drawing billions of them takes longer than all the steps.
    training = Training(case.model(compiled), case.device, draw_on_device=on_cuda)
    batch = case.batch()
    seconds = []
    for step in range(-2, steps):  # two to warm up: compilation, the allocator
        if step == 0 and on_cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        output = training.step(batch)
        if step >= 0:
            seconds.append(time.perf_counter() - start)
        assert output.update.check == "ok"
    return Measured(
        statistics.median(seconds), torch.cuda.max_memory_allocated() if on_cuda else 0
    )


def product_rate(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """Best FLOP/s of a matrix product over a few shapes."""
    if device.type == "cpu":
        return max(product_rates())
    best = 0.0
    for m, k, n in ((8192, 8192, 8192), (4096, 4096, 11008), (8192, 2048, 5504)):
        a, b = (
            torch.randn(m, k, device=device, dtype=dtype),
            torch.randn(k, n, device=device, dtype=dtype),
        )
        for _ in range(3):
            torch.mm(a, b)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        torch.cuda.synchronize()
        best = max(best, repeats * 2 * m * k * n / (time.perf_counter() - start))
    return best


def row(case: Case, found: Measured, rate: float) -> str:
    shape = case.shape
    exact = case.model_flops() / found.seconds
    formula = model_tflops(
        seconds=found.seconds,
        sequences=case.micro_num,
        seq_len=case.tokens,
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        vocab_size=shape.vocab,
        mlp_ratio=shape.mlp / shape.hidden,
        recompute=case.recompute > 0,
        world_size=1,
    )
    memory = (
        f"{found.memory / 2**30:.1f} ({case.bytes() / 2**30:.1f})"
        if found.memory
        else "not counted"
    )
    cells = (
        case.title,
        case.tokens,
        len(case.lengths),
        f"{case.recompute:g}",
        f"{case.micro_num * case.tokens / found.seconds:.0f}",
    )
    return _line(
        *cells, f"{formula:.3g}", f"{exact / 1e12:.3g}", f"{exact / rate:.2f}", memory
    )


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    names, tokens = ON_CUDA if device.type == "cuda" else ON_CPU
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    for name in args.shape or names:
        for count in args.tokens or tokens:
            for recompute in args.recompute:
                for kernel in args.kernel:
                    yield Case(
                        name,
                        count,
                        args.micro_num,
                        recompute,
                        args.packed,
                        dtype,
                        device,
                        kernel,
                    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens in a pack")
    parser.add_argument(
        "--micro-num", type=int, default=4, help="micro-batches of a step"
    )
    parser.add_argument(
        "--recompute",
        nargs="+",
        type=float,
        default=[0.0, 1.0],
        help="share of recomputed layers",
    )
    parser.add_argument(
        "--packed", action="store_true", help="eight documents in a pack instead of one"
    )
    parser.add_argument(
        "--kernel",
        nargs="+",
        choices=["auto", "FA3", "FA4"],
        default=["auto"],
        help="model.attention_kernel",
    )
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--steps", type=int, default=10)
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    else:
        keep_freed_memory()
        print(
            f"NO CUDA HERE: {torch.get_num_threads()} CPU threads, torch {torch.__version__}, float32, small shapes"
        )
    compiled = device.type == "cuda" and not args.eager
    chosen = list(cases(args, device))
    dtype = getattr(torch, chosen[0].dtype)
    rate = product_rate(device, dtype)
    print(
        f"blocks {'compiled' if compiled else 'eager'}; share of the best {chosen[0].dtype} product so far\n"
    )
    heads = (
        "shape",
        "tokens",
        "documents",
        "recompute",
        "tokens/s",
        "TFLOPS",
        "exact",
        "of product",
    )
    print(_line(*heads, "memory GiB (arithmetic)"))
    print(_line(*["---"] * 9), flush=True)
    for case in chosen:
        try:
            found = measure(case, args.steps, compiled)
        except torch.OutOfMemoryError:
            found = None
        rate = max(rate, product_rate(device, dtype))
        # Each row as soon as it is measured: a machine that is lent for minutes may be gone before the next.
        cells = (
            row(case, found, rate)
            if found
            else _line(case.title, case.tokens, "out of memory", *[""] * 6)
        )
        print(cells, flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()
    print(f"\nbest {chosen[0].dtype} product: {rate / 1e12:.3g} TFLOP/s")


if __name__ == "__main__":
    main()
