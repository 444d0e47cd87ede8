"""Traces: one span for each request, as part of its client's trace, without its text."""

from __future__ import annotations

import asyncio
import builtins
import dataclasses
import http.server
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.types import Receive, Scope, Send

from gallama.api.tracing import TraceParents, Tracing, start_tracing
from gallama.errors import InvalidConfig, MissingExtra
from gallama.pool.ticket import RequestRecord

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
SPAN_ID = 0xB7AD6B7169203331
TRACEPARENT = f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
RECORD = RequestRecord(
    request_id="r-1",
    operation="chat",
    model="mistral",
    instance=3,
    key_name="alices-key",
    outcome="completed",
    error_code="",
    entered_at=1_800_000_000,
    queue_seconds=0.25,
    first_token_seconds=1.0,
    seconds=3.0,
    tries=2,
    prompt_tokens=100,
    cached_tokens=60,
    completion_tokens=21,
    forced_tokens=8,
)


class Spans:
    """Tracing into memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider)

    def record(self, **values: Any) -> Any:
        """The span of a request."""
        self.tracing.record(dataclasses.replace(RECORD, **values))
        return self._exporter.get_finished_spans()[-1]


@pytest.fixture
def spans() -> Spans:
    return Spans()


class TestSpan:
    def test_it_lasts_as_long_as_the_request(self, spans: Spans) -> None:
        span = spans.record()
        assert (span.name, span.kind) == ("chat mistral", SpanKind.SERVER)
        assert span.start_time == 1_800_000_000 * 10**9
        assert span.end_time == 1_800_000_003 * 10**9

    def test_it_names_figures_as_the_conventions_do(self, spans: Spans) -> None:
        assert dict(spans.record().attributes) == {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "gallama",
            "gen_ai.request.model": "mistral",
            "gen_ai.response.model": "mistral",
            "gen_ai.response.time_to_first_chunk": 1.0,
            "gen_ai.usage.input_tokens": 100,
            "gen_ai.usage.output_tokens": 21,
            "gen_ai.usage.cache_read.input_tokens": 60,
            "gallama.request_id": "r-1",
            "gallama.instance": 3,
            "gallama.outcome": "completed",
            "gallama.tries": 2,
            "gallama.queue_seconds": 0.25,
            "gallama.forced_tokens": 8,
        }

    def test_it_says_when_the_slot_and_the_first_token_came(self, spans: Spans) -> None:
        assert [(event.name, event.timestamp) for event in spans.record().events] == [
            ("slot", 1_800_000_000_250_000_000),
            ("first token", 1_800_000_001_000_000_000),
        ]

    def test_an_error_is_its_status(self, spans: Spans) -> None:
        span = spans.record(outcome="refused", error_code="model_overloaded", instance=None)
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes["error.type"] == "model_overloaded"
        assert "gallama.instance" not in span.attributes

    def test_a_client_that_left_is_no_error(self, spans: Spans) -> None:
        span = spans.record(outcome="cancelled", first_token_seconds=None)
        assert span.status.status_code is StatusCode.UNSET
        assert [event.name for event in span.events] == ["slot"]

    def test_whose_key_it_was_is_not_told(self, spans: Spans) -> None:
        assert "alices-key" not in spans.record().to_json()


class TestParent:
    async def span_of(self, spans: Spans, headers: Mapping[str, str]) -> Any:
        found = []

        async def answer(_scope: Scope, _receive: Receive, send: Send) -> None:
            found.append(spans.record())
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        transport = httpx.ASGITransport(TraceParents(answer))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await client.get("/", headers=headers)
        return found[0]

    async def test_a_clients_trace_is_gone_on_with(self, spans: Spans) -> None:
        span = await self.span_of(spans, {"traceparent": TRACEPARENT, "tracestate": "a=b"})
        assert span.context.trace_id == TRACE_ID
        assert span.parent.span_id == SPAN_ID
        assert span.context.trace_state == {"a": "b"}

    @pytest.mark.parametrize(
        "header",
        ["", "00-x-y-01", TRACEPARENT[:-3], "ff" + TRACEPARENT[2:], "00-" + "0" * 32 + TRACEPARENT[35:]],
    )
    async def test_what_names_no_trace_begins_a_new_one(self, spans: Spans, header: str) -> None:
        span = await self.span_of(spans, {"traceparent": header})
        assert span.parent is None
        assert span.context.trace_id not in (0, TRACE_ID)

    async def test_one_clients_trace_does_not_leak_into_the_next(self, spans: Spans) -> None:
        await self.span_of(spans, {"traceparent": TRACEPARENT})
        assert (await self.span_of(spans, {})).parent is None


class TestStart:
    @pytest.mark.parametrize(
        "environment",
        [
            {},
            {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
            ENDPOINT | {"OTEL_SDK_DISABLED": "true"},
            ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"},
        ],
    )
    def test_nothing_is_traced_where_nobody_collects(self, environment: dict[str, str]) -> None:
        assert start_tracing(environment) is None

    @pytest.mark.parametrize(
        ("variable", "value"), [("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), ("OTEL_TRACES_EXPORTER", "console")]
    )
    def test_a_way_that_we_do_not_go_is_an_error(self, variable: str, value: str) -> None:
        with pytest.raises(InvalidConfig, match=f"{variable} is '{value}'"):
            start_tracing(ENDPOINT | {variable: value})

    def test_without_opentelemetry_the_error_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real_import = builtins.__import__

        def import_without(name: str, *rest: Any) -> ModuleType:
            if name.startswith("opentelemetry"):
                raise ModuleNotFoundError(name)
            return real_import(name, *rest)

        monkeypatch.setattr(builtins, "__import__", import_without)
        with pytest.raises(MissingExtra, match=r"pip install 'gallama\[otel\]'"):
            start_tracing(ENDPOINT)

    async def test_a_collector_that_is_gone_holds_nobody_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", ENDPOINT["OTEL_EXPORTER_OTLP_ENDPOINT"])
        tracing = start_tracing(ENDPOINT)
        assert tracing is not None
        tracing.record(RECORD)
        async with asyncio.timeout(10):
            await tracing.close()


class Collector:
    """Takes in what is sent over OTLP."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    serving = threading.Thread(target=collector.server.serve_forever, kwargs={"poll_interval": 0.05})
    serving.start()
    yield collector
    collector.server.shutdown()
    serving.join()
    collector.server.server_close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_collector_hears_of_each_request_within_its_clients_trace(
    collector: Collector,
    start_gateway: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    gateway = start_gateway({"echo": {}})
    body = {"model": "echo", "stream": stream, "messages": [{"role": "user", "content": "a secret"}]}
    headers = {"traceparent": TRACEPARENT, "baggage": "a=b"}
    assert gateway.post(body, headers=headers).status_code == 200
    deadline = time.monotonic() + 10
    while not collector.requests:
        assert time.monotonic() < deadline, gateway.log()
        time.sleep(0.05)
    (span,) = collector.spans()
    assert span.name == "chat echo"
    assert span.trace_id == TRACE_ID.to_bytes(16, "big")
    assert span.parent_span_id == SPAN_ID.to_bytes(8, "big")
    services = {
        attribute.value.string_value
        for attribute in collector.requests[0].resource_spans[0].resource.attributes
        if attribute.key == "service.name"
    }
    assert services == {"gallama"}
    assert b"secret" not in collector.requests[0].SerializeToString()
