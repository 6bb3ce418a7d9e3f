"""The engine thread: event loops submit requests to it, and it posts their tokens back.

event loop: submit() -> Submission      commands        engine thread: engine.add()
            Submission.next()      <----  events  ----                 engine.step()
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeAlias

from evomesh.config.schema import RotaryType
from evomesh.errors import UserError
from evomesh.generate.engine import GeneratedToken, GenerationEngine
from evomesh.generate.options import SamplingParams

logger = logging.getLogger(__name__)


class EngineError(Exception):
    """The engine failed while it worked on a request; a new one replaces it."""


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate. ``stream``: (seed, number), which keys its random numbers."""

    prompt: Sequence[int]
    sampling: SamplingParams
    stream: tuple[int, int]
    rotary_type: RotaryType


class Submission:
    """Requests that were submitted together; ``next`` returns their tokens. Belongs to one event loop.

    Attributes:
        open: indices of the requests from which more tokens are wanted.
    """

    def __init__(
        self, engines: EngineLoop, requests: Sequence[GenerationRequest]
    ) -> None:
        self.requests = list(requests)
        self.open = set(range(len(requests)))
        self.event_loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[_TokenEvent] = asyncio.Queue()
        self._engines = engines

    async def next(self) -> tuple[int, GeneratedToken]:
        """Wait for the next token and return it with the index of its request.

        Raises:
            EngineError: the engine failed.
            UserError: the engine rejected a request.
        """
        while True:
            event = await self.events.get()
            if isinstance(event.token, Exception):
                raise event.token
            # Tokens of a closed request may still arrive: the engine generated them
            # before it read that nobody wants more.
            if event.index in self.open:
                return event.index, event.token

    def close(self, index: int) -> None:
        """Ask for no more tokens of a request; its slot is free before the next step."""
        if index in self.open:
            self.open.remove(index)
            self._engines.commands.put(_CancelCommand(self, index))

    def close_all(self) -> None:
        for index in list(self.open):
            self.close(index)


@dataclass(frozen=True)
class _SubmitCommand:
    submission: Submission
    index: int


@dataclass(frozen=True)
class _CancelCommand:
    submission: Submission
    index: int


@dataclass(frozen=True)
class _StopCommand:
    pass


@dataclass(frozen=True)
class _EndCommand:
    pass


_Command = _SubmitCommand | _CancelCommand | _EndCommand | _StopCommand


@dataclass(frozen=True)
class _TokenEvent:
    """A token of one request of a submission, or what kept the engine from generating it."""

    submission: Submission
    index: int
    token: GeneratedToken | Exception


_Owner = tuple[Submission, int]  # a request of a submission
EngineBuilder: TypeAlias = Callable[[], GenerationEngine]


@dataclass(frozen=True)
class _EngineHandle:
    """A request as its engine knows it."""

    rotary_type: RotaryType
    number: int


class EngineLoop:
    """Runs one engine per rotary type, all on the same weights, in a dedicated thread.

    Args:
        builders: build the engine of each rotary type; called in the thread, for its first request and after a
            failure.
    """

    def __init__(self, builders: Mapping[RotaryType, EngineBuilder]) -> None:
        self.builders = builders
        self.commands: SimpleQueue[_Command] = SimpleQueue()
        # One engine for each rotary type, built when the first request asks for it.
        self._engines: dict[RotaryType, GenerationEngine] = {}
        # Both ways: tokens come with the engine's number of a request, cancellations
        # with the submission's.
        self._owners: dict[_EngineHandle, _Owner] = {}
        self._handles: dict[_Owner, _EngineHandle] = {}
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current step; open submissions get no more tokens."""
        if self._thread.is_alive():
            self.commands.put(_StopCommand())
            self._thread.join()

    def end_answers(self) -> None:
        """Give everyone who waits for tokens an error: the server is stopping. Callable from any thread."""
        self.commands.put(_EndCommand())

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def active(self) -> int:
        """The number of unfinished sequences, waiting ones included."""
        return len(self._owners)

    def submit(self, requests: Sequence[GenerationRequest]) -> Submission:
        """Hand requests to the engines; call it on an event loop."""
        submission = Submission(self, requests)
        for index in range(len(requests)):
            self.commands.put(_SubmitCommand(submission, index))
        return submission

    # All that follows runs in the engine thread.

    def _run(self) -> None:
        while self._obey_and_step():
            pass

    def _obey_and_step(self) -> bool:
        """Obey the queued commands, then let each engine make one step; return False to end the thread.

        A separate function, so that no local variable keeps a discarded engine, and the
        memory of its keys and values, while the next one is built.
        """
        # Canceled requests leave their slots before the next step.
        for command in self._take_commands():
            if isinstance(command, _StopCommand):
                return False
            self._obey(command)
        for rotary_type, engine in list(self._engines.items()):
            if engine.active:
                self._step(rotary_type, engine)
        return True

    def _obey(self, command: _SubmitCommand | _CancelCommand | _EndCommand) -> None:
        match command:
            case _SubmitCommand():
                self._add(command.submission, command.index)
            case _CancelCommand():
                self._cancel(command.submission, command.index)
            case _EndCommand():
                for rotary_type in list(self._engines):
                    self._discard_engine(
                        rotary_type, EngineError("the server is stopping")
                    )

    def _take_commands(self) -> list[_Command]:
        """Return all queued commands; with no sequence to work on, sleep until there is one."""
        commands = [] if self._owners else [self.commands.get()]
        while True:
            try:
                commands.append(self.commands.get_nowait())
            except Empty:
                return commands

    def _builder(self, rotary_type: RotaryType) -> EngineBuilder:
        if rotary_type not in self.builders:
            raise UserError(
                f"rotary_type {rotary_type!r} is not available for this model",
                where="rotary_type",
                expected=" or ".join(self.builders),
                fix="leave it out",
                code="EVO-GEN-003",
            )
        return self.builders[rotary_type]

    def _add(self, submission: Submission, index: int) -> None:
        request = submission.requests[index]
        rotary_type = request.rotary_type
        try:
            if rotary_type not in self._engines:
                build = self._builder(rotary_type)
                self._engines[rotary_type] = build()
            engine = self._engines[rotary_type]
            number = engine.add(request.prompt, request.sampling, request.stream)
        except UserError as error:
            rejection = _TokenEvent(submission, index, error)
            self._post([rejection])
            return
        except Exception:
            logger.exception("the engine cannot take a request")
            failure = EngineError("the engine failed")
            self._post([_TokenEvent(submission, index, failure)])
            return
        handle = _EngineHandle(rotary_type, number)
        self._owners[handle] = (submission, index)
        self._handles[submission, index] = handle

    def _cancel(self, submission: Submission, index: int) -> None:
        handle = self._handles.get((submission, index))
        if handle is not None:
            self._forget(handle)
            self._engines[handle.rotary_type].cancel(handle.number)

    def _forget(self, handle: _EngineHandle) -> None:
        owner = self._owners.pop(handle)
        del self._handles[owner]

    def _step(self, rotary_type: RotaryType, engine: GenerationEngine) -> None:
        try:
            tokens = engine.step()
        except Exception:
            logger.exception("the engine failed; a new one replaces it")
            self._discard_engine(rotary_type, EngineError("the engine failed"))
            return
        events: list[_TokenEvent] = []
        for token in tokens:
            handle = _EngineHandle(rotary_type, token.request)
            if handle not in self._owners:
                continue
            submission, index = self._owners[handle]
            events.append(_TokenEvent(submission, index, token))
            if token.finish:
                self._forget(handle)
        self._post(events)

    def _discard_engine(self, rotary_type: RotaryType, failure: EngineError) -> None:
        """Drop an engine and give everyone who waits for it the reason."""
        del self._engines[rotary_type]
        lost = [handle for handle in self._owners if handle.rotary_type == rotary_type]
        events = []
        for handle in lost:
            submission, index = self._owners[handle]
            event = _TokenEvent(submission, index, failure)
            events.append(event)
            self._forget(handle)
        self._post(events)

    def _post(self, events: Sequence[_TokenEvent]) -> None:
        """Pass events to their event loops; each loop is woken once for all its events of a step."""
        by_loop = defaultdict(list)
        for event in events:
            event_loop = event.submission.event_loop
            by_loop[event_loop].append(event)
        for event_loop, its_events in by_loop.items():
            try:
                event_loop.call_soon_threadsafe(_enqueue, its_events)
            # The event loop is closed: nobody waits for these any more.
            except RuntimeError:
                for event in its_events:
                    self._cancel(event.submission, event.index)


def _enqueue(events: Sequence[_TokenEvent]) -> None:
    """Put each event into the queue of its submission; runs on the event loop."""
    for event in events:
        event.submission.events.put_nowait(event)
