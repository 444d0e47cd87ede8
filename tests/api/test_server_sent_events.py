from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.types import Message

from gallama.api import server_sent_events
from gallama.api.server_sent_events import EventStream
from gallama.errors import WorkerDied


class Client:
    """Receives what an ASGI application sends, and may hang up."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.left = asyncio.Event()

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.messages.append(message)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.messages).decode()


async def two_chunks() -> AsyncGenerator[dict[str, Any], None]:
    yield {"a": "line\nbreak"}
    yield {"b": "ü"}


async def test_each_chunk_is_one_event_and_done_is_the_last() -> None:
    client = Client()
    await EventStream(two_chunks())({}, client.receive, client.send)
    assert client.text == 'data: {"a":"line\\nbreak"}\n\ndata: {"b":"ü"}\n\ndata: [DONE]\n\n'
    assert (b"content-type", b"text/event-stream; charset=utf-8") in client.messages[0]["headers"]
    assert [message.get("more_body") for message in client.messages] == [None, True, True, False]


async def test_an_error_is_an_event_and_the_body_has_no_end() -> None:
    async def fails() -> AsyncGenerator[dict[str, Any], None]:
        yield {"a": 1}
        raise WorkerDied("It died.")

    client = Client()
    await EventStream(fails())({}, client.receive, client.send)
    assert '"code":"worker_died"' in client.text
    assert "[DONE]" not in client.text
    assert client.messages[-1]["more_body"] is True


async def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_sent_events, "KEEP_ALIVE_SECONDS", 0.05)

    async def slow() -> AsyncGenerator[dict[str, Any], None]:
        await asyncio.sleep(0.18)
        yield {"a": 1}

    client = Client()
    await EventStream(slow())({}, client.receive, client.send)
    before, _, after = client.text.partition('data: {"a":1}')
    assert 1 <= before.count(": keep-alive\n\n") <= 3
    assert "keep-alive" not in after


async def test_hanging_up_closes_the_chunks_at_once() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield {"a": 1}
            await asyncio.Event().wait()
        finally:
            closed.set()

    client = Client()
    sending = asyncio.create_task(EventStream(endless())({}, client.receive, client.send))
    await asyncio.sleep(0.02)
    client.left.set()
    await asyncio.wait_for(sending, 1)
    assert closed.is_set()


async def test_a_client_that_reads_no_more_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_sent_events, "UNREAD_SECONDS", 0.05)
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[dict[str, Any], None]:
        try:
            while True:
                yield {"a": 1}
        finally:
            closed.set()

    class Sleeper(Client):
        async def send(self, message: Any) -> None:
            await super().send(message)
            if len(self.messages) == 3:
                await asyncio.Event().wait()

    client = Sleeper()
    await asyncio.wait_for(EventStream(endless())({}, client.receive, client.send), 1)
    assert closed.is_set()
    assert client.messages[-1]["more_body"] is True


async def test_a_client_that_takes_no_comments_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_sent_events, "KEEP_ALIVE_SECONDS", 0.02)
    monkeypatch.setattr(server_sent_events, "UNREAD_SECONDS", 0.05)
    closed = asyncio.Event()

    async def silent() -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield {"a": 1}
            await asyncio.Event().wait()
        finally:
            closed.set()

    class Sleeper(Client):
        async def send(self, message: Any) -> None:
            await super().send(message)
            if b"keep-alive" in message.get("body", b""):
                await asyncio.Event().wait()

    client = Sleeper()
    await asyncio.wait_for(EventStream(silent())({}, client.receive, client.send), 1)
    assert closed.is_set()


async def test_a_client_that_reads_slowly_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_sent_events, "KEEP_ALIVE_SECONDS", 0.08)
    monkeypatch.setattr(server_sent_events, "UNREAD_SECONDS", 0.08)

    async def chunks() -> AsyncGenerator[dict[str, Any], None]:
        for number in range(10):
            yield {"a": number}

    class Slow(Client):
        async def send(self, message: Any) -> None:
            await asyncio.sleep(0.02)
            await super().send(message)

    client = Slow()
    await EventStream(chunks())({}, client.receive, client.send)
    assert client.text.endswith("data: [DONE]\n\n")
