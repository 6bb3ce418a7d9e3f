"""What one step is known by: its log line, its object in ``metrics.jsonl``, and the figures derived from its time."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType

from evomesh.config.json_codec import float_word

TGS = "tgs (tokens/gpu/second)"


@dataclass(frozen=True)
class StepRecord:
    """The fields of the documents' step line, in their order, then ``extras``.

    Attributes:
        tflops: model TFLOP/s of one device, see ``model_tflops``.
        step: number of the batch, from 0.
        loss: mean over all target tokens of the step.
        tgs: tokens per device and second.
        lr: the learning rate that this step used.
        loss_scale: the scale that this step's gradient carried.
        grad_norm: global norm before clipping; inf or NaN in a skipped step.
        num_consumed_tokens: of all steps so far, skipped ones too, over all ranks.
        inf_nan_skip_batches: skipped steps so far.
        num_samples_in_batch: document pieces in this rank's batch.
        largest_length: tokens in the longest of them.
        largest_batch, smallest_batch: most and fewest pieces in one micro-batch.
        fwd_bwd_time: seconds.
        extras: further figures by name, for example ``acc``, ``perplexity``, ``loss/en``, ``val/en_loss``.
    """

    tflops: float
    step: int
    loss: float
    tgs: float
    lr: float
    loss_scale: float
    grad_norm: float
    micro_num: int
    num_consumed_tokens: int
    inf_nan_skip_batches: int
    num_samples_in_batch: int
    largest_length: int
    largest_batch: int
    smallest_batch: int
    adam_beta2: float
    fwd_bwd_time: float
    extras: dict[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """All figures under the names of the log line, in full precision."""
        own = {
            TGS if f.name == "tgs" else f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name != "extras"
        }
        return own | self.extras

    def line(self) -> str:
        """``tflops=...,step=...,loss=...,``; speed and time with two decimals, validation left to its own line."""
        shown = self.values() | {TGS: round(self.tgs, 2), "fwd_bwd_time": round(self.fwd_bwd_time, 2)}
        return ",".join(f"{name}={value}" for name, value in shown.items() if not name.startswith("val/"))


class MetricsFile:
    """``metrics.jsonl``: one JSON object a step, on disk as soon as the step is done, no step twice.

    Floats are written so that they read back exactly; those JSON has no number for are the strings "NaN", "Infinity"
    and "-Infinity", which ``float()`` understands.

    Args:
        path: made with its folders if absent.
        step: the step that comes next: objects of it or later ones, which a resumed run writes again, are cut off, and
            with them a line that a crash left unfinished.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n") or _step_of(line) >= step:
                break
            end += len(line)
        self._file.truncate(end)

    def write(self, record: StepRecord) -> None:
        values = {name: float_word(value) for name, value in record.values().items()}
        self._file.write(json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _step_of(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1  # not one of ours: it stays where it is


def model_tflops(
    *,
    seconds: float,
    sequences: int,
    seq_len: int,
    hidden_size: int,
    num_layers: int,
    vocab_size: int,
    mlp_ratio: float,
    recompute: bool,
    world_size: int,
) -> float:
    """Model TFLOP/s of one device by InternEvo's formula, which its published figures follow.

    Attention counts the full square, not its causal half, and every key/value head as a query head; any recomputation
    counts as one more forward pass. ``benchmarks/`` measures by stricter rules.

    Args:
        seconds: of the whole step.
        sequences: of ``seq_len`` tokens in the global batch: micro_bsz * micro_num * data-parallel size.
        mlp_ratio: of the gated mlp, whose three matrices make 1.5 times a plain one.
    """
    passes = 4 if recompute else 3
    tokens = sequences * seq_len
    block = (8 + 4 * 1.5 * mlp_ratio) * tokens * hidden_size**2 + 4 * tokens * seq_len * hidden_size
    head = 6 * tokens * hidden_size * vocab_size
    return (passes * block * num_layers + head) / (seconds * world_size * 1e12)
