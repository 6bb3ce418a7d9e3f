"""The HTTP side: routes, refusals, streams."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from evomesh.data.chat import ChatMessage
from evomesh.errors import UserError
from evomesh.generate.options import SamplingParams
from evomesh.serve.answers import ApiAnswer
from evomesh.serve.errors import ApiError
from evomesh.serve.loop import EngineError
from evomesh.serve.metrics import MetricsMiddleware, ServerMetrics
from evomesh.serve.requests import LocalHostMiddleware, check_key, gone, read_body
from evomesh.serve.schema import ApiRequest, ChatRequest, CompletionRequest, read
from evomesh.serve.service import GenerationService, PromptTooLongError, QueueFullError
from evomesh.serve.writer import TextDelta

T = TypeVar("T")
DeltaStream = AsyncGenerator[tuple[int, TextDelta], None]


class EventStream(StreamingResponse):
    """A stream whose source is closed with it: at once when the client goes, not when memory is next tidied."""

    def __init__(self, events: AsyncGenerator[bytes, None], **options: Any) -> None:
        super().__init__(events, **options)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


class ApiRoutes:
    """The routes of one service."""

    def __init__(self, service: GenerationService, key: str | None) -> None:
        self.service, self.key = service, key
        self.metrics = ServerMetrics(service)

    def mount(self, app: FastAPI) -> None:
        app.add_api_route("/healthz", self.health)
        for path, call, methods in (
            ("/metrics", self.show_metrics, ["GET"]),
            ("/v1/models", self.models, ["GET"]),
            ("/v1/models/{name:path}", self.one_model, ["GET"]),
            ("/v1/completions", self.completions, ["POST"]),
            ("/v1/chat/completions", self.chat, ["POST"]),
        ):
            app.add_api_route(path, call, methods=methods, response_model=None)

    async def health(self) -> Response:
        alive = self.service.engines.alive
        return json({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def show_metrics(self, request: Request) -> Response:
        check_key(request, self.key)
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        check_key(request, self.key)
        return json({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request, name: str) -> Response:
        check_key(request, self.key)
        self._known(name)
        return json(self._model())

    async def completions(self, request: Request) -> Response:
        check_key(request, self.key)
        ask = read(CompletionRequest, await read_body(request, self.service.limits.body))
        self._known(ask.model)
        if ask.best_of not in (None, ask.n):
            raise ApiError(400, "best_of: only the value of n", param="best_of", code="invalid_value")
        prompts = await asyncio.to_thread(
            lambda: [self.service.text_ids(p) if isinstance(p, str) else p for p in ask.prompts]
        )
        return await self._answer(
            request, ask, prompts, ask.max_tokens, -1 if ask.logprobs is None else ask.logprobs
        )

    async def chat(self, request: Request) -> Response:
        check_key(request, self.key)
        ask = read(ChatRequest, await read_body(request, self.service.limits.body))
        self._known(ask.model)
        if ask.top_logprobs is not None and not ask.logprobs:
            raise ApiError(
                400, "top_logprobs: needs logprobs: true", param="top_logprobs", code="invalid_value"
            )
        turns = [
            ChatMessage("system" if turn.role == "developer" else turn.role, turn.text, False)
            for turn in ask.messages
        ]
        prompt = await asyncio.to_thread(self.service.chat_ids, turns)
        most = ask.max_completion_tokens or ask.max_tokens
        return await self._answer(
            request, ask, [prompt], most, (ask.top_logprobs or 0) if ask.logprobs else -1
        )

    async def _answer(
        self,
        request: Request,
        ask: ApiRequest,
        prompts: Sequence[Sequence[int]],
        most: int | None,
        logprobs: int,
    ) -> Response:
        service = self.service
        service.check(prompts, most, ask.n)
        sampling = SamplingParams(
            temperature=ask.temperature,
            do_sample=ask.temperature > 0,
            top_k=ask.top_k,
            top_p=ask.top_p,
            min_p=ask.min_p,
            repetition_penalty=ask.repetition_penalty,
            max_new_tokens=most,
            eos_ids=service.model.eos_ids,
            logprobs=logprobs,
        )
        answer = ApiAnswer(
            chat=isinstance(ask, ChatRequest),
            model=service.model.name,
            fingerprint=service.model.fingerprint,
            prompt_tokens=sum(map(len, prompts)),
            choices=len(prompts) * ask.n,
            scored=logprobs >= 0,
        )
        pieces = service.answer(
            [prompt for prompt in prompts for _ in range(ask.n)],
            sampling,
            seed=secrets.randbits(63) if ask.seed is None else ask.seed % 2**64,
            rotary=ask.rotary_type,
            stops=ask.stops,
        )
        counted = self._count(answer, pieces)
        # Waited for here, so that a full queue is a status and not a broken stream.
        first = await _unless_gone(request, anext(counted))
        if first is None:
            await counted.aclose()
            return Response(status_code=499)  # nobody reads it; the log says what happened
        if ask.stream:
            events = self._events(answer, first, counted, ask.with_usage)
            return EventStream(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        finished = await _unless_gone(request, _drain(counted))
        return Response(status_code=499) if finished is None else json(answer.whole())

    async def _count(self, answer: ApiAnswer, pieces: DeltaStream) -> DeltaStream:
        """Passes pieces on, adds them to the answer and to the metrics."""
        start, metrics = time.perf_counter(), self.metrics
        metrics.prompt_tokens.inc(answer.prompt_tokens)
        made = 0
        async with contextlib.aclosing(pieces):
            async for index, piece in pieces:
                if not made:
                    metrics.first.observe(time.perf_counter() - start)
                made += 1
                metrics.new_tokens.inc()
                answer.choices[index].add(piece)
                yield index, piece
        metrics.whole.observe(time.perf_counter() - start)

    async def _events(
        self, answer: ApiAnswer, first: tuple[int, TextDelta], rest: DeltaStream, with_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        opened: set[int] = set()
        async with contextlib.aclosing(rest):
            try:
                async for index, piece in _chain(first, rest):
                    if answer.chat and index not in opened:
                        opened.add(index)
                        yield event(answer.opening(index))
                    if piece.text or piece.finish or piece.scored:
                        yield event(answer.event(index, piece))
            except EngineError as error:
                yield event(ApiError(503, str(error), code="engine_failed").body())
                return
            if with_usage:
                yield event(answer.closing())
            yield b"data: [DONE]\n\n"

    def _known(self, name: str) -> None:
        if name != self.service.model.name:
            message = f"no model {name[:100]!r}; this server has {self.service.model.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _model(self) -> dict[str, Any]:
        model = self.service.model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "evomesh",
            "max_model_len": self.service.limits.context,
        }


def create_app(service: GenerationService, *, key: str | None = None, local: bool = True) -> FastAPI:
    """The API of a service; its engines run while the app does.

    Args:
        key: what requests must bear; None: nothing.
        local: bound to this machine only: requests for any other host name are refused, since a web page may have
            its own name point here.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engines.start()
        yield
        await asyncio.to_thread(service.engines.stop)

    app = FastAPI(title="evomesh", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    api = ApiRoutes(service, key)
    api.mount(app)
    if local:
        app.add_middleware(LocalHostMiddleware)
    app.add_middleware(MetricsMiddleware, metrics=api.metrics)
    app.add_exception_handler(ApiError, lambda _, error: refusal(error))
    app.add_exception_handler(PromptTooLongError, lambda _, error: refuse(error, "context_length_exceeded"))
    app.add_exception_handler(UserError, lambda _, error: refuse(error, "invalid_value"))
    app.add_exception_handler(QueueFullError, lambda _, error: refusal(busy()))
    app.add_exception_handler(
        EngineError, lambda _, error: refusal(ApiError(503, str(error), code="engine_failed"))
    )
    app.add_exception_handler(HTTPException, _plain)
    app.add_exception_handler(
        Exception,
        lambda _, error: refusal(ApiError(500, "the server failed; its log says why", code="internal")),
    )
    return app


def busy() -> ApiError:
    return ApiError(429, "the queue is full; try again", code="queue_full", headers={"Retry-After": "1"})


def refuse(error: Exception, code: str) -> Response:
    return refusal(ApiError(400, str(error), code=code))


def _plain(_: Request, error: Exception) -> Response:
    """Unknown path, wrong method: in the same form as everything else."""
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    headers = dict(error.headers or {})
    return refusal(
        ApiError(
            error.status_code, error.detail, code=codes.get(error.status_code, "http_error"), headers=headers
        )
    )


def refusal(error: ApiError) -> Response:
    return json(error.body(), error.status, error.headers)


def json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


def event(value: object) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


async def _drain(pieces: DeltaStream) -> bool:
    async for _ in pieces:
        pass
    return True


async def _chain(first: tuple[int, TextDelta], rest: DeltaStream) -> DeltaStream:
    yield first
    async for one in rest:
        yield one


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """What ``work`` gives, or None when the client hangs up before it does; then ``work`` is cancelled."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
