"""The figures of one step.

Its log line, its object in ``metrics.jsonl``, and its model TFLOP/s.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from evomesh.config.json_codec import float_word

TGS = "tgs (tokens/gpu/second)"


@dataclass(frozen=True)
class StepRecord:
    """The fields of InternEvo's step line, in its order, then ``extras``.

    Attributes:
        tflops: model TFLOP/s of one device, see ``model_tflops``.
        step: number of the batch, from 0.
        loss: mean over all target tokens of the step.
        tgs: tokens per device and second.
        lr: the learning rate that this step used.
        loss_scale: the scale that this step's gradient carried.
        grad_norm: global norm before clipping; inf or NaN in a skipped step.
        micro_num: micro-batches of this rank.
        num_consumed_tokens: of all steps so far, skipped ones too, over all ranks.
        inf_nan_skip_batches: skipped steps so far.
        num_samples_in_batch: segments in this rank's batch.
        largest_length: tokens in the longest of them.
        largest_batch, smallest_batch: most and fewest segments in one micro-batch.
        adam_beta2: beta2 that this step used.
        fwd_bwd_time: seconds.
        extras: more figures by name, for example ``acc``, ``perplexity``, ``loss/en``,
            ``val/en_loss``.
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
        """Return all figures under the names of the log line, in full precision."""
        figures: dict[str, float] = {}
        for item in fields(self):
            if item.name == "extras":
                continue
            # InternEvo's name of this figure is not an identifier.
            name = TGS if item.name == "tgs" else item.name
            figures[name] = getattr(self, item.name)
        return figures | self.extras

    def line(self) -> str:
        """Return ``tflops=...,step=...,loss=...,``.

        Speed and time have two decimals, and validation figures are left out.
        """
        shown = self.values()
        shown[TGS] = round(self.tgs, 2)
        shown["fwd_bwd_time"] = round(self.fwd_bwd_time, 2)
        parts = []
        for name, value in shown.items():
            is_validation = name.startswith(("val/", "eval/"))
            if not is_validation:
                part = f"{name}={value}"
                parts.append(part)
        return ",".join(parts)


class StepObjects:
    """A file of JSON objects with a ``step`` each, in the order of the steps.

    They are written as soon as the step is done. Floats are
    written so that they read back exactly. JSON has no NaN and no infinity:
    these are written as the strings "NaN", "Infinity" and "-Infinity", which
    ``float()`` reads.

    Args:
        path: created with its folders if absent.
        step: the next step. Objects of this step and later ones, which a resumed run
            writes again, are removed, and so is a line that a crash left unfinished.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        # The last checkpoint was of step 40 and the run was killed in step 47: of the
        # lines 0 to 46 and half a line, 0 to 39 stay.
        kept_bytes = 0
        with path.open("a+b") as file:
            file.seek(0)
            for line in file:
                is_torn = not line.endswith(b"\n")
                is_redone = _step_of(line) >= step
                if is_torn or is_redone:
                    break
                kept_bytes += len(line)
        # Unbuffered: a line is in the file even if the process is killed right after it.
        self._file = path.open("ab", buffering=0)
        self._file.truncate(kept_bytes)
        self._whole_bytes = kept_bytes  # of complete lines

    def append(self, values: Mapping[str, Any]) -> None:
        """Append one object.

        Raises:
            OSError: the disk is full, or the file was removed. No part of the object
                stays in the file.
        """
        words = {}
        for name, value in values.items():
            words[name] = float_word(value)
        text = json.dumps(words, ensure_ascii=False, allow_nan=False)
        line = text.encode(errors="backslashreplace") + b"\n"
        # A file without a name has no link, and what is written to it is lost.
        status = os.fstat(self._file.fileno())
        if not status.st_nlink:
            raise FileNotFoundError(
                errno.ENOENT, "the file was removed", str(self._path)
            )
        try:
            self._append_bytes(line)
        except OSError:
            self._file.truncate(self._whole_bytes)
            raise

    def _append_bytes(self, line: bytes) -> None:
        view = memoryview(line)
        while view:  # a disk with little room takes a part
            count = self._file.write(view)
            view = view[count:]
        self._whole_bytes += len(line)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class MetricsFile(StepObjects):
    """``metrics.jsonl``: one object per step, no step twice."""

    def write(self, record: StepRecord) -> None:
        """Append the object of one step; raises as ``append`` does."""
        self.append(record.values())


def _step_of(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1  # a line that evomesh did not write is kept


def model_tflops(
    *,
    seconds: float,
    sequences: int,
    seq_len: int,
    hidden_size: int,
    attention_width: int | None = None,
    attention_span: float | None = None,
    num_layers: int,
    vocab_size: int,
    mlp_ratio: float,
    recompute: bool,
    world_size: int,
) -> float:
    """Return the model TFLOP/s of one device by InternEvo's formula, as in its published figures.

    Attention is counted as the full square, not its causal half, with as many key/value
    heads as query heads; any recomputation counts as one more forward pass.
    ``benchmarks/`` measures by stricter rules.

    Args:
        seconds: time of the whole step.
        sequences: number of sequences of ``seq_len`` tokens in the global batch:
            micro_bsz * micro_num * data-parallel size.
        attention_width: number of query heads times their width; None: hidden_size, as
            in the formula.
        attention_span: tokens that a token sees, the mean over the layers; None:
            seq_len, as without windows.
        mlp_ratio: of the gated feed-forward network, whose three matrices make 1.5 times
            a plain one.
    """
    passes = 4 if recompute else 3  # backward costs two forward passes
    tokens = sequences * seq_len
    # One forward pass of one block, 2 operations for each multiply and add:
    #   four attention projections   tokens x 4 x D x width x 2
    #   feed-forward network         tokens x 3 x D x F x 2, with F = mlp_ratio D, which
    #                                the formula writes as 1.5 times a plain one
    #   scores and values            tokens x 2 x span x width x 2
    width = attention_width or hidden_size
    span = attention_span or seq_len
    feed_forward = 4 * 1.5 * mlp_ratio * hidden_size
    projections = (8 * width + feed_forward) * tokens * hidden_size
    attention = 4 * tokens * span * width
    # Forward and backward; it is never recomputed.
    head = 6 * tokens * hidden_size * vocab_size
    operations = passes * (projections + attention) * num_layers + head
    return operations / (seconds * world_size * 1e12)
