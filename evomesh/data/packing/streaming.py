"""``data.type="streaming"``: text is tokenised and packed while training reads it.

Row n of the endless row sequence belongs to lane ``n mod G``, G being the global batch in packs. Each lane packs its
own rows; step s is one pack of every lane, and rank r holds lanes r, r + dp, ... So no row is lost or seen twice, a
rank tokenises only its own rows, and what a step holds depends on G, not on how ranks share it. A lane stands at
(document, tokens of it already used); with the reader's cursor that is the whole state.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from evomesh.config.schema import DataConfig
from evomesh.data.batch import Batch
from evomesh.data.packing.loader import collate
from evomesh.data.packing.packs import Pack, PackRule, assemble
from evomesh.data.prepare.tokenize import TextOptions, frame
from evomesh.data.records.reader import SourceFile
from evomesh.data.records.rows import RowCursor, RowStream, find_rows
from evomesh.data.token_files.lines import TokenArray, largest_id
from evomesh.data.tokenizer import Tokenizer, load_tokenizer
from evomesh.errors import UserError

TYPES = ["en"]  # rows carry no type; this is the name that the documents report
READY = 2  # batches kept ahead of the step


@dataclass
class StreamingLane:
    """One pack's worth of a step.

    Attributes:
        n: the next document.
        used: tokens of it that are already in packs.
        waiting: documents that were read and not used up, by n in rising order.
    """

    n: int
    used: int = 0
    waiting: deque[tuple[int, TokenArray]] = field(default_factory=deque)

    def pack(self, rule: PackRule, num_lanes: int) -> Pack | None:
        """The next pack, or None when more documents are needed."""
        parts: list[TokenArray] = []
        ends: list[int] = []
        total = -self.used
        for _, tokens in self.waiting:
            total += len(tokens)
            parts.append(tokens)
            ends.append(total)
            if total >= rule.packed_length:
                break
        else:
            return None
        stored = np.concatenate(parts)[self.used :]
        found = assemble(stored, np.array(ends), np.zeros(len(ends), np.int64), rule)
        left = total - rule.packed_length  # tokens of the last document that stay for the next pack
        for _ in range(len(parts) - (1 if left else 0)):
            self.n = self.waiting.popleft()[0] + num_lanes
        self.used = len(parts[-1]) - left if left else 0
        return found


class StreamingPacks:
    """Packs of some lanes, in step.

    Args:
        rows: the row sequence.
        tokenizer: encodes texts; bos and eos as ``evomesh tokenize`` puts them by default.
        rule: packing.
        lanes: own lanes of all ``num_lanes``.
        num_lanes: G.
        min_length: shorter documents are left out.
        vocab_size: ids at or past it are refused.
        state: where to go on.
    """

    def __init__(
        self,
        rows: RowStream,
        tokenizer: Tokenizer,
        rule: PackRule,
        lanes: Sequence[int],
        num_lanes: int,
        *,
        min_length: int,
        vocab_size: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.rule, self.num_lanes = tokenizer, rule, num_lanes
        self.min_length, self.vocab_size = min_length, vocab_size
        options = TextOptions(eos=tokenizer.eos_id is not None)
        self._head, self._tail = frame(tokenizer, options)
        saved = (state or {}).get("lanes", {})
        self.lanes = {lane: StreamingLane(*saved.get(str(lane), (lane, 0))) for lane in lanes}
        cursor = RowCursor(**state["cursor"]) if state else RowCursor()
        self._cursors = deque([cursor])  # starts of the windows that a lane may still need
        self._windows = rows.windows(cursor)

    def take(self) -> list[Pack]:
        """The next pack of each own lane."""
        packs = []
        for lane in self.lanes.values():
            while (pack := lane.pack(self.rule, self.num_lanes)) is None:
                self._read_window()
            packs.append(pack)
        return packs

    def state(self) -> dict[str, Any]:
        """Where the own lanes and the reader stand, as JSON."""
        oldest = min(lane.n for lane in self.lanes.values())
        while len(self._cursors) > 1 and self._cursors[1].n <= oldest:
            self._cursors.popleft()
        lanes = {str(number): [lane.n, lane.used] for number, lane in self.lanes.items()}
        return {"cursor": asdict(self._cursors[0]), "lanes": lanes}

    def _read_window(self) -> None:
        window = next(self._windows)
        self._cursors.append(window.behind)
        wanted = []
        for n in range(window.n, window.n + len(window.texts)):
            lane = self.lanes.get(n % self.num_lanes)
            if lane is not None and n >= lane.n and window.texts[n - window.n]:
                wanted.append(n)
        encoded = self.tokenizer.encode_batch([window.texts[n - window.n] for n in wanted])
        for n, ids in zip(wanted, encoded, strict=True):
            tokens = np.array(self._head + ids + self._tail, np.int64)
            if len(tokens) < max(1, self.min_length):
                continue
            if largest_id(tokens) >= self.vocab_size:
                raise UserError(
                    f"token id {largest_id(tokens)} is outside the model's vocabulary",
                    where=window.places[n - window.n],
                    expected=f"ids below model.vocab_size={self.vocab_size}",
                    fix=f"set model.vocab_size to at least {self.tokenizer.vocab_size}, the tokenizer's",
                )
            self.lanes[n % self.num_lanes].waiting.append((n, tokens))


class StreamingBatches:
    """A ``BatchStream`` over text, its batches made ahead by one background thread.

    With several ranks each state covers its own lanes: a checkpoint needs ``merge_states`` of all ranks' states.
    """

    def __init__(self, packs: StreamingPacks, step: int, extra_state: dict[str, Any]) -> None:
        self.packs, self._extra = packs, extra_state
        self._state = {"step": step, **packs.state()}
        self._ready: queue.Queue[tuple[Batch, dict[str, Any]] | BaseException] = queue.Queue(READY)
        self._next: tuple[Batch, dict[str, Any]] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(step,), name="data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.check()
        assert self._next is not None
        (batch, self._state), self._next = self._next, None
        return batch

    def check(self) -> None:
        """Wait for the next batch without taking it."""
        if self._next is None:
            item = self._ready.get()
            if isinstance(item, BaseException):
                self._ready.put(item)  # asking again fails again
                raise item
            self._next = item

    def skip(self) -> None:
        """Consume the next batch without handing it out."""
        next(self)

    def state(self) -> dict[str, Any]:
        """State before the next batch, as JSON."""
        return {**self._state, **self._extra}

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        with suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._thread.join()

    def _work(self, step: int) -> None:
        try:
            while not self._stop.is_set():
                batch = collate(self.packs.take())
                step += 1
                self._put((batch, {"step": step, **self.packs.state()}))
        except Exception as error:  # handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: tuple[Batch, dict[str, Any]] | BaseException) -> None:
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                return


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state of all lanes from the states of all data-parallel ranks at the same step."""
    lanes = {number: place for state in states for number, place in state["lanes"].items()}
    first = min(states, key=lambda state: int(state["cursor"]["n"]))
    return {**first, "lanes": lanes}


@dataclass(frozen=True)
class StreamingData:
    """Training data of ``data.type="streaming"``.

    The number of packs is not known before all text was tokenised: ``num_packs`` is 0.
    """

    config: DataConfig
    files: list[SourceFile]
    tokenizer: Tokenizer
    vocab_size: int
    manifest: dict[str, Any]
    report: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=lambda: list(TYPES))
    num_packs: int = 0

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return merge_states(states)

    def table(self) -> str:
        return "\n".join(f"{row['file']}  tokenised on the fly" for row in self.report)

    def stream(
        self, step: int = 0, dp_rank: int = 0, dp_size: int = 1, state: dict[str, Any] | None = None
    ) -> StreamingBatches:
        """Batches of one rank from step ``step`` (by reading up to it), or from a state.

        Raises:
            UserError: the state belongs to other data or to another global batch.
        """
        config = self.config
        total = config.micro_num * dp_size
        own = range(dp_rank, total, dp_size)
        if state is not None:
            self._check(state, own, total)
        rule = PackRule(config.packed_length, config.seq_len, config.pack_sample_into_one, config.order)
        packs = StreamingPacks(
            RowStream(self.files, config.content_name, config.seed),
            self.tokenizer,
            rule,
            own,
            total,
            min_length=config.min_length,
            vocab_size=self.vocab_size,
            state=state,
        )
        extra = {"manifest": self.manifest["hash"], "num_lanes": total}
        batches = StreamingBatches(packs, int(state["step"]) if state else 0, extra)
        for _ in range(0 if state else step):
            batches.skip()
        return batches

    def _check(self, state: dict[str, Any], own: range, total: int) -> None:
        if state.get("manifest") != self.manifest["hash"]:
            raise UserError(
                f"the data changed since the checkpoint ({state.get('manifest')} -> {self.manifest['hash']})",
                where="data.train_folder",
                fix="restore the old files and tokenizer, or start from the checkpoint's weights only",
            )
        if state["num_lanes"] != total or any(str(lane) not in state["lanes"] for lane in own):
            raise UserError(
                f"the checkpoint's steps have {state['num_lanes']} packs ({len(state['lanes'])} of them recorded), "
                f"this run's have {total}",
                where="data.micro_num x data-parallel size",
                expected="the same global batch; streaming data cannot change it on a resume",
            )


def open_streaming(config: DataConfig, vocab_size: int) -> StreamingData:
    """Find files and tokenizer of a streaming config.

    Raises:
        UserError: one of them is missing.
    """
    if config.train_folder is None:
        raise UserError(
            'data.type="streaming" needs data.train_folder', where="data.train_folder", expected="a folder"
        )
    if config.rampup_batch_size is not None:
        raise UserError(
            'data.type="streaming" deals rows to a fixed number of packs a step',
            where="data.rampup_batch_size",
            fix="remove it, or tokenise the text first",
        )
    files, warnings = find_rows(
        config.train_folder, "data.train_folder", config.subset_name, "train", config.split_name
    )
    tokenizer = _tokenizer(config)
    report = [{"file": str(file.place), "type": TYPES[0], "bytes": file.size} for file in files]
    text = repr([(_name(file), file.size) for file in files] + [tokenizer.hash, config.content_name])
    manifest = {"files": report, "types": TYPES, "hash": xxhash.xxh3_64_hexdigest(text.encode())}
    return StreamingData(config, files, tokenizer, vocab_size, manifest, report, warnings)


def _name(file: SourceFile) -> str:
    return str(file.place.relative_to(file.path.parent))


def _tokenizer(config: DataConfig) -> Tokenizer:
    if config.tokenizer_path is None:
        raise UserError(
            'data.type="streaming" needs data.tokenizer_path',
            where="data.tokenizer_path",
            expected="a tokenizer",
        )
    return load_tokenizer(config.tokenizer_path, "data.tokenizer_path")


class MemoryDocuments:
    """Tokenised documents held in memory: a validation set of text."""

    type_id = 0

    def __init__(self, name: str, documents: list[list[int]]) -> None:
        self.name, self.documents = name, documents
        self.lengths: NDArray[np.integer] = np.array([len(document) for document in documents], np.int64)

    def read(self, documents: NDArray[np.integer]) -> TokenArray:
        return np.concatenate([np.array(self.documents[int(place)], np.int64) for place in documents])


def read_documents(config: DataConfig, vocab_size: int) -> MemoryDocuments:
    """All documents of ``data.valid_folder``, tokenised.

    Raises:
        UserError: no file, no text, or an id outside the vocabulary.
    """
    assert config.valid_folder is not None
    files, _ = find_rows(
        config.valid_folder, "data.valid_folder", config.subset_name, "valid", config.valid_split_name
    )
    tokenizer = _tokenizer(config)
    head, tail = frame(tokenizer, TextOptions(eos=tokenizer.eos_id is not None))
    documents: list[list[int]] = []
    for window in RowStream(files, config.content_name, config.seed).windows(RowCursor()):
        if window.behind.epoch:
            break
        texts = [text for text in window.texts if text]
        documents += [head + ids + tail for ids in tokenizer.encode_batch(texts)]
    documents = [document for document in documents if len(document) >= max(1, config.valid_min_length)]
    largest = max((max(document) for document in documents), default=-1)
    if largest >= vocab_size:
        raise UserError(
            f"token id {largest} is outside the model's vocabulary",
            where=config.valid_folder,
            expected=f"ids below model.vocab_size={vocab_size}",
        )
    return MemoryDocuments(files[0].path.parent.name, documents)
