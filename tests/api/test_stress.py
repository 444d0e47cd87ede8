"""Many streams while workers are killed, stopped, added and removed, and clients leave at random.

STRESS_SECONDS in the environment says for how long; the default keeps the suite short.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import psutil
import pytest

SECONDS = float(os.environ.get("STRESS_SECONDS", "20"))
CLIENTS = 64
SECONDS_BETWEEN_FAULTS = 2.0
MOST_INSTANCES = 4

pytestmark = pytest.mark.slow


@dataclass
class Findings:
    outcomes: Counter[str] = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)


class Client:
    """Asks for echoes of markers that nobody else asks for, and judges what comes back."""

    def __init__(self, number: int, http: httpx.AsyncClient, findings: Findings) -> None:
        self._number = number
        self._rng = random.Random(number)
        self._http = http
        self._findings = findings

    async def ask_on(self, is_over: Callable[[], bool]) -> None:
        count = 0
        while not is_over():
            count += 1
            marker = f"marker-{self._number}-{count} " * self._rng.randint(1, 12)
            body = {
                "model": self._rng.choice(["a", "a", "b"]),
                "messages": [{"role": "user", "content": marker}],
            }
            ask = self._rng.choice([self._ask_whole, self._ask_stream, self._ask_stream, self._ask_and_leave])
            try:
                outcome = await ask(body, marker)
            except httpx.TransportError as error:
                outcome = self._defect(f"{ask.__name__}: {error!r} on {marker[:30]!r}")
            self._findings.outcomes[outcome] += 1

    async def _ask_whole(self, body: dict[str, Any], marker: str) -> str:
        response = await self._http.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            return self._judge_error(response.json())
        content = response.json()["choices"][0]["message"]["content"]
        return "answered" if content == marker else self._defect(f"{content!r} instead of {marker!r}")

    async def _ask_stream(self, body: dict[str, Any], marker: str) -> str:
        async with self._http.stream(
            "POST", "/v1/chat/completions", json=body | {"stream": True}
        ) as response:
            if response.status_code != 200:
                return self._judge_error(msgspec.json.decode(await response.aread()))
            content, error, is_done = "", None, False
            try:
                async for chunk in _chunks(response):
                    if chunk == "[DONE]":
                        is_done = True
                    elif "error" in chunk:
                        error = chunk
                    else:
                        content += chunk["choices"][0]["delta"].get("content") or ""
            except (httpx.RemoteProtocolError, httpx.ReadError):
                pass  # how a stream ends that has told of an error
            if error is not None:
                return self._judge_error(error)
            if not is_done:
                return self._defect(f"a stream broke off without a word after {content!r}")
            return "answered" if content == marker else self._defect(f"{content!r} instead of {marker!r}")

    async def _ask_and_leave(self, body: dict[str, Any], _marker: str) -> str:
        most_chunks = self._rng.randint(0, 20)
        async with self._http.stream(
            "POST", "/v1/chat/completions", json=body | {"stream": True}
        ) as response:
            if response.status_code == 200 and most_chunks:
                count = 0
                with_chunks = _chunks(response)
                try:
                    async for _ in with_chunks:
                        count += 1
                        if count == most_chunks:
                            break
                except (httpx.RemoteProtocolError, httpx.ReadError):
                    pass  # it ended first, with an error
                finally:
                    await with_chunks.aclose()
        return "left"

    def _judge_error(self, body: Any) -> str:
        error = body["error"]
        known = ("worker_died", "model_unloaded", "model_unavailable", "model_overloaded", "crash_loop")
        if error["code"] not in known or not error["message"]:
            return self._defect(f"an error without a reason: {body}")
        return str(error["code"])

    def _defect(self, what: str) -> str:
        self._findings.defects.append(what)
        return "defect"


async def _chunks(response: httpx.Response) -> AsyncGenerator[Any, None]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            text = line.removeprefix("data: ")
            yield text if text == "[DONE]" else msgspec.json.decode(text)


class Saboteur:
    """Does at random what may befall a gateway's workers."""

    def __init__(self, http: httpx.AsyncClient, findings: Findings) -> None:
        self._rng = random.Random(0)
        self._http = http
        self._findings = findings
        self.seen_processes: set[int] = set()

    async def work(self, is_over: Callable[[], bool]) -> None:
        faults: list[Callable[[list[dict[str, Any]]], Awaitable[str]]] = [
            self._kill,
            self._stop,
            self._add,
            self._remove,
        ]
        while not is_over():
            await asyncio.sleep(SECONDS_BETWEEN_FAULTS)
            instances = await self.instances("a")
            self._rng.shuffle(faults)
            for fault in faults:
                if (done := await fault(instances)) != "nothing":
                    self._findings.faults[done] += 1
                    break

    async def instances(self, model: str) -> list[dict[str, Any]]:
        models = (await self._http.get("/list_models")).json()["models"]
        for each in models:
            self.seen_processes |= {i["process_id"] for i in each["instances"] if i["process_id"]}
        return next((each["instances"] for each in models if each["name"] == model), [])

    async def _kill(self, instances: list[dict[str, Any]]) -> str:
        return self._send(signal.SIGKILL, instances, "killed")

    async def _stop(self, instances: list[dict[str, Any]]) -> str:
        return self._send(signal.SIGSTOP, instances, "stopped")

    def _send(self, number: signal.Signals, instances: list[dict[str, Any]], what: str) -> str:
        ready = [each["process_id"] for each in instances if each["state"] == "ready"]
        if not ready:
            return "nothing"
        os.kill(self._rng.choice(ready), number)
        return what

    async def _add(self, instances: list[dict[str, Any]]) -> str:
        if len(instances) >= MOST_INSTANCES:
            return "nothing"
        response = await self._http.post("/add_model", json={"model_id": "a"})
        assert response.status_code == 202, response.text
        return "added"

    async def _remove(self, instances: list[dict[str, Any]]) -> str:
        if len(instances) < 2:
            return "nothing"
        port = self._rng.choice(instances)["port"]
        response = await self._http.post("/stop_model_by_port", json={"port": port})
        assert response.status_code == 200, response.text
        return "removed"


async def _stress(url: str, seconds: float) -> tuple[Findings, set[int]]:
    findings = Findings()
    end = asyncio.get_running_loop().time() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        saboteur = Saboteur(http, findings)

        def is_over() -> bool:
            return asyncio.get_running_loop().time() >= end

        clients = [Client(number, http, findings) for number in range(CLIENTS)]
        await asyncio.gather(saboteur.work(is_over), *(client.ask_on(is_over) for client in clients))
        async with asyncio.timeout(15):
            while await _counts(http) != {("a", 0, 0), ("b", 0, 0)}:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        # All is well again: each instance that is there answers.
        async with asyncio.timeout(60):
            for name in ("a", "b"):
                body = {"model": name, "messages": [{"role": "user", "content": "again"}]}
                while (await http.post("/v1/chat/completions", json=body)).status_code != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.5)
        await saboteur.instances("a")
        return findings, saboteur.seen_processes


async def _counts(http: httpx.AsyncClient) -> set[tuple[str, int, int]]:
    """Of each model: its name, and how many requests run and wait."""
    models = (await http.get("/ready")).json()["models"]
    return {(name, state["busy"], state["waiting"]) for name, state in models.items()}


def test_no_answer_is_lost_mixed_up_or_left_behind(start_gateway: Any) -> None:
    script = {"seconds_per_token": 0.005}
    gateway = start_gateway(
        {
            "a": {"script": script, "replicas": 2, "max_concurrent_requests": 16, "queue_limit": 64},
            "b": {"script": script, "max_concurrent_requests": 16, "queue_limit": 64},
        },
        server={"probe_interval_seconds": 0.5, "hang_seconds": 2, "drain_seconds": 2},
    )
    findings, processes = asyncio.run(_stress(gateway.url, SECONDS))
    print(dict(findings.outcomes), dict(findings.faults))
    assert findings.defects == []
    assert findings.outcomes["answered"] > sum(findings.outcomes.values()) / 2, findings.outcomes
    assert {"killed", "stopped"} & findings.faults.keys()
    gateway.process.send_signal(signal.SIGTERM)
    gateway.process.wait(30)
    left = [number for number in processes if psutil.pid_exists(number)]
    assert left == []
    assert "Traceback" not in gateway.log(), gateway.log()[-3000:]
