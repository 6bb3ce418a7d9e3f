"""One thread that drives the engines; requests come from an event loop and their tokens go back to it."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread

from evomesh.config.schema import RotaryType
from evomesh.errors import UserError
from evomesh.generate.engine import GeneratedToken, GenerationEngine
from evomesh.generate.options import SamplingParams

logger = logging.getLogger(__name__)


class EngineError(Exception):
    """The engine broke while it worked on a request; a fresh one has taken its place."""


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to make. ``stream``: (seed, request), which key its random numbers."""

    prompt: Sequence[int]
    sampling: SamplingParams
    stream: tuple[int, int]
    rotary: RotaryType


class Submission:
    """Jobs given together; ``next`` tells their tokens as they come. Made and used on one event loop."""

    def __init__(self, engines: EngineLoop, jobs: Sequence[GenerationRequest]) -> None:
        self.jobs = list(jobs)
        self.open = set(range(len(jobs)))
        self.home = asyncio.get_running_loop()
        self.arrived: asyncio.Queue[tuple[int, GeneratedToken | Exception]] = asyncio.Queue()
        self._engines = engines

    async def next(self) -> tuple[int, GeneratedToken]:
        """(job, its next token). Raises what kept the engine from making it."""
        while True:
            index, token = await self.arrived.get()
            if isinstance(token, Exception):
                raise token
            if index in self.open:
                return index, token

    def close(self, index: int) -> None:
        """No more tokens of this job are wanted: its slot is free before the next step."""
        if index in self.open:
            self.open.remove(index)
            self._engines.commands.put((False, self, index))


class EngineLoop:
    """Runs one engine for each way to rotate positions, all on the same weights, in a thread of its own.

    Args:
        make: what builds the engine of each rotary type; called in the thread, at its first request and after a
            failure.
    """

    def __init__(self, make: Mapping[RotaryType, Callable[[], GenerationEngine]]) -> None:
        self.make = make
        self.commands: SimpleQueue[tuple[bool, Submission, int] | None] = SimpleQueue()
        self._engines: dict[RotaryType, GenerationEngine] = {}
        self._owners: dict[tuple[RotaryType, int], tuple[Submission, int]] = {}
        self._numbers: dict[tuple[Submission, int], tuple[RotaryType, int]] = {}
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step in hand; open orders get no more tokens."""
        if self._thread.is_alive():
            self.commands.put(None)
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def active(self) -> int:
        """Sequences that the engines know, waiting ones included."""
        return len(self._owners)

    def submit(self, jobs: Sequence[GenerationRequest]) -> Submission:
        """Hands jobs to the engines; called on an event loop."""
        order = Submission(self, jobs)
        for index in range(len(jobs)):
            self.commands.put((True, order, index))
        return order

    def _run(self) -> None:
        while True:
            # With nothing to do, the thread sleeps until a command comes.
            commands = [] if self._owners else [self.commands.get()]
            try:
                while True:
                    commands.append(self.commands.get_nowait())
            except Empty:
                pass
            for command in commands:
                if command is None:
                    return
                self._obey(*command)
            for rotary, engine in list(self._engines.items()):
                if engine.active:
                    self._step(rotary, engine)

    def _obey(self, wanted: bool, order: Submission, index: int) -> None:
        if not wanted:
            self._forget(order, index)
            return
        job = order.jobs[index]
        try:
            if job.rotary not in self._engines:
                self._engines[job.rotary] = self.make[job.rotary]()
            number = self._engines[job.rotary].add(job.prompt, job.sampling, job.stream)
        except UserError as error:
            self._deliver([(order, index, error)])
            return
        self._owners[job.rotary, number] = (order, index)
        self._numbers[order, index] = (job.rotary, number)

    def _forget(self, order: Submission, index: int) -> None:
        known = self._numbers.pop((order, index), None)
        if known is not None:
            rotary, number = known
            del self._owners[known]
            self._engines[rotary].cancel(number)

    def _step(self, rotary: RotaryType, engine: GenerationEngine) -> None:
        try:
            tokens = engine.step()
        except Exception:
            logger.exception("the engine failed; a new one takes its place")
            lost = [(key, owner) for key, owner in self._owners.items() if key[0] == rotary]
            for key, owner in lost:
                del self._owners[key], self._numbers[owner]
            del self._engines[rotary]
            self._deliver([(*owner, EngineError("the engine failed")) for _, owner in lost])
            return
        news: list[tuple[Submission, int, GeneratedToken | Exception]] = []
        for token in tokens:
            if (rotary, token.request) not in self._owners:
                continue
            order, index = self._owners[rotary, token.request]
            news.append((order, index, token))
            if token.finish:
                del self._owners[rotary, token.request], self._numbers[order, index]
        self._deliver(news)

    def _deliver(self, news: Sequence[tuple[Submission, int, GeneratedToken | Exception]]) -> None:
        """One wake-up of an event loop for all its tokens of a step."""
        homes = defaultdict(list)
        for order, index, token in news:
            homes[order.home].append((order, index, token))
        for home, mail in homes.items():
            try:
                home.call_soon_threadsafe(_arrive, mail)
            except RuntimeError:  # that event loop is closed: nobody waits any more
                for order, index, _ in mail:
                    self._forget(order, index)


def _arrive(mail: Sequence[tuple[Submission, int, GeneratedToken | Exception]]) -> None:
    for order, index, token in mail:
        order.arrived.put_nowait((index, token))
