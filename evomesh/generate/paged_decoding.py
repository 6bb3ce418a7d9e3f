"""The next logits of an engine: with the cache in rows, or in pages and as one captured graph.

Shapes: B sequences in use, R rows of a step (B or more), W pages of the longest table, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomesh.errors import UserError
from evomesh.generate.cache import KeyValueCache
from evomesh.generate.options import PagedMode
from evomesh.generate.paged_attention import (
    PagedKernel,
    PagedRows,
    attend_to_pages,
    attention_layers,
    fault_of_kernel,
    reason_against_pages,
)
from evomesh.generate.paged_cache import PAGE_SIZE, PagedCache
from evomesh.generate.staged import StagedModel
from evomesh.generate.step_graph import Capture, GraphCapture, Step, run_eagerly
from evomesh.layers.attention import Attention, SequenceBounds
from evomesh.models.decoder import Decoder
from evomesh.models.language_model import LanguageModel, short_length
from evomesh.rounding import next_power_of_two

logger = logging.getLogger(__name__)

CAPTURED_AFTER = 8  # steps of the same number of rows: capturing takes as long as some


class RowDecoding:
    """The next logits with a ``KeyValueCache``."""

    def __init__(
        self,
        model: LanguageModel,
        slots: int,
        context_length: int,
        device: torch.device,
    ) -> None:
        self.model = model
        self.device = device
        self.cache = KeyValueCache(slots, context_length)

    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits [B, V] that follow these tokens, one of each sequence in use."""
        ids = torch.tensor(tokens, device=self.device)
        bounds, attend = self.cache.decode_step(self.device)
        hidden = self.model(ids, bounds, attend)
        return self.model.logits(hidden)


@dataclass(frozen=True)
class PagedSettings:
    """The settings of paged decoding.

    Attributes:
        kernel: attends to them.
        capture: makes a graph of a step; ``run_eagerly`` makes none.
        page_size: tokens of a page.
        pages: of the pool; None: enough for every slot.
    """

    kernel: PagedKernel
    capture: Capture
    page_size: int = PAGE_SIZE
    pages: int | None = None


class PagedDecoding:
    """The next logits with a ``PagedCache``.

    A step has a power of two of rows, of which the last ones may be empty. Its inputs are in
    one tensor, always the same one for a number of rows, so that its kernels can be captured
    once and launched together from then on.
    """

    def __init__(
        self,
        model: LanguageModel,
        slots: int,
        context_length: int,
        device: torch.device,
        settings: PagedSettings,
    ) -> None:
        self.model = model
        self.device = device
        self.settings = settings
        self.cache = PagedCache(
            slots,
            context_length,
            page_size=settings.page_size,
            pages=settings.pages,
        )
        self._steps: dict[int, _PagedStep] = {}  # by number of rows

    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits [B, V] that follow these tokens, one of each sequence in use.

        Whoever wants them must have read them, on the host or with a synchronization, before
        the next call: it writes to the same memory.
        """
        count = len(tokens)
        step = self._step_of(count)
        places = self.cache.extend()
        logits = step.run(tokens, places)
        return logits[:count]

    def _step_of(self, count: int) -> _PagedStep:
        """Return the step with the fewest rows for ``count`` sequences."""
        rows = min(next_power_of_two(count), self.cache.slots)
        if rows not in self._steps:
            self._steps[rows] = _PagedStep(self, rows)
        return self._steps[rows]


class _PagedStep:
    """One decoding step of R rows.

    Attributes:
        inputs: [R, 3 + W] int32: the token, its position and its place in the pool, then the pages of the sequence.
    """

    def __init__(self, decoding: PagedDecoding, rows: int) -> None:
        self._model = decoding.model
        self._cache = decoding.cache
        self._settings = decoding.settings
        device = decoding.device
        width = 3 + self._cache.pages_per_row
        self._on_host = torch.zeros(
            (rows, width),
            dtype=torch.int32,
            pin_memory=device.type == "cuda",
        )
        self.inputs = self._on_host.to(device, copy=True)
        self._query_bounds = torch.arange(
            rows + 1,
            dtype=torch.int32,
            device=device,
        )
        self._longest = self._cache.pages_per_row * self._cache.page_size
        self._key_bounds = self._query_bounds * self._longest
        # Not compute itself: as a reference to this step it would keep the pool of a discarded
        # engine until Python looks for cycles.
        self._captured: Step | None = None
        self._runs = 0

    def run(self, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
        """Return the logits [R, V] of the next step."""
        self._fill(tokens, places)
        self._runs += 1
        if self._runs == CAPTURED_AFTER:
            self._captured = self._settings.capture(self.compute)
        launch = self._captured or self.compute
        return launch()

    def _fill(self, tokens: Sequence[int], places: Sequence[int]) -> None:
        """Copy what a step needs to the device, at once.

        The step before has ended by now, since its tokens are known: nothing reads the host's
        copy any more. Empty rows are sequences of one token in page 0.
        """
        width = self.inputs.shape[1]
        empty = [0] * width
        lines: list[list[int]] = []
        for row, table in enumerate(self._cache.tables):
            line = [
                tokens[row],
                self._cache.lengths[row] - 1,
                places[row],
                *table,
            ]
            line += empty[len(line) :]
            lines.append(line)
        missing = len(self.inputs) - len(lines)
        lines += [empty] * missing
        numbers = self._on_host.numpy()
        numbers[:] = lines
        self.inputs.copy_(
            self._on_host,
            non_blocking=True,
        )

    def compute(self) -> Tensor:
        """Return the logits [R, V] of what is in ``inputs``, without a look at the host."""
        ids = self.inputs[:, 0].long()
        positions = self.inputs[:, 1]
        places = self.inputs[:, 2].long()
        rows = PagedRows(
            lengths=positions + 1,
            tables=self.inputs[:, 3:],
            query_bounds=self._query_bounds,
            key_bounds=self._key_bounds,
            longest=self._longest,
        )

        def store_and_attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            bounds: SequenceBounds,
            module: Attention,
        ) -> Tensor:
            keys, values = self._cache.store(module, k, v, places)
            return self._settings.kernel(
                q,
                keys,
                values,
                rows,
                module.window,
                module.scores.scale,
            )

        bounds = SequenceBounds(positions.long(), self._query_bounds, 1)
        hidden = self._model(ids, bounds, store_and_attend)
        return self._model.logits(hidden)


def choose_decoding(
    model: LanguageModel,
    slots: int,
    context_length: int,
    paged: PagedMode,
    pages: int | None = None,
) -> RowDecoding | PagedDecoding:
    """Return how to decode: in pages where torch has a kernel for them that computes what dense attention does.

    Raises:
        UserError: ``paged`` is "on" where it cannot be, or there are too few pages for a single sequence.
    """
    device = next(model.parameters()).device
    reason = _reason_against(model, device, paged, context_length)
    if reason and paged == "on":
        raise _refusal(reason)
    if reason or paged == "off":
        return RowDecoding(model, slots, context_length, device)
    needed = -(-context_length // PAGE_SIZE)
    if pages is not None and pages < needed:
        raise UserError(
            f"{pages} pages of {PAGE_SIZE} tokens hold no sequence of {context_length} tokens",
            where="pages",
            expected=f"at least {needed}",
            code="EVO-GEN-001",
        )
    capture = GraphCapture() if can_capture(model) else run_eagerly
    settings = PagedSettings(attend_to_pages, capture, pages=pages)
    return PagedDecoding(model, slots, context_length, device, settings)


def check_paged(model: LanguageModel, paged: PagedMode) -> None:
    """Refuse what an engine would refuse, before there is one.

    Raises:
        UserError: ``paged`` is "on" where it cannot be.
    """
    if paged != "on":
        return
    device = next(model.parameters()).device
    reason = _obstacle(model, device) or _fault(model, device)
    if reason:
        raise _refusal(reason)


def _refusal(reason: str) -> UserError:
    return UserError(
        f"this model cannot be decoded with paged keys and values: {reason}",
        where="paged",
        expected="auto or off",
        fix="leave it out",
        code="EVO-GEN-005",
    )


def _reason_against(
    model: LanguageModel,
    device: torch.device,
    paged: PagedMode,
    context_length: int,
) -> str:
    """Return why the model is not decoded in pages; a kernel that is wrong is warned of."""
    if paged == "off":
        return ""
    reason = _obstacle(model, device)
    if paged == "auto" and not reason:
        reason = _waste(model, context_length)
    if reason:
        return reason
    fault = _fault(model, device)
    if fault and paged == "auto":
        logger.warning("decoding: keys and values are not paged: %s", fault)
    return fault


def _obstacle(model: LanguageModel, device: torch.device) -> str:
    """Return what speaks against pages without a look at the kernel, or ""."""
    reason = reason_against_pages(model, device)
    # Each rank would check the kernel for itself, and one that finds a fault would make
    # messages of other shapes than the rest.
    if not reason and _is_split(model):
        return "it is distributed over several processes"
    return reason


def _is_split(model: LanguageModel) -> bool:
    axes = {layer.placement.axis.size for layer in attention_layers(model)}
    return isinstance(model, StagedModel) or axes != {1}


def _waste(model: LanguageModel, context_length: int) -> str:
    """Return which layers would take more memory in pages than in rows, or ""."""
    windows = {layer.window or context_length for layer in attention_layers(model)}
    shortest = min(windows)
    if shortest >= context_length:
        return ""
    return f"pages keep all {context_length} tokens, rows the {shortest} of a layer's window"


def _fault(model: LanguageModel, device: torch.device) -> str:
    """Return what is wrong with torch's kernel, or ""."""
    fault = fault_of_kernel(attend_to_pages, model, device)
    return fault and f"torch's kernel cannot be relied on here: {fault}"


def can_capture(model: LanguageModel) -> bool:
    """Return whether a step copies nothing from the host and changes nothing there.

    longrope's tables are made of Python numbers, and a custom model may count its calls.
    """
    return type(model) is Decoder and short_length(model) is None
