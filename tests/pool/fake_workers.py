"""Workers that run inside the test: real frames over real sockets, without processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from gallama.catalog import ResolvedModel
from gallama.config import ModelSpec, ServerConfig
from gallama.conversation import (
    Accepted,
    AnswerText,
    ChatEvent,
    ChatRequest,
    Completed,
    Message,
    Usage,
)
from gallama.embedding import Embeddings, EmbedRequest
from gallama.errors import GallamaError, InvalidRequest
from gallama.generation import EngineStatus
from gallama.pool.gpus import Placement
from gallama.pool.launchers import RunningWorker
from gallama.pool.pool import WorkerPool
from gallama.pool.ticket import RequestRecord, Ticket
from gallama.wire import Ready, UnaryReply, UnaryRequest
from gallama.worker.serve import serving

DONE = Completed(Usage(prompt_tokens=1, completion_tokens=1))


class ServingWorker:
    """A worker that answers as its own Runner; subclasses say when it is ready, and what it does."""

    secret = "secret"
    process_id = None

    def __init__(self) -> None:
        self._died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._serving = asyncio.create_task(self._serve())

    async def listening(self) -> Ready:
        # Who gives a load up gives up waiting, not the address: stop() waits for that, too.
        return Ready(address=await asyncio.shield(self._address), context_length=100)

    async def exited(self) -> str:
        return await asyncio.shield(self._died)

    async def stop(self) -> None:
        # A server that is cancelled while it starts leaves its socket open.
        await asyncio.wait({self._address})
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)

    def die(self) -> None:
        if not self._died.done():
            self._died.set_result("was killed by SIGKILL")

    def memory_bytes(self) -> int:
        return 1000

    def status(self) -> EngineStatus:
        return EngineStatus(busy_slots=0, waiting=0, cached_tokens=0)

    async def probe(self) -> None:
        pass

    def run(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        raise NotImplementedError

    async def reply(self, request: UnaryRequest) -> UnaryReply:
        raise NotImplementedError

    async def _serve(self) -> None:
        async with serving("tcp:127.0.0.1:0", self.secret, self, self.status, self.probe) as address:
            self._address.set_result(address)
            await _until_cancelled()


async def _until_cancelled() -> None:
    """A server that closes while it takes a connection up leaves that one's socket open: asyncio does that in
    three turns of its loop."""
    try:
        await asyncio.Event().wait()
    finally:
        for _ in range(3):
            await asyncio.sleep(0)


class FakeWorker(ServingWorker):
    """The request's text says what it does."""

    def __init__(self, model: ResolvedModel, launcher: FakeLauncher) -> None:
        super().__init__()
        self._launcher = launcher
        self.model = model
        self.asked: list[str] = []
        self.busy = 0

    async def ready(self, on_progress: Callable[[float], None]) -> Ready:
        on_progress(0.5)
        await self._launcher.may_load.wait()
        if self._launcher.load_errors:
            raise self._launcher.load_errors.pop(0)
        return await self.listening()

    async def stop(self) -> None:
        await self._launcher.may_stop.wait()
        await super().stop()
        self._launcher.stopped += 1

    def die(self) -> None:
        self._serving.cancel()
        super().die()

    def status(self) -> EngineStatus:
        return EngineStatus(busy_slots=self.busy, waiting=0, cached_tokens=0)

    async def run(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        text = request.messages[0].content
        self.asked.append(text)
        self.busy += 1
        try:
            if text == "die before" and len(self._launcher.workers) <= self._launcher.bad_workers:
                self.die()
                await asyncio.sleep(1)
            if text == "slow before":
                await asyncio.sleep(0.3)
            yield Accepted(1)
            if text == "die after":
                self.die()
                await asyncio.sleep(1)
            if text == "hang":
                await asyncio.Event().wait()
            yield AnswerText(0, f"{self.model.name}: {text}")
            yield DONE
        finally:
            self.busy -= 1

    async def reply(self, request: UnaryRequest) -> UnaryReply:
        assert isinstance(request, EmbedRequest)
        text = str(request.inputs[0])
        self.asked.append(text)
        self.busy += 1
        try:
            if text == "die" and len(self._launcher.workers) <= self._launcher.bad_workers:
                self.die()
                await asyncio.sleep(1)
            if text == "hang":
                await asyncio.Event().wait()
            if text == "refuse":
                raise InvalidRequest("No.", param="input")
            return Embeddings(vectors=(f"{self.model.name}: {text}".encode(),), prompt_tokens=7)
        finally:
            self.busy -= 1


class FakeLauncher:
    def __init__(self) -> None:
        self.workers: list[FakeWorker] = []
        self.stopped = 0
        self.load_errors: list[GallamaError] = []
        self.bad_workers = 1
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.may_stop = asyncio.Event()
        self.may_stop.set()

    async def launch(self, model: ResolvedModel, placement: Placement | None = None) -> RunningWorker:
        self.workers.append(FakeWorker(model, self))
        return self.workers[-1]


def model(name: str = "m", aliases: tuple[str, ...] = (), **values: Any) -> ResolvedModel:
    spec = ModelSpec.model_validate({"model_id": name, "backend": "scripted", **values})
    return ResolvedModel(name=name, aliases=aliases, path=Path(name), spec=spec)


@contextlib.asynccontextmanager
async def running(
    *to_load: ResolvedModel,
    on_demand: Sequence[ResolvedModel] = (),
    launcher: FakeLauncher | None = None,
    observers: Sequence[Callable[[RequestRecord], None]] = (),
    **settings: Any,
) -> AsyncIterator[WorkerPool]:
    """A pool without GPUs; `settings`: of its server."""
    pool = WorkerPool(
        to_load,
        on_demand,
        config=ServerConfig.model_validate({"minimum_stay_seconds": 0, **settings}),
        launcher=launcher or FakeLauncher(),
        inventory=lambda: (),
        observers=observers,
    )
    pool.start()
    try:
        yield pool
    finally:
        await pool.close()


def ask(
    pool: WorkerPool, text: str = "hi", name: str = "m", ticket: Ticket | None = None
) -> AsyncGenerator[ChatEvent, None]:
    request = ChatRequest(request_id="r", model=name, messages=(Message(role="user", content=text),))
    return pool.chat(request, ticket)


async def answer(
    pool: WorkerPool, text: str = "hi", name: str = "m", ticket: Ticket | None = None
) -> list[ChatEvent]:
    async with aclosing(ask(pool, text, name, ticket)) as events:
        return [event async for event in events]


async def text_of(pool: WorkerPool, text: str = "hi", name: str = "m") -> str:
    return "".join(event.text for event in await answer(pool, text, name) if isinstance(event, AnswerText))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  no event tells of what another task counts
            await asyncio.sleep(0.001)


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Let the clients leave."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
