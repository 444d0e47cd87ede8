"""The door: who is let in when many want to, and who keeps it waiting."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from gallama.api import http_protocol, request_bodies
from gallama.api.app import create_app
from gallama.api.http_protocol import protocol_for, watch_connections
from gallama.api.open_files import connections_within
from gallama.api.request_bodies import BodyRoom
from gallama.config import ServerConfig
from gallama.errors import InvalidConfig, ServerFull
from gallama.pool.pool import WorkerPool

MESSAGES = [{"role": "user", "content": "hi"}]
SHORT = 0.2
"""Seconds in the place of the real ones, which are too long to wait for."""
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHAT_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


@dataclass(frozen=True)
class Door:
    """A server in this process, with connections as the gateway makes them."""

    port: int
    state: ServerState

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def until_open(self, count: int) -> None:
        """Wait until so many connections are open."""
        async with asyncio.timeout(5):
            while len(self.state.connections) != count:  # noqa: ASYNC110 (uvicorn tells nobody)
                await asyncio.sleep(0.01)


OpenDoor = Callable[..., AbstractAsyncContextManager[Door]]


@pytest.fixture
def open_door(monkeypatch: pytest.MonkeyPatch) -> OpenDoor:
    for name in ("HEAD_SECONDS", "SURPLUS_HEAD_SECONDS", "LINGER_SECONDS", "UNREAD_SECONDS"):
        monkeypatch.setattr(http_protocol, name, SHORT)
    monkeypatch.setattr(http_protocol, "LOOK_SECONDS", SHORT / 10)

    @contextlib.asynccontextmanager
    async def opened(
        app: ASGIApp | None = None, *, max_connections: int = 100, idle_seconds: int = 60
    ) -> AsyncIterator[Door]:
        app = app or create_app(WorkerPool([]), ServerConfig())
        protocol = protocol_for(max_connections)
        config = uvicorn.Config(
            app, http=protocol, ws="none", lifespan="off", log_config=None, timeout_keep_alive=idle_seconds
        )
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: protocol(config, state, {}), "127.0.0.1", 0)
        watching = asyncio.create_task(watch_connections(state.connections))
        try:
            yield Door(server.sockets[0].getsockname()[1], state)
            await Door(0, state).until_open(0)
        finally:
            watching.cancel()
            server.close()

    return opened


def error_in(answer: bytes) -> tuple[int, str]:
    """Status and code of an answer in OpenAI's form that ends its connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower(), head
    assert b"x-request-id: " in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


class TestSlowClients:
    async def test_whoever_says_nothing_is_sent_away(self, open_door: OpenDoor) -> None:
        async with open_door() as door, door.connect() as (reader, _):
            assert await reader.read() == b""

    async def test_whoever_never_ends_his_headers_hears_so(self, open_door: OpenDoor) -> None:
        async with open_door() as door, door.connect() as (reader, writer):
            sending = asyncio.create_task(_trickle(writer, HEALTH[:-2]))
            assert error_in(await _last_answer(reader)) == (408, "request_timeout")
            await sending

    async def test_the_same_on_a_connection_that_has_asked_before(self, open_door: OpenDoor) -> None:
        async with open_door() as door, door.connect() as (reader, writer):
            writer.write(HEALTH)
            assert await reader.readuntil(b'"ok"}')
            await asyncio.sleep(2 * SHORT)
            writer.write(HEALTH)
            assert await reader.readuntil(b'"ok"}')
            sending = asyncio.create_task(_trickle(writer, HEALTH[:-2]))
            assert error_in(await _last_answer(reader)) == (408, "request_timeout")
            await sending

    async def test_an_idle_connection_is_closed(self, open_door: OpenDoor) -> None:
        async with open_door(idle_seconds=1) as door, door.connect() as (reader, writer):
            writer.write(HEALTH)
            assert (await reader.read()).endswith(b'"ok"}')

    async def test_one_byte_does_not_make_an_idle_connection_last(self, open_door: OpenDoor) -> None:
        async with open_door(idle_seconds=1) as door, door.connect() as (reader, writer):
            writer.write(HEALTH)
            assert await reader.readuntil(b'"ok"}')
            writer.write(b"G")
            assert error_in(await _last_answer(reader)) == (408, "request_timeout")

    async def test_the_rest_of_a_refused_body_is_not_waited_for_for_ever(self, open_door: OpenDoor) -> None:
        async with open_door() as door, door.connect() as (reader, writer):
            writer.write(CHAT_HEAD + b"Content-Length: 99999999999\r\n\r\n")
            sending = asyncio.create_task(_trickle(writer, b"x" * 10_000))
            answer = await _last_answer(reader)
            assert answer.startswith(b"HTTP/1.1 413 ")
            sending.cancel()

    async def test_a_refused_body_that_comes_whole_leaves_the_connection_usable(
        self, open_door: OpenDoor
    ) -> None:
        async with open_door() as door, door.connect() as (reader, writer):
            writer.write(CHAT_HEAD + b"Content-Type: text/plain\r\nContent-Length: 4\r\n\r\n{}")
            assert b"unsupported_value" in await reader.readuntil(b"}}")
            writer.write(b"  " + HEALTH)
            assert await reader.readuntil(b'"ok"}')

    @pytest.mark.parametrize("ends", [True, False])
    async def test_a_body_that_comes_too_slowly_is_a_408(
        self, open_door: OpenDoor, monkeypatch: pytest.MonkeyPatch, ends: bool
    ) -> None:
        monkeypatch.setattr(request_bodies, "SILENCE_SECONDS", SHORT)
        async with open_door() as door, door.connect() as (reader, writer):
            writer.write(CHAT_HEAD + b"Content-Length: 100000\r\n\r\n{")
            sending = asyncio.create_task(_trickle(writer, b" " * (1000 if ends else 0)))
            answer = await _last_answer(reader)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"request_timeout" in answer
            sending.cancel()

    async def test_a_body_of_a_sane_pace_may_take_its_time(
        self, open_door: OpenDoor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(request_bodies, "SILENCE_SECONDS", SHORT)
        monkeypatch.setattr(request_bodies, "MIN_BYTES_PER_SECOND", 10)
        async with open_door() as door, door.connect() as (reader, writer):
            writer.write(CHAT_HEAD + b"Content-Length: 102\r\n\r\n{")
            await _trickle(writer, b" " * 100, pause_seconds=5 * SHORT / 100)
            writer.write(b"}")
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 400 ")

    async def test_whoever_reads_nothing_of_his_answer_is_cut_off(self, open_door: OpenDoor) -> None:
        async with open_door(_answers_much, idle_seconds=1) as door, door.connect() as (_, writer):
            writer.write(HEALTH)
            await door.until_open(1)
            await door.until_open(0)

    async def test_whoever_reads_slowly_gets_all_of_it(
        self, open_door: OpenDoor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http_protocol, "UNREAD_SECONDS", 1.0)
        async with open_door(_answers_much, idle_seconds=1) as door, door.connect() as (reader, writer):
            writer.write(HEALTH)
            await reader.readuntil(b"\r\n\r\n")
            body = b""
            for _ in range(16):
                body += await reader.readexactly(len(MUCH) // 16)
                await asyncio.sleep(0.2)
            assert body == MUCH


class TestNoHttp:
    @pytest.mark.parametrize("length", [22_000, 60_000, 120_000, 250_000])
    @pytest.mark.parametrize("header", [b"a:\r\n", b"A: " + b"b" * 4000 + b"\r\n"])
    async def test_long_headers_are_refused_even_if_they_come_in_one_go(
        self, open_door: OpenDoor, header: bytes, length: int
    ) -> None:
        async with open_door() as door, door.connect() as (reader, writer):
            writer.write(HEALTH[:-2] + header * (length // len(header) + 1) + b"\r\n")
            assert error_in(await _last_answer(reader)) == (400, "invalid_http")

    async def test_sane_headers_are_not(self, open_door: OpenDoor) -> None:
        async with open_door() as door, door.connect() as (reader, writer):
            writer.write(HEALTH[:-2] + b"cookie: " + b"x" * 15_000 + b"\r\n\r\n")
            assert await reader.readuntil(b'"ok"}')

    async def test_it_is_refused_in_our_form(self, open_door: OpenDoor) -> None:
        async with open_door() as door, door.connect() as (reader, writer):
            writer.write(b"nonsense\r\n\r\n")
            assert error_in(await _last_answer(reader)) == (400, "invalid_http")

    async def test_in_the_middle_of_a_body_it_ends_the_request(
        self, open_door: OpenDoor, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with open_door() as door, door.connect() as (reader, writer):
            writer.write(CHAT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
            await asyncio.sleep(SHORT / 4)
            writer.write(b"nonsense\r\n")
            assert error_in(await _last_answer(reader)) == (400, "invalid_http")
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]

    async def test_in_the_middle_of_an_answer_it_ends_the_connection(
        self, open_door: OpenDoor, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with open_door(_answers_and_waits) as door, door.connect() as (reader, writer):
            writer.write(CHAT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            await reader.readuntil(b"begun")
            writer.write(b"nonsense\r\n")
            assert await reader.read() == b"\r\n"
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


class TestFullHouse:
    async def test_beyond_the_limit_only_health_is_answered(self, open_door: OpenDoor) -> None:
        async with open_door(max_connections=2) as door, door.connect(), door.connect():
            await door.until_open(2)
            async with door.connect() as (reader, writer):
                writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = await reader.read()
                assert error_in(answer) == (503, "server_full")
                assert b"retry-after: 1\r\n" in answer.lower()
            async with door.connect() as (reader, writer):
                writer.write(HEALTH)
                answer = await reader.read()
                assert answer.startswith(b"HTTP/1.1 200 ")
                assert b"connection: close" in answer

    async def test_a_place_that_becomes_free_is_used(self, open_door: OpenDoor) -> None:
        async with open_door(max_connections=1) as door:
            async with door.connect():
                await door.until_open(1)
            await door.until_open(0)
            async with door.connect() as (reader, writer):
                writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert (await reader.readuntil(b"\r\n")) == b"HTTP/1.1 200 OK\r\n"

    async def test_far_beyond_the_limit_nothing_is_waited_for(
        self, open_door: OpenDoor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http_protocol, "SPARE_CONNECTIONS", 1)
        async with open_door(max_connections=1) as door, door.connect(), door.connect():
            await door.until_open(2)
            async with door.connect() as (reader, _):
                assert error_in(await _last_answer(reader)) == (503, "server_full")

    def test_real_connections_are_counted(self, start_gateway: Any) -> None:
        gateway = start_gateway({"m": {}}, server={"max_connections": 3})
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(socket.create_connection(_place(gateway)))
            with gateway.client() as client:
                _wait_for_status(client, "/v1/models", 503)
                assert client.get("/health").status_code == 200
                answer = client.get("/v1/models")
                assert answer.json()["error"]["code"] == "server_full"
                assert answer.headers["retry-after"] == "1"
        with gateway.client() as client:
            _wait_for_status(client, "/v1/models", 200)
        assert gateway.post({"model": "m", "messages": MESSAGES}).status_code == 200


class TestOpenFiles:
    def test_what_the_system_allows_is_taken(self) -> None:
        assert connections_within(ServerConfig(max_connections=1000), 2256) == 1000

    def test_fewer_than_asked_for_is_an_error(self) -> None:
        with pytest.raises(InvalidConfig, match=r"max_connections is 1000, .* enough for 999 connections"):
            connections_within(ServerConfig(max_connections=1000), 2255)

    def test_where_nobody_asked_it_is_as_many_as_can_be(self, caplog: pytest.LogCaptureFixture) -> None:
        assert connections_within(ServerConfig(), 1024) == 384
        assert "At most 384 connections instead of 4096" in caplog.text

    def test_where_none_can_be_it_is_an_error(self) -> None:
        with pytest.raises(InvalidConfig):
            connections_within(ServerConfig(), 256)


class TestBodyRoom:
    LARGE = 1_000_000

    def test_what_is_given_back_can_be_taken_again(self) -> None:
        room = BodyRoom(2 * self.LARGE)
        for _ in range(10):
            with room.share() as hold, room.share() as hold_too:
                for size in range(0, self.LARGE, 10_000):
                    hold(size)
                    hold_too(size)

    def test_more_than_there_is_is_refused_and_small_ones_never_are(self) -> None:
        room = BodyRoom(self.LARGE)
        with room.share() as hold:
            hold(self.LARGE)
            with room.share() as hold_too, pytest.raises(ServerFull):
                hold_too(self.LARGE)
            for _ in range(100):
                with room.share() as hold_too:
                    hold_too(64 * 1024)
        with room.share() as hold:
            hold(self.LARGE)


class TestSecrets:
    KEY = "the-key-of-the-house"

    def test_a_key_is_nowhere_in_the_log_the_metrics_or_the_status(
        self, start_gateway: Any, tmp_path: Path
    ) -> None:
        keys = tmp_path / "keys.yaml"
        keys.write_text(f"- {{name: office, key: {self.KEY}, tokens_per_minute: 600}}\n")
        keys.chmod(0o600)
        gateway = start_gateway({"m": {}}, wait=False, server={"keys_file": str(keys)}, flags=["-v"])
        with gateway.client(headers={"authorization": f"Bearer {self.KEY}"}) as client:
            _wait_for_status(client, "/ready", 200)
            answers = [
                client.post("/v1/chat/completions", json={"model": "m", "messages": MESSAGES}),
                client.post("/v1/chat/completions", content=b"{"),
                client.post(f"/{self.KEY[:3]}", json={}),
                client.get("/metrics"),
                client.get("/status"),
                client.get("/list_models"),
            ]
            assert [answer.status_code for answer in answers[:2]] == [200, 400]
            assert int(answers[0].headers["x-ratelimit-remaining-tokens"]) <= 600
            used = client.post("/v1/chat/completions", content=b"{").headers["x-ratelimit-remaining-tokens"]
            assert int(used) < 600, "prompt and answer are charged"
        for header in ("Bearer", f"Bearer {self.KEY}x", "Bearer " + self.KEY * 5000):
            with gateway.client(headers={"authorization": header}) as client:
                refused = client.get("/v1/models")
            assert refused.status_code in (400, 401)
            answers.append(refused)
        keys.write_text(f"- {{name: office, key: {self.KEY}, key: {self.KEY}}}\n")
        time.sleep(1.1)
        with gateway.client(headers={"authorization": f"Bearer {self.KEY}"}) as client:
            answers.append(client.get("/v1/models"))
        assert answers[-1].status_code == 200
        assert "The keys stay as they were" in gateway.log()
        assert self.KEY not in gateway.log()
        assert not any(self.KEY in answer.text for answer in answers)

    def test_a_key_for_one_model_does_not_open_another(self, start_gateway: Any, tmp_path: Path) -> None:
        keys = tmp_path / "keys.yaml"
        keys.write_text(f"- {{name: office, key: {self.KEY}, models: [parrot]}}\n")
        keys.chmod(0o600)
        models = {"echo": {"aliases": ["parrot"]}, "other": {}}
        gateway = start_gateway(models, wait=False, server={"keys_file": str(keys)})
        with gateway.client(headers={"authorization": f"Bearer {self.KEY}"}) as client:
            _wait_for_status(client, "/ready", 200)
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["echo"]
            statuses = {
                (path, name): client.post(path, json={"model": name, "messages": MESSAGES}).status_code
                for path in ("/v1/chat/completions", "/v1/explain")
                for name in ("echo", "parrot", "other")
            }
            assert client.get("/v1/models/other").status_code == 403
        assert statuses == {
            (path, name): 403 if name == "other" else 200
            for path in ("/v1/chat/completions", "/v1/explain")
            for name in ("echo", "parrot", "other")
        }

    def test_a_place_of_a_key_is_held_until_its_stream_ends_or_its_client_leaves(
        self, start_gateway: Any, tmp_path: Path
    ) -> None:
        keys = tmp_path / "keys.yaml"
        keys.write_text(f"- {{name: office, key: {self.KEY}, max_concurrent_requests: 1}}\n")
        keys.chmod(0o600)
        slow = {"script": {"reply": "x" * 2000, "seconds_per_token": 0.05}}
        gateway = start_gateway({"slow": slow, "echo": {}}, wait=False, server={"keys_file": str(keys)})
        body = {"model": "echo", "messages": MESSAGES}
        with gateway.client(headers={"authorization": f"Bearer {self.KEY}"}) as client:
            _wait_for_status(client, "/ready", 200)
            stream = {"model": "slow", "stream": True, "messages": MESSAGES}
            with client.stream("POST", "/v1/chat/completions", json=stream) as answer:
                lines = answer.iter_lines()
                next(lines)
                refused = client.post("/v1/chat/completions", json=body)
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
                assert next(lines) == ""
            _wait_until(lambda: client.post("/v1/chat/completions", json=body).status_code == 200)


class TestDeadlines:
    def test_a_request_whose_time_is_over_leaves_the_line(self, gateway: Any) -> None:
        stream = {"model": "silent", "messages": MESSAGES, "stream": True}
        headers = {"x-request-timeout-seconds": "0.5"}
        with gateway.client() as client, _many_streams(gateway, 1, stream):
            gateway.wait_for("silent", busy=1)
            answer = client.post("/v1/chat/completions", json=stream | {"stream": False}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
            gateway.wait_for("silent", busy=1, waiting=0)
        gateway.wait_for("silent", busy=0)

    def test_an_answer_that_is_not_complete_by_then_is_cut(self, gateway: Any) -> None:
        body = {"model": "slow", "messages": MESSAGES, "stream": True}
        with gateway.client() as client:
            headers = {"x-request-timeout-seconds": "0.5"}
            with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
                lines = answer.iter_lines()
                last = next(line for line in lines if "error" in line)
                assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
                with pytest.raises(httpx.RemoteProtocolError):
                    list(lines)
        gateway.wait_for("slow", busy=0, waiting=0)

    def test_a_deadline_that_is_none_is_refused_before_the_body_is_read(self, gateway: Any) -> None:
        with gateway.client() as client:
            headers = {"x-request-timeout-seconds": "soon"}
            answer = client.post("/v1/chat/completions", content=b"{", headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-timeout-seconds")


WAITING = 1000


@pytest.mark.slow
def test_a_thousand_waiting_streams_cost_little_and_leave_nothing(start_gateway: Any) -> None:
    models = {
        "m": {
            "script": {"seconds_before_first_token": 600, "slots": 1},
            "max_concurrent_requests": 1,
            "queue_limit": WAITING + 100,
            "queue_token_limit": 10**6,
        }
    }
    gateway = start_gateway(models)
    gateway_process = psutil.Process(gateway.process.pid)
    stream = {"model": "m", "messages": MESSAGES, "stream": True}
    with _many_streams(gateway, 20, stream):
        gateway.wait_for("m", busy=1, waiting=19)
    gateway.wait_for("m", busy=0, waiting=0)
    bytes_before = gateway_process.memory_info().rss
    with _many_streams(gateway, WAITING, stream):
        gateway.wait_for("m", busy=1, waiting=WAITING - 1)
        seconds = _health_seconds(gateway)
        bytes_each = (gateway_process.memory_info().rss - bytes_before) / WAITING
        print(
            f"/health: median {statistics.median(seconds) * 1000:.1f} ms, most {max(seconds) * 1000:.1f} ms;"
            f" {bytes_each / 1000:.1f} KB for each"
        )
        assert bytes_each < 100_000
        assert statistics.median(seconds) < 0.05
    gateway.wait_for("m", busy=0, waiting=0)
    files_left = gateway_process.num_fds()
    _wait_until(lambda: gateway_process.num_fds() < 100)
    assert files_left < WAITING


@contextlib.contextmanager
def _many_streams(gateway: Any, count: int, request: Mapping[str, Any]) -> Iterator[None]:
    body = json.dumps(request).encode()
    raw = CHAT_HEAD + f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(_place(gateway))).sendall(raw)
        yield


def _health_seconds(gateway: Any, times: int = 20) -> list[float]:
    seconds = []
    with gateway.client() as client:
        client.get("/health")
        for _ in range(times):
            began = time.perf_counter()
            assert client.get("/health").status_code == 200
            seconds.append(time.perf_counter() - began)
            time.sleep(0.02)
    return seconds


MUCH = os.urandom(16) * 2**20


async def _answers_much(_scope: Scope, _receive: Receive, send: Send) -> None:
    headers = [(b"content-length", str(len(MUCH)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": MUCH})


async def _answers_and_waits(_scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    while (await receive())["type"] != "http.disconnect":
        pass


async def _last_answer(reader: asyncio.StreamReader) -> bytes:
    """An error, after which the connection ends: by a reset where the server had not read all."""
    answer = await reader.readuntil(b"}}")
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    return answer


async def _trickle(writer: asyncio.StreamWriter, data: bytes, pause_seconds: float = SHORT / 50) -> None:
    """Send byte by byte, until all is sent or nobody listens any more."""
    for index in range(len(data)):
        if writer.is_closing():
            return
        writer.write(data[index : index + 1])
        await asyncio.sleep(pause_seconds)


def _place(gateway: Any) -> tuple[str, int]:
    parts = urlsplit(gateway.url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def _wait_for_status(client: httpx.Client, path: str, status: int) -> None:
    _wait_until(lambda: client.get(path).status_code == status)


def _wait_until(is_so: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)
