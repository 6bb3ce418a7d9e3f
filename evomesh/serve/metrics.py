"""Counters of one server in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evomesh.serve.service import GenerationService

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


class ServerMetrics:
    """A registry of its own, so that two servers in one process do not meet."""

    def __init__(self, service: GenerationService) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "evomesh_requests", "Requests answered.", ["endpoint", "status"], registry=registry
        )
        self.prompt_tokens = Counter("evomesh_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.new_tokens = Counter("evomesh_completion_tokens", "Tokens made.", registry=registry)
        self.first = Histogram(
            "evomesh_first_token_seconds", "From request to first token.", buckets=SECONDS, registry=registry
        )
        self.whole = Histogram(
            "evomesh_request_seconds", "From request to last token.", buckets=SECONDS, registry=registry
        )
        running = Gauge("evomesh_sequences_running", "Sequences in a slot.", registry=registry)
        running.set_function(lambda: min(service.engines.active, service.limits.slots))
        waiting = Gauge("evomesh_sequences_waiting", "Sequences that wait for a slot.", registry=registry)
        waiting.set_function(lambda: max(0, service.engines.active - service.limits.slots))
        slots = Gauge("evomesh_slots", "Sequences that can be made at the same time.", registry=registry)
        slots.set(service.limits.slots)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class MetricsMiddleware:
    """Counts what the API answers. A plain ASGI layer, since a wrapped response would hide that its client has gone."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and (path := getattr(scope.get("route"), "path", "")):
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, watched)
