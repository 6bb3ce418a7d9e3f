"""Tokenize and pack text while training reads it (``data.type="streaming"``).

Row n of the endless row sequence belongs to lane ``n mod G``, where G is the global
batch in packs. Each lane packs its own rows; step s is one pack of every lane, and rank
r has lanes r, r + dp, ... So no row is lost or seen twice, a rank tokenizes only its
own rows, and the content of a step depends on G, not on the layout. The position of a
lane is (document, tokens of it already used); with the reader's cursor that is the
whole state.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import xxhash

from evomesh.config.data import DataConfig
from evomesh.data.batch import Batch
from evomesh.data.packing.lanes import StreamingLane
from evomesh.data.packing.loader import collate
from evomesh.data.packing.packs import Pack, PackRule
from evomesh.data.packing.text_documents import (
    UnusedRows,
    check_ids,
    encode_texts,
    find_text_files,
    load_text_tokenizer,
    text_boundary_ids,
)
from evomesh.data.records.rows import RowCursor, RowStream, RowWindow
from evomesh.data.records.source_files import SourceFile
from evomesh.data.token_files.bin_dataset import count_targets
from evomesh.data.token_files.lines import TokenArray, largest_id
from evomesh.data.tokenizer import Tokenizer
from evomesh.errors import UserError

TYPES = ["en"]  # rows have no type; InternEvo reports this name
PREFETCHED = 2  # batches prepared before the step asks


class StreamingPacks:
    """The packs of some lanes, one of each per step.

    Args:
        rows: the row sequence.
        tokenizer: encodes texts; bos and eos are added as ``evomesh tokenize`` does by default.
        rule: packed length, segments and targets.
        lanes: this rank's lanes, out of ``num_lanes``.
        num_lanes: G.
        min_length: shorter documents are left out.
        vocab_size: ids at or above it are refused.
        state: state to resume from; None: start with the first row.
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
        self.tokenizer = tokenizer
        self.rule = rule
        self.num_lanes = num_lanes
        self.min_length = min_length
        self.vocab_size = vocab_size
        self._prefix, self._suffix = text_boundary_ids(tokenizer)
        if state is None:
            cursor = RowCursor()
            self.lanes = {lane: StreamingLane(n=lane) for lane in lanes}
        else:
            cursor = RowCursor(**state["cursor"])
            self.lanes = {
                lane: StreamingLane(*state["lanes"][str(lane)]) for lane in lanes
            }
        # Starts of the windows that a lane may still need.
        self._cursors = deque([cursor])
        self._unused = UnusedRows(cursor)
        self._windows = rows.windows(cursor)

    def take(self) -> list[Pack]:
        """Return the next pack of each of this rank's lanes."""
        # A window has rows of all lanes, so a lane that is short of documents fills the
        # others too: these wait in their lanes.
        packs = []
        for lane in self.lanes.values():
            while (pack := lane.next_pack(self.rule, self.num_lanes)) is None:
                self._read_window()
            packs.append(pack)
        return packs

    def state(self) -> dict[str, Any]:
        """Return the positions of this rank's lanes and of the reader, as JSON."""
        self._drop_passed_windows()
        positions = {}
        for number, lane in self.lanes.items():
            key = str(number)  # as all keys of JSON
            positions[key] = [lane.n, lane.used]
        return {"cursor": asdict(self._cursors[0]), "lanes": positions}

    def _drop_passed_windows(self) -> None:
        """Drop the starts of windows whose rows every lane has passed: a resume reads from the first one left."""
        oldest_row = min(lane.n for lane in self.lanes.values())
        while len(self._cursors) > 1 and self._cursors[1].n <= oldest_row:
            self._cursors.popleft()

    def _read_window(self) -> None:
        """Read the next window of rows and hand this rank's documents in it to their lanes."""
        window = next(self._windows)
        cursor = window.next_cursor
        self._cursors.append(cursor)
        texts = self._needed_texts(window)
        targets = 0
        for row, tokens in self._encode(texts):
            index = row - window.first_row
            location = window.locations[index]
            targets += self._add_document(row, tokens, location)
        self._unused.end_window(cursor, targets, self.min_length)

    def _encode(self, texts: Mapping[int, str]) -> Iterator[tuple[int, TokenArray]]:
        """Yield the tokens of each text, bos and eos included, with its row."""
        encoded = encode_texts(self.tokenizer, list(texts.values()))
        for row, ids in zip(texts, encoded, strict=True):
            with_ends = self._prefix + ids + self._suffix
            yield row, np.array(with_ends, np.int64)

    def _needed_texts(self, window: RowWindow) -> dict[int, str]:
        """Return the texts of this rank's rows by row; those of other ranks are not tokenized."""
        rows = enumerate(window.texts, window.first_row)
        return {row: text for row, text in rows if text and self._needs(row)}

    def _add_document(self, row: int, tokens: TokenArray, location: str) -> int:
        """Hand a document to its lane unless it is too short; return how many of its tokens can be targets."""
        length = len(tokens)
        shortest = max(1, self.min_length)
        if length < shortest:
            self._unused.add(length)
            return 0
        largest = largest_id(tokens)
        check_ids(largest, self.vocab_size, self.tokenizer, location)
        targets = self._count_targets(tokens)
        if not targets:
            self._unused.add(length, is_document=True)
        lane = self.lanes[row % self.num_lanes]
        lane.waiting.append((row, tokens))
        return targets

    def _count_targets(self, tokens: TokenArray) -> int:
        """Return how many tokens of a document can be targets."""
        if self.rule.crosses_documents:
            return count_targets(tokens)
        return count_targets(tokens, np.array([len(tokens)]))

    def _needs(self, row: int) -> bool:
        """Return whether a row belongs to a lane of this rank that has not used it yet."""
        lane = self.lanes.get(row % self.num_lanes)
        return lane is not None and row >= lane.n


class PrefetchedStep(NamedTuple):
    """A batch that was prefetched, and the state after it."""

    batch: Batch
    state_after: dict[str, Any]


PrefetchResult = PrefetchedStep | BaseException  # an error of the background thread


class StreamingBatches:
    """A ``BatchStream`` over text; one background thread prefetches its batches.

    With several ranks each state covers only the rank's lanes: a checkpoint needs
    ``merge_states`` of all of them.
    """

    def __init__(
        self, packs: StreamingPacks, step: int, extra_state: dict[str, Any]
    ) -> None:
        self.packs = packs
        self._extra_state = extra_state
        self._state = {"step": step, **packs.state()}  # before the next batch
        self._prefetched: queue.Queue[PrefetchResult] = queue.Queue(PREFETCHED)
        self._next: PrefetchedStep | None = None  # taken from the queue by ``check``
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._prefetch,
            args=(step,),
            name="data",
            daemon=True,
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.check()
        assert self._next is not None
        batch, self._state = self._next
        self._next = None
        return batch

    def check(self) -> None:
        """Wait for the next batch without taking it."""
        if self._next is None:
            item = self._prefetched.get()
            if isinstance(item, BaseException):
                self._prefetched.put(item)  # the next call fails again
                raise item
            self._next = item

    def skip(self) -> None:
        """Consume the next batch without returning it."""
        next(self)

    def state(self) -> dict[str, Any]:
        """Return the state before the next batch, as JSON."""
        return {**self._state, **self._extra_state}

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        # Empty the queue, so that a thread that waits for space in it can end.
        with suppress(queue.Empty):
            while True:
                self._prefetched.get_nowait()
        self._thread.join()

    def _prefetch(self, step: int) -> None:
        try:
            while not self._stop.is_set():
                batch = collate(self.packs.take())
                step += 1
                # Taken here, as the packs are ahead of the batch that training has.
                state_after = {"step": step, **self.packs.state()}
                self._put(PrefetchedStep(batch, state_after))
        except Exception as error:  # raised in the consumer's thread
            self._put(error)

    def _put(self, item: PrefetchResult) -> None:
        """Put an item into the queue once there is space, unless the stream is closed first."""
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._prefetched.put(item, timeout=0.1)
                return


@dataclass(frozen=True)
class StreamingData:
    """The training data of ``data.type="streaming"``.

    The number of packs is unknown until all text is tokenized: ``num_packs`` is 0.
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
        """Return one state of all lanes, for any layout, from the states of all ranks at the same step."""
        # Each rank reads all rows and drops those of other ranks. From the earliest
        # cursor on there is every row that some lane still needs.
        earliest = min(states, key=lambda state: int(state["cursor"]["n"]))
        lanes: dict[str, Any] = {}
        for state in states:
            lanes |= state["lanes"]
        return {**earliest, "lanes": lanes}

    def table(self) -> str:
        """Return the files, one per line."""
        return "\n".join(f"{row['file']}  tokenized on the fly" for row in self.report)

    def stream(
        self, dp_rank: int = 0, dp_size: int = 1, state: dict[str, Any] | None = None
    ) -> StreamingBatches:
        """Return the batches of one rank, from the first step or from a state.

        Raises:
            UserError: the state belongs to other data or to another global batch.
        """
        config = self.config
        # One lane for each pack of a step; of 8 lanes rank 1 of 4 has 1 and 5. A lane
        # fills its pack from rows of its number alone, whichever rank it is on, so the
        # packs of a step do not depend on the layout.
        num_lanes = config.micro_num * dp_size
        lanes = range(dp_rank, num_lanes, dp_size)
        if state is not None:
            self._check_state(state, lanes, num_lanes)
        packs = StreamingPacks(
            RowStream(self.files, config.content_name, config.seed),
            self.tokenizer,
            PackRule.from_config(config),
            lanes,
            num_lanes,
            min_length=config.min_length,
            vocab_size=self.vocab_size,
            state=state,
        )
        step = int(state["step"]) if state else 0
        return StreamingBatches(
            packs, step, {"manifest": self.manifest["hash"], "num_lanes": num_lanes}
        )

    def _check_state(
        self, state: dict[str, Any], lanes: Sequence[int], num_lanes: int
    ) -> None:
        if state.get("manifest") != self.manifest["hash"]:
            raise UserError(
                f"the data changed since the checkpoint ({state.get('manifest')} -> {self.manifest['hash']})",
                where="data.train_folder",
                fix="restore the old files and tokenizer, or load only the checkpoint's weights",
                code="EVO-DATA-020",
            )
        has_lanes = all(str(lane) in state["lanes"] for lane in lanes)
        if state["num_lanes"] != num_lanes or not has_lanes:
            raise UserError(
                f"the checkpoint's steps have {state['num_lanes']} packs ({len(state['lanes'])} of them recorded), "
                f"this run's have {num_lanes}",
                where="data.micro_num x data-parallel size",
                expected="the same global batch; streaming data cannot change it on a resume",
                code="EVO-DATA-020",
            )


def open_streaming(config: DataConfig, vocab_size: int) -> StreamingData:
    """Find the files and the tokenizer of a streaming config.

    Raises:
        UserError: one of them cannot be read.
    """
    files, warnings = find_text_files(config, "train")
    tokenizer = load_text_tokenizer(config)
    report = []
    identity: list[Any] = []
    for file in files:
        path = str(file.full_path)
        report.append({"file": path, "type": TYPES[0], "bytes": file.size})
        name = _relative_name(file)
        identity.append((name, file.size))
    # What a run may resume with: the same files, tokenizer and texts in them.
    identity += [tokenizer.hash, config.content_name]
    written = repr(identity)
    digest = xxhash.xxh3_64_hexdigest(written.encode())
    manifest = {"files": report, "types": TYPES, "hash": digest}
    return StreamingData(
        config,
        files,
        tokenizer,
        vocab_size,
        manifest,
        report,
        warnings,
    )


def _relative_name(file: SourceFile) -> str:
    return str(file.full_path.relative_to(file.path.parent))
