"""Traces for OpenTelemetry: one span for each request, sent over OTLP, without its text and without its key.

On where OpenTelemetry's own variables name a collector:

    OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 gallama serve

A client's `traceparent` header (W3C) makes the span part of the client's trace. The attributes follow the
semantic conventions for generative models.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gallama.errors import InvalidConfig, MissingExtra
from gallama.pool.ticket import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_LAST_EXPORT_SECONDS = 3.0
_SERVICE = "gallama"


class Tracing:
    """Makes spans of requests that have ended."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(_SERVICE)

    def record(self, record: RequestRecord) -> None:
        """Make a span of a request that has ended; its parent is what `TraceParents` found."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        began = _nanoseconds(record.entered_at)
        span = self._tracer.start_span(
            f"{record.operation} {record.model}",
            kind=SpanKind.SERVER,
            attributes=_attributes(record),
            start_time=began,
        )
        if record.instance is not None:
            span.add_event("slot", timestamp=began + _nanoseconds(record.queue_seconds))
        if record.first_token_seconds is not None:
            span.add_event("first token", timestamp=began + _nanoseconds(record.first_token_seconds))
        if record.error_code:
            span.set_attribute("error.type", record.error_code)
            span.set_status(Status(StatusCode.ERROR))
        span.end(began + _nanoseconds(record.seconds))

    async def close(self) -> None:
        """Send what was not sent yet, as far as that takes no longer than a moment."""
        loop, is_closed = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            # The loop is closed if the moment is over.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(is_closed.set)

        # A thread that the process does not wait for: the collector may be gone.
        threading.Thread(target=shut_down, daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_EXPORT_SECONDS):
                await is_closed.wait()


class TraceParents:
    """ASGI middleware: what is recorded while a request is answered belongs to the trace of its client."""

    def __init__(self, app: ASGIApp) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._app = app
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        from opentelemetry import context

        # Nothing but these two headers is looked at: OpenTelemetry's baggage can hold anything.
        headers = Headers(scope=scope)
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        token = context.attach(self._propagator.extract(carrier))
        try:
            await self._app(scope, receive, send)
        finally:
            context.detach(token)


def start_tracing(environment: Mapping[str, str]) -> Tracing | None:
    """Begin to send traces to the collector that the environment names; None where it names none.

    Raises:
        MissingExtra: OpenTelemetry is not installed.
        InvalidConfig: traces are to go out in a way that is not supported.
    """
    if not any(environment.get(name) for name in _ENDPOINTS) or _is_off(environment):
        return None
    exporter = environment.get("OTEL_TRACES_EXPORTER") or "otlp"
    if exporter != "otlp":
        raise InvalidConfig(
            f"environment: OTEL_TRACES_EXPORTER is {exporter!r}; traces go over otlp or none."
        )
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        raise InvalidConfig(
            f"environment: {_PROTOCOLS[1]} is {protocol!r}; traces go only over http/protobuf."
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{_ENDPOINTS[1]} is set, but OpenTelemetry is not installed: pip install 'gallama[otel]'."
        ) from error
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


def _is_off(environment: Mapping[str, str]) -> bool:
    is_disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return is_disabled or environment.get("OTEL_TRACES_EXPORTER") == "none"


def _resource() -> Resource:
    """Who the spans are of: as OpenTelemetry's variables say, else gallama."""
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource

    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: _SERVICE}))
    return resource


def _attributes(record: RequestRecord) -> dict[str, str | int | float]:
    attributes: dict[str, str | int | float] = {
        "gen_ai.operation.name": record.operation,
        "gen_ai.provider.name": _SERVICE,
        "gen_ai.request.model": record.model,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gallama.request_id": record.request_id,
        "gallama.outcome": record.outcome,
        "gallama.tries": record.tries,
        "gallama.queue_seconds": record.queue_seconds,
        "gallama.forced_tokens": record.forced_tokens,
    }
    if record.instance is not None:
        attributes |= {"gen_ai.response.model": record.model, "gallama.instance": record.instance}
    if record.first_token_seconds is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = record.first_token_seconds
    return attributes


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
