"""The gateway: an ASGI application over a pool of workers, and the process that runs both."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
from collections.abc import Iterator, Sequence

import uvicorn
from fastapi import FastAPI

from gallama import event_loop
from gallama.api import (
    explain,
    health,
    management,
    metrics,
    models,
    openai_chat,
    openai_completions,
    openai_embeddings,
    rerank,
    simple,
    status_page,
    tokens,
)
from gallama.api.auth import KeyCheck, LimitCheck, LoopbackCheck
from gallama.api.error_answers import answer_errors
from gallama.api.http_protocol import (
    IDLE_SECONDS,
    MAX_HEAD_BYTES,
    SurplusCheck,
    protocol_for,
    watch_connections,
)
from gallama.api.keys import KeyRing
from gallama.api.open_files import make_room
from gallama.api.request_bodies import MAX_BODIES, BodyRoom
from gallama.api.request_id import RequestIds
from gallama.api.request_log import log_request
from gallama.api.tracing import TraceParents, Tracing, start_tracing
from gallama.catalog import ResolvedModel
from gallama.config import ServerConfig
from gallama.errors import InvalidConfig
from gallama.pool.pool import WorkerPool

logger = logging.getLogger(__name__)

_LAST_WORDS_SECONDS = 15
"""How long clients may take to read the error that has ended their answers."""

SURFACES = (
    openai_chat.router,
    openai_completions.router,
    openai_embeddings.router,
    rerank.router,
    tokens.router,
    simple.router,
    explain.router,
    models.router,
    management.router,
    health.router,
    metrics.router,
    status_page.router,
)
"""Everything that answers requests."""


def create_app(pool: WorkerPool, config: ServerConfig, tracing: Tracing | None = None) -> FastAPI:
    """The application; whoever makes it starts and closes the pool and the tracing.

    Raises:
        InvalidConfig: the keys file is not there or wrong.
    """
    # No pages of documentation: they load scripts from other servers.
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.pool = pool
    app.state.config = config
    app.state.keys = KeyRing(config)
    app.state.body_room = BodyRoom(MAX_BODIES * config.max_body_bytes)
    app.state.metrics = metrics.Metrics(lambda: pool.models, lambda: pool.gpus)
    app.state.status = status_page.Status(pool)
    pool.add_observer(app.state.metrics.record)
    pool.add_observer(log_request)
    for router in SURFACES:
        app.include_router(router)
    answer_errors(app)
    # The one added last sees a request first.
    app.add_middleware(LimitCheck)
    app.add_middleware(KeyCheck, keys=app.state.keys)
    app.add_middleware(LoopbackCheck, host=config.host)
    app.add_middleware(SurplusCheck)
    app.add_middleware(RequestIds)
    if tracing is not None:
        pool.add_observer(tracing.record)
        app.add_middleware(TraceParents)
    return app


def run_gateway(
    config: ServerConfig, models_to_load: Sequence[ResolvedModel], models_on_demand: Sequence[ResolvedModel]
) -> int:
    """Serve until SIGINT or SIGTERM; a second one ends running streams at once.

    Returns:
        The exit status: 1 when none of `models_to_load` could be loaded.

    Raises:
        InvalidConfig: the address cannot be listened on, the models' names clash, the keys file is wrong,
            or the system does not allow as many connections as asked for.
        MissingExtra: traces are asked for, and what makes them is not installed.
    """
    pool = WorkerPool(models_to_load, models_on_demand, config=config)
    with _bind(config.host, config.port) as listener:
        return event_loop.run(_serve(pool, config, listener))


async def _serve(pool: WorkerPool, config: ServerConfig, listener: socket.socket) -> int:
    max_connections = make_room(config)
    tracing = start_tracing(os.environ)
    server = _Server(
        uvicorn.Config(
            create_app(pool, config, tracing),
            # One parser everywhere, one that bounds the headers, and that does not lose the body of a request
            # which offers to go on in another protocol: Java's clients offer HTTP/2.
            http=protocol_for(max_connections),
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_keep_alive=IDLE_SECONDS,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=math.ceil(config.drain_seconds) + _LAST_WORDS_SECONDS,
        ),
        pool,
        drain_seconds=config.drain_seconds,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_not_our_own_cut)
    pool.start()
    watching = asyncio.create_task(_stop_if_nothing_loads(pool, server))
    at_the_door = asyncio.create_task(watch_connections(server.server_state.connections))
    try:
        print(f"gallama listens on {_url(listener)}", flush=True)
        await server.serve(sockets=[listener])
        return 1 if watching.done() and watching.result() else 0
    finally:
        watching.cancel()
        at_the_door.cancel()
        await pool.close()
        if tracing is not None:
            await tracing.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, pool: WorkerPool, *, drain_seconds: float) -> None:
        super().__init__(config)
        self._pool = pool
        self._drain_seconds = drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but what has not ended after `drain_seconds` ends with an error that its client can
        read, not with a connection that breaks."""
        shutting_down = asyncio.create_task(super().shutdown(sockets))
        await asyncio.wait({shutting_down}, timeout=self._drain_seconds)
        await self._pool.close()
        await shutting_down

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but any second signal hurries, and none is raised again when all is done:
        workers are to be stopped in peace."""
        names = [name for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
        previous = {name: signal.signal(getattr(signal, name), self._take_signal) for name in names}
        try:
            yield
        finally:
            for name, handler in previous.items():
                signal.signal(getattr(signal, name), handler)

    def _take_signal(self, _number: int, _frame: object) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


async def _stop_if_nothing_loads(pool: WorkerPool, server: uvicorn.Server) -> bool:
    """Ends the server when all models that it was started for have failed to load; says whether it did."""
    states = await pool.settled()
    if not states or any(state != "failed" for state in states):
        return False
    logger.error("No model could be loaded; the server ends.")
    server.should_exit = True
    return True


def _bind(host: str, port: int) -> socket.socket:
    """
    Raises:
        InvalidConfig: the address is not ours, or taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        way_out = "Choose another with --port; 0 takes a free one." if port else "Choose another --host."
        raise InvalidConfig(f"Cannot listen on {host} port {port}: {error.strerror}. {way_out}") from error
    # Accepted connections inherit it: a token must not wait until the client acknowledges the one before it.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_not_our_own_cut(record: logging.LogRecord) -> bool:
    """False for uvicorn's complaints about streams that are ended in the middle on purpose: after an error,
    or because the server ends."""
    is_cancelled = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not is_cancelled and record.msg != "ASGI callable returned without completing response."
