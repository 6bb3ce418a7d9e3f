"""The engine thread, without a server: what it does when an engine fails."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from evomesh.errors import UserError
from evomesh.generate.engine import GenerationEngine
from evomesh.generate.options import SamplingParams
from evomesh.serve import loop as loop_module
from evomesh.serve.loop import EngineError, EngineLoop, GenerationRequest

REQUEST = GenerationRequest([1], SamplingParams(max_new_tokens=1), (0, 0), "origin")


class FailingEngine:
    """Takes requests, and fails at the first step."""

    def __init__(self) -> None:
        self.active = 0

    def add(self, *_: object) -> int:
        self.active += 1
        return 0

    def step(self) -> None:
        raise RuntimeError("CUDA out of memory")


@pytest.fixture
def run_loop() -> Iterator[Callable[..., EngineLoop]]:
    loops: list[EngineLoop] = []

    def start(build: Callable[[], object]) -> EngineLoop:
        builder = cast(Callable[[], GenerationEngine], build)
        loop = EngineLoop({"origin": builder})
        loop.start()
        loops.append(loop)
        return loop

    yield start
    for loop in loops:
        loop.stop()


def answer(loop: EngineLoop) -> None:
    async def wait() -> None:
        await asyncio.wait_for(loop.submit([REQUEST]).next(), 10)

    asyncio.run(wait())


@pytest.mark.parametrize("error", [RuntimeError, UserError])
def test_the_thread_survives_an_engine_that_cannot_be_built(
    run_loop: Callable[..., EngineLoop], error: type[Exception]
) -> None:
    def build() -> None:
        raise error("no memory")

    loop = run_loop(build)
    shown = UserError if error is UserError else EngineError
    for _ in range(2):
        with pytest.raises(shown):
            answer(loop)
    assert loop.alive


def test_an_engine_that_failed_is_gone_before_the_next_is_built(
    run_loop: Callable[..., EngineLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest keeps what is logged, and with it the frames that the engine ran in.
    monkeypatch.setattr(loop_module.logger, "exception", lambda _: None)
    built: list[weakref.ref[FailingEngine]] = []
    still_there: list[bool] = []

    def build() -> FailingEngine:
        still_there.extend(engine() is not None for engine in built)
        engine = FailingEngine()
        built.append(weakref.ref(engine))
        return engine

    loop = run_loop(build)
    gc.disable()
    try:
        for _ in range(2):
            with pytest.raises(EngineError):
                answer(loop)
    finally:
        gc.enable()
    assert still_there == [False]
