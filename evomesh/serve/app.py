"""The HTTP side: routes, error responses, and streams.

An answer passes through three asynchronous generators, each of which closes the one
before it:

    GenerationService.answer   text deltas of the engines
    ApiRoutes._record          adds them to the answer and to the metrics
    ApiRoutes._events          turns them into server-sent events (for a client that streams)
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from evomesh.config.redact import redact_text
from evomesh.data.chat_message import ChatMessage
from evomesh.errors import UserError
from evomesh.serve.answers import ApiAnswer
from evomesh.serve.detokenizer import TextDelta
from evomesh.serve.key_gate import KeyGate
from evomesh.serve.loop import EngineError
from evomesh.serve.metrics import MetricsMiddleware, ServerMetrics
from evomesh.serve.requests import (
    CLIENT_CLOSED_REQUEST,
    ApiError,
    LocalHostMiddleware,
    read_body,
    run_in,
    wait_until_disconnected,
)
from evomesh.serve.schema import (
    ApiRequest,
    ChatRequest,
    CompletionRequest,
    parse_request,
)
from evomesh.serve.service import (
    Echo,
    GenerationService,
    PromptTooLongError,
    QueueFullError,
)

T = TypeVar("T")
RequestType = TypeVar("RequestType", bound=ApiRequest)
DeltaStream = AsyncGenerator[tuple[int, TextDelta], None]
SCORES_AT_ONCE = 64  # tokens whose log-probabilities are encoded on the event loop


class EventStream(StreamingResponse):
    """A streaming response that closes its generator as soon as the client disconnects.

    Otherwise the generator would hold its slots until garbage collection.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], **options: Any) -> None:
        super().__init__(events, **options)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


class ApiRoutes:
    """The routes of one service.

    Args:
        gate: checks the key that clients must send; None: no key.
    """

    def __init__(self, service: GenerationService, gate: KeyGate | None) -> None:
        self.service = service
        self.gate = gate
        self.metrics = ServerMetrics(service)

    def mount(self, app: FastAPI) -> None:
        """Add the routes to an app."""
        routes: list[tuple[str, str, Callable[..., Any]]] = [
            ("GET", "/healthz", self.show_health),
            ("GET", "/metrics", self.show_metrics),
            ("GET", "/v1/models", self.list_models),
            ("GET", "/v1/models/{name:path}", self.show_model),
            ("POST", "/v1/completions", self.complete),
            ("POST", "/v1/chat/completions", self.chat),
        ]
        for method, path, answer in routes:
            app.add_api_route(
                path,
                answer,
                methods=[method],
                response_model=None,
            )

    async def show_health(self) -> Response:
        """Answer 200 if the engine thread runs, else 503; needs no key."""
        if self.service.engines.alive:
            return json_response({"status": "ok"})
        return json_response({"status": "the engine has stopped"}, 503)

    async def show_metrics(self, request: Request) -> Response:
        """Answer with the metrics in Prometheus' text format."""
        self._check_key(request)
        return PlainTextResponse(
            self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def list_models(self, request: Request) -> Response:
        """Answer with a list of the only model."""
        self._check_key(request)
        return json_response({"object": "list", "data": [self._model_record()]})

    async def show_model(self, request: Request, name: str) -> Response:
        """Answer with the record of a model, or 404."""
        self._check_key(request)
        self._check_model(name)
        return json_response(self._model_record())

    async def complete(self, request: Request) -> Response:
        """Complete one or more texts."""
        completion = await self._read(request, CompletionRequest)
        if completion.best_of not in (None, completion.n):
            raise ApiError(
                400, "best_of: must equal n", param="best_of", code="invalid_value"
            )
        self.service.check_count(len(completion.prompts), completion.n)
        return await self._answer(
            request, completion, partial(self._tokenize, completion)
        )

    def _tokenize(self, completion: CompletionRequest) -> list[list[int]]:
        tokenized: list[list[int]] = []
        for prompt in completion.prompts:
            ids = self.service.text_ids(prompt) if isinstance(prompt, str) else prompt
            tokenized.append(ids)
        return tokenized

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        chat = await self._read(request, ChatRequest)
        return await self._answer(request, chat, partial(self._render, chat))

    def _render(self, chat: ChatRequest) -> list[list[int]]:
        messages: list[ChatMessage] = []
        for message in chat.messages:
            role = "system" if message.role == "developer" else message.role
            messages.append(ChatMessage(role, message.text, False))
        return [self.service.chat_ids(messages)]

    async def _read(self, request: Request, kind: type[RequestType]) -> RequestType:
        """Read, parse and check a request for an answer."""
        self._check_key(request)
        body = await read_body(request, self.service.limits.body_bytes)
        parsed: RequestType = await run_in(
            self.service.parser, parse_request, kind, body
        )
        self._check_model(parsed.model)
        return parsed

    async def _answer(
        self,
        request: Request,
        api_request: ApiRequest,
        tokenize: Callable[[], list[list[int]]],
    ) -> Response:
        """Answer prompts, as a stream of events or at once."""
        # 1. Tokenize, and reject what can never be answered.
        service = self.service
        prompts = await run_in(service.tokenizers, tokenize)
        await run_in(
            service.tokenizers,
            service.check,
            prompts,
            api_request.max_new_tokens,
            api_request.n,
        )
        sampling = api_request.sampling_params(service.model.eos_ids)

        # 2. Submit; each prompt is answered n times.
        answer = ApiAnswer(
            chat=isinstance(api_request, ChatRequest),
            model=service.model.name,
            fingerprint=service.model.fingerprint,
            prompt_tokens=sum(map(len, prompts)),
            choices=len(prompts) * api_request.n,
            with_logprobs=sampling.logprobs >= 0,
        )
        repeated = [prompt for prompt in prompts for _ in range(api_request.n)]
        deltas = service.answer(
            repeated,
            sampling,
            rotary_type=api_request.rotary_type,
            stops=api_request.stops,
            echo=self._echo(api_request),
        )
        recorded = self._record(answer, deltas)

        # 3. Wait for the first token here, so that a full queue is a status and not a broken stream.
        first = await _unless_disconnected(request, anext(recorded))
        if first is None:
            await recorded.aclose()
            return Response(status_code=CLIENT_CLOSED_REQUEST)

        # 4. Stream the rest, or collect it.
        if api_request.stream:
            events = self._events(answer, first, recorded, api_request.with_usage)
            return EventStream(
                events,
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
            )
        completed = await _unless_disconnected(request, _drain(recorded))
        if completed is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        body = await asyncio.to_thread(lambda: orjson.dumps(answer.response()))
        return Response(body, media_type="application/json")

    def _echo(self, api_request: ApiRequest) -> Echo | None:
        if not isinstance(api_request, CompletionRequest) or not api_request.echo:
            return None
        texts: list[str] = []  # of each choice; none if the client sent ids
        for prompt in api_request.prompts:
            if isinstance(prompt, str):
                texts += [prompt] * api_request.n
        # Zero new tokens: the client wants the scores of the text that it sent.
        only_prompt = api_request.max_tokens == 0
        return Echo(texts or None, only_prompt)

    async def _record(self, answer: ApiAnswer, deltas: DeltaStream) -> DeltaStream:
        """Pass deltas through, and add them to the answer and to the metrics."""
        started = time.perf_counter()
        metrics = self.metrics
        metrics.prompt_tokens.inc(answer.prompt_tokens)
        is_first = True
        async with contextlib.aclosing(deltas):
            async for index, delta in deltas:
                if is_first:
                    metrics.first_token_seconds.observe(time.perf_counter() - started)
                    is_first = False
                new_tokens = delta.tokens - answer.choices[index].tokens
                metrics.completion_tokens.inc(new_tokens)
                answer.choices[index].add(delta)
                yield index, delta
        metrics.request_seconds.observe(time.perf_counter() - started)

    async def _events(
        self,
        answer: ApiAnswer,
        first: tuple[int, TextDelta],
        rest: DeltaStream,
        with_usage: bool,
    ) -> AsyncGenerator[bytes, None]:
        """Yield the server-sent events of a stream: deltas, the usage if requested, and the end mark."""
        opened: set[int] = set()
        async with contextlib.aclosing(rest):
            try:
                async for index, delta in _chain(first, rest):
                    if answer.chat and index not in opened:
                        opened.add(index)
                        yield encode_event(answer.opening_event(index))
                    if delta.text or delta.finish or delta.scored:
                        yield await _encode_delta(answer, index, delta)
            except EngineError as error:
                yield encode_event(
                    ApiError(503, str(error), code="engine_failed").body()
                )
                return
            if with_usage:
                yield encode_event(answer.usage_event())
            yield b"data: [DONE]\n\n"

    def _check_key(self, request: Request) -> None:
        if self.gate is not None:
            self.gate.check(request.scope)

    def _check_model(self, name: str) -> None:
        if name != self.service.model.name:
            message = (
                f"no model {name[:100]!r}; this server has {self.service.model.name!r}"
            )
            raise ApiError(404, message, param="model", code="model_not_found")

    def _model_record(self) -> dict[str, Any]:
        model = self.service.model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "evomesh",
            "max_model_len": self.service.limits.context_length,
        }


def create_app(
    service: GenerationService, *, key: str | None = None, local: bool = True
) -> FastAPI:
    """Create the API of a service; its engines run while the app does.

    Args:
        key: clients must send it; None: no key.
        local: bound to this machine only: requests for any other host name are rejected, since a web page may point
            its own host name here.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engines.start()
        yield
        await asyncio.to_thread(service.engines.stop)

    app = FastAPI(
        title="evomesh",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
    )
    app.state.key_gate = KeyGate(key) if key is not None else None
    api = ApiRoutes(service, app.state.key_gate)
    api.mount(app)
    # The last one added is the first to see a request.
    if local:
        app.add_middleware(LocalHostMiddleware)
    app.add_middleware(MetricsMiddleware, metrics=api.metrics)
    for error_type in (
        ApiError,
        UserError,
        QueueFullError,
        EngineError,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(
            error_type, lambda _, error: error_response(as_api_error(error))
        )
    return app


def as_api_error(error: Exception) -> ApiError:
    """Return the error that the client gets for an exception in a route."""
    match error:
        case ApiError():
            return error
        case PromptTooLongError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case UserError():
            return ApiError(400, str(error), code="invalid_value")
        case QueueFullError():
            message = "the queue is full; try again later"
            return ApiError(
                429, message, code="queue_full", headers={"Retry-After": "1"}
            )
        case EngineError():
            return ApiError(503, str(error), code="engine_failed")
        case HTTPException(status_code=status):  # unknown path, wrong method
            code = {404: "not_found", 405: "method_not_allowed"}.get(
                status, "http_error"
            )
            return ApiError(
                status, error.detail, code=code, headers=dict(error.headers or {})
            )
        case _:
            return ApiError(
                500, "internal server error; see the server's log", code="internal"
            )


def error_response(error: ApiError) -> Response:
    """Return the response for an error, without secrets that its message may repeat."""
    body = redact_text(orjson.dumps(error.body()).decode())
    return Response(body, error.status, error.headers, media_type="application/json")


def json_response(value: object, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def encode_event(value: object) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


async def _encode_delta(answer: ApiAnswer, index: int, delta: TextDelta) -> bytes:
    """Return the event of a text delta; that of a whole prompt with its scores is encoded in a thread."""
    if len(delta.scored) <= SCORES_AT_ONCE:
        return encode_event(answer.delta_event(index, delta))
    return await asyncio.to_thread(
        lambda: encode_event(answer.delta_event(index, delta))
    )


async def _drain(deltas: DeltaStream) -> bool:
    async for _ in deltas:
        pass
    return True


async def _chain(first: tuple[int, TextDelta], rest: DeltaStream) -> DeltaStream:
    yield first
    async for item in rest:
        yield item


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T | None:
    """Return the result of ``work``; or cancel it and return None if the client disconnects first."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(wait_until_disconnected(request))
    try:
        await asyncio.wait([task, disconnected], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        disconnected.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
