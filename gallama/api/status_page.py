"""GET /: a page that shows what the gateway does now. GET /status: the same as JSON, which the page asks for.

The page is one file without anything from elsewhere, and its browser is told to take nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from gallama import __version__
from gallama.pool.gpus import Gpu
from gallama.pool.pool import WorkerPool
from gallama.pool.views import Problem, ServedInstance, ServedModel

router = APIRouter()

WINDOW_SECONDS = 10.0
"""Tokens per second are a mean over so long."""
_MIN_INTERVAL_SECONDS = 0.5
"""However many look at the page, workers are asked no more often."""

_PAGE = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")


def _hash_of(tag: str) -> str:
    """What allows the page's own style or script, and no other."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", _PAGE, re.DOTALL)
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"


_PAGE_HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; style-src {_hash_of('style')}; script-src {_hash_of('script')};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@router.get("/")
async def show_page() -> Response:
    return HTMLResponse(_PAGE, headers=_PAGE_HEADERS)


@router.get("/status")
async def tell_status(request: Request) -> Response:
    status: Status = request.app.state.status
    return JSONResponse(await status.now(), headers={"cache-control": "no-store"})


class Speedometer:
    """Tokens per second, from counters that are looked at now and then."""

    def __init__(self) -> None:
        self._readings: dict[int, deque[tuple[float, int]]] = {}

    def read(self, now: float, counters: Mapping[int, int]) -> None:
        """
        Args:
            now: seconds, never less than before.
            counters: the tokens made so far by each instance that there is; they begin anew with its process.
        """
        self._readings = {number: self._readings.get(number, deque()) for number in counters}
        for number, tokens in counters.items():
            readings = self._readings[number]
            if readings and (tokens < readings[-1][1] or now - readings[-1][0] > WINDOW_SECONDS):
                readings.clear()
            readings.append((now, tokens))
            while len(readings) > 2 and now - readings[1][0] >= WINDOW_SECONDS:
                readings.popleft()

    def tokens_per_second(self, number: int) -> float:
        """Of one instance, over the last seconds; 0 before it was looked at twice."""
        readings = self._readings.get(number)
        if not readings or readings[-1][0] == readings[0][0]:
            return 0.0
        (began, tokens_then), (ended, tokens_now) = readings[0], readings[-1]
        return (tokens_now - tokens_then) / (ended - began)


class Status:
    """What there is to see of one gateway."""

    def __init__(self, pool: WorkerPool, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._clock = clock
        self._began = clock()
        self._speedometer = Speedometer()
        self._read_at = -_MIN_INTERVAL_SECONDS
        self._reading = asyncio.Lock()

    async def now(self) -> dict[str, Any]:
        """As JSON."""
        await self.refresh()
        models = [self._model(model) for model in self._pool.models]
        return {
            "version": __version__,
            "uptime_seconds": round(self._clock() - self._began, 1),
            "busy": sum(model["busy"] for model in models),
            "waiting": sum(model["waiting"] for model in models),
            "tokens_per_second": round(sum(model["tokens_per_second"] for model in models), 1),
            "memory_bytes": sum(model["memory_bytes"] for model in models),
            "gpus": [_gpu(gpu) for gpu in self._pool.gpus],
            "models": models,
            "problems": [_problem(problem) for problem in reversed(self._pool.recent_problems)],
        }

    async def refresh(self) -> None:
        """Ask the workers and the GPUs, unless they were just asked."""
        async with self._reading:
            if self._clock() - self._read_at >= _MIN_INTERVAL_SECONDS:
                await self._read()

    async def _read(self) -> None:
        await self._pool.refresh()
        self._read_at = self._clock()
        instances = [instance for model in self._pool.models for instance in model.instances]
        self._speedometer.read(
            self._read_at,
            {
                instance.number: instance.status.sampled_tokens + instance.status.forced_tokens
                for instance in instances
                if instance.status is not None
            },
        )

    def _model(self, model: ServedModel) -> dict[str, Any]:
        instances = [self._instance(instance) for instance in model.instances]
        return {
            "name": model.name,
            "aliases": model.aliases,
            "backend": model.backend,
            "is_pinned": model.is_pinned,
            "last_used": model.last_used,
            "waiting": model.waiting,
            "waiting_tokens": model.waiting_tokens,
            "busy": model.busy,
            "tokens_per_second": round(sum(instance["tokens_per_second"] for instance in instances), 1),
            "memory_bytes": sum(instance["memory_bytes"] for instance in instances),
            "instances": instances,
        }

    def _instance(self, instance: ServedInstance) -> dict[str, Any]:
        return {
            "number": instance.number,
            "port": instance.port,
            "state": instance.state,
            "progress": round(instance.progress, 3),
            "busy": instance.busy,
            "capacity": instance.capacity,
            "served": instance.served,
            "tokens_per_second": round(self._speedometer.tokens_per_second(instance.number), 1),
            "memory_bytes": instance.memory_bytes,
            "gpus": instance.gpus,
            "context_length": instance.context_length,
            "ready_since": instance.ready_since,
            "starts": instance.starts,
            "problem": instance.problem,
        }


def _gpu(gpu: Gpu) -> dict[str, Any]:
    return {
        "index": gpu.index,
        "name": gpu.name,
        "memory_bytes": gpu.total_bytes,
        "memory_used_bytes": gpu.total_bytes - gpu.free_bytes,
    }


def _problem(problem: Problem) -> dict[str, Any]:
    return {
        "at": problem.at,
        "model": problem.model,
        "instance": problem.instance,
        "code": problem.code,
        "message": problem.message,
    }
