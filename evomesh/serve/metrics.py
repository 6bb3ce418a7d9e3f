"""Metrics of one server in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evomesh.serve.service import GenerationService

BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)  # seconds


class ServerMetrics:
    """The metrics of one service; a registry per server, so that two servers in one process do not collide."""

    def __init__(self, service: GenerationService) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "evomesh_requests",
            "Requests answered.",
            ["endpoint", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "evomesh_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.completion_tokens = Counter(
            "evomesh_completion_tokens", "Tokens generated.", registry=registry
        )
        self.first_token_seconds = Histogram(
            "evomesh_first_token_seconds",
            "From request to first token.",
            buckets=BUCKETS,
            registry=registry,
        )
        self.request_seconds = Histogram(
            "evomesh_request_seconds",
            "From request to last token.",
            buckets=BUCKETS,
            registry=registry,
        )
        slot_count = service.limits.slots
        running = Gauge(
            "evomesh_sequences_running", "Sequences in a slot.", registry=registry
        )
        running.set_function(lambda: min(service.engines.active, slot_count))
        waiting = Gauge(
            "evomesh_sequences_waiting",
            "Sequences that wait for a slot.",
            registry=registry,
        )
        waiting.set_function(lambda: max(0, service.engines.active - slot_count))
        slots = Gauge(
            "evomesh_slots",
            "Maximum number of concurrent sequences.",
            registry=registry,
        )
        slots.set(slot_count)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class MetricsMiddleware:
    """Counts the responses of the API.

    A plain ASGI layer: a response wrapped by starlette's middleware would not see that
    its client has disconnected.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(scope, str(message["status"]))
            await send(message)

        await self.app(scope, receive, send_and_count)

    def _count(self, scope: Scope, status: str) -> None:
        """Count a response under the path of its route, of which there are few: a client can invent any path."""
        # The router sets it, if it has a route for the path.
        route = scope.get("route")
        path = getattr(route, "path", "")
        if path:
            self.metrics.requests.labels(path, status).inc()
