"""Whoever leaves frees what was held for him, at once, wherever his request is at that moment."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

BODY = {"messages": [{"role": "user", "content": "hi"}]}


@contextlib.contextmanager
def asking(gateway: Any, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request under way, on a connection that is closed in the end."""
    host, port = urlsplit(gateway.url).hostname, urlsplit(gateway.url).port
    raw = json.dumps(BODY | body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    with socket.create_connection((host, port), timeout=10) as connection:
        connection.sendall(head.encode() + raw)
        yield connection


@pytest.fixture(autouse=True)
def nothing_is_left_behind(gateway: Any) -> Iterator[None]:
    yield
    for model in ("slow", "silent"):
        gateway.wait_for(model, busy=0, waiting=0)


def engine_is_free(gateway: Any) -> bool:
    """Whether the worker's only slot is free: a new stream of the slow model begins soon."""
    began = time.monotonic()
    with asking(gateway, {"model": "slow", "stream": True}) as connection:
        while b"content" not in connection.recv(4096):
            pass
    return time.monotonic() - began < 1


def test_in_the_middle_of_a_stream(gateway: Any) -> None:
    with asking(gateway, {"model": "slow", "stream": True}) as connection:
        assert b"200 OK" in connection.recv(4096)
        gateway.wait_for("slow", busy=1)
    gateway.wait_for("slow", busy=0)
    assert engine_is_free(gateway)


def test_while_a_whole_answer_is_made(gateway: Any) -> None:
    with asking(gateway, {"model": "slow"}):
        gateway.wait_for("slow", busy=1)
        time.sleep(0.2)
    gateway.wait_for("slow", busy=0)
    assert engine_is_free(gateway)


@pytest.mark.parametrize("stream", [True, False])
def test_before_the_first_token(gateway: Any, stream: bool) -> None:
    with asking(gateway, {"model": "silent", "stream": stream}):
        gateway.wait_for("silent", busy=1)
    gateway.wait_for("silent", busy=0)


@pytest.mark.parametrize("stream", [True, False])
def test_in_the_queue(gateway: Any, stream: bool) -> None:
    with asking(gateway, {"model": "silent"}):
        gateway.wait_for("silent", busy=1)
        with asking(gateway, {"model": "silent", "stream": stream}):
            gateway.wait_for("silent", busy=1, waiting=1)
        gateway.wait_for("silent", busy=1, waiting=0)


def test_a_full_queue_is_a_429_with_a_time_to_try_again(gateway: Any) -> None:
    with asking(gateway, {"model": "silent"}), asking(gateway, {"model": "silent"}):
        gateway.wait_for("silent", busy=1, waiting=1)
        answer = gateway.post({**BODY, "model": "silent", "stream": True})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "model_overloaded"


def test_other_models_answer_while_one_is_full(gateway: Any) -> None:
    with asking(gateway, {"model": "silent"}), asking(gateway, {"model": "silent"}):
        gateway.wait_for("silent", busy=1, waiting=1)
        assert gateway.post({**BODY, "model": "echo"}).status_code == 200


def test_many_who_leave_at_once_leave_nothing_behind(gateway: Any) -> None:
    def leave_soon() -> None:
        with contextlib.suppress(httpx.TimeoutException), gateway.client() as client:
            client.post("/v1/chat/completions", json={**BODY, "model": "slow"}, timeout=0.3)

    threads = [threading.Thread(target=leave_soon) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gateway.wait_for("slow", busy=0, waiting=0)
    assert engine_is_free(gateway)
