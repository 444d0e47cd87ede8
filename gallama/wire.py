"""Frames between gateway and worker. Nothing here knows HTTP or an engine.

One connection per request:

    gateway -> worker    Hello, then one Call
    worker -> gateway    ChatEvents up to Completed or Failure; or one WorkerStatus or UnaryReply,
                         or a Failure in its place

    frame := length (4 bytes, big end first), one struct as msgpack

Hanging up cancels, on either side. The same frames go over a Unix socket ("unix:/tmp/x/worker.sock") and,
where there are none, over TCP ("tcp:127.0.0.1:5001"). The secret keeps the machine's other users out.

A worker learns what to load from one line of JSON (`WorkerOrder`) on its standard input, which the gateway
keeps open as long as it lives. How far it is, it tells in lines of JSON (`WorkerReport`) on its output.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

import msgspec
from msgspec import Struct

from gallama.conversation import ChatEvent, ChatRequest, Completed, Failure
from gallama.embedding import Embeddings, EmbedRequest, Relevances, RerankRequest
from gallama.errors import ErrorReport, ReportedError, RequestTooLarge
from gallama.tokenization import DetokenizedText, DetokenizeRequest, TokenizedText, TokenizeRequest

MAX_FRAME_BYTES = 256 * 2**20
_MAX_HELLO_BYTES = 4096
_MAX_STATUS_BYTES = 2**16
_READ_BYTES = 2**16
_LENGTH = struct.Struct(">I")

T = TypeVar("T")

UnaryRequest = EmbedRequest | RerankRequest | TokenizeRequest | DetokenizeRequest
"""What is answered all at once."""
UnaryReply = Embeddings | Relevances | TokenizedText | DetokenizedText


class Hello(Struct, frozen=True, tag=True):
    secret: str


class ChatCall(Struct, frozen=True, tag=True):
    request: ChatRequest


class UnaryCall(Struct, frozen=True, tag=True):
    request: UnaryRequest


class StatusCall(Struct, frozen=True, tag=True):
    """Asks for a WorkerStatus; a worker that answers is alive, though its engine may not be."""


class TokenCall(Struct, frozen=True, tag=True):
    """Asks for a WorkerStatus once the engine has computed a token, which nobody gets."""


Call = ChatCall | UnaryCall | StatusCall | TokenCall


class WorkerStatus(Struct, frozen=True, tag=True, kw_only=True):
    """What the worker's engine is doing now, as in `generation.EngineStatus`."""

    busy_slots: int
    waiting: int
    cached_tokens: int
    steps: int = 0
    slow_readers: int = 0
    """Answers that go on only when the gateway has read what there is of them."""
    processor_seconds: float = 0.0
    """Processor time that the process has taken since its start, on all cores together."""
    sampled_tokens: int = 0
    forced_tokens: int = 0
    drafted_tokens: int = 0
    accepted_draft_tokens: int = 0


class WorkerOrder(Struct, frozen=True, kw_only=True):
    """What a new process is to serve, and where."""

    model_name: str
    model_path: str
    spec: str
    """A ModelSpec as JSON."""
    address: str
    """Where to listen; port 0 in a TCP address means any free port."""
    secret: str
    log_level: int
    """As in the standard library's logging."""


class Loading(Struct, frozen=True, tag=True):
    """The process runs and has understood its order. Said again and again until it is ready."""

    fraction: float = 0.0
    """The part of the model that is loaded, 0 to 1."""


class Ready(Struct, frozen=True, tag=True, kw_only=True):
    """The model is loaded and the worker listens."""

    address: str
    context_length: int


class LoadFailed(Struct, frozen=True, tag=True):
    """The model cannot be loaded; the process ends."""

    error: ErrorReport


WorkerReport = Loading | Ready | LoadFailed

CALLS: msgspec.msgpack.Decoder[Call] = msgspec.msgpack.Decoder(Call)
_HELLOS = msgspec.msgpack.Decoder(Hello)
_EVENTS: msgspec.msgpack.Decoder[ChatEvent] = msgspec.msgpack.Decoder(ChatEvent)
_STATUSES: msgspec.msgpack.Decoder[WorkerStatus | Failure] = msgspec.msgpack.Decoder(WorkerStatus | Failure)
_REPLIES: msgspec.msgpack.Decoder[UnaryReply | Failure] = msgspec.msgpack.Decoder(UnaryReply | Failure)
_ENCODER = msgspec.msgpack.Encoder()


class BrokenLink(ConnectionError):
    """The other side hung up, or what it says is not our protocol."""


class Link:
    """One connection. Whoever has it closes it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._unread = bytearray()
        """What was received behind the last frame."""

    async def send(self, message: Struct) -> None:
        """Send one frame; waits while the other side is slow to read.

        Raises:
            RequestTooLarge: the frame would be longer than the other side reads.
            ConnectionError: the other side hung up.
        """
        payload = _ENCODER.encode(message)
        if len(payload) > MAX_FRAME_BYTES:
            raise RequestTooLarge(
                f"The message has {len(payload)} bytes; at most {MAX_FRAME_BYTES} go to a worker."
            )
        if self._writer.is_closing():
            raise BrokenLink("The other side hung up.")  # uvloop's own error is none of a connection
        self._writer.write(_LENGTH.pack(len(payload)) + payload)
        await self._writer.drain()

    async def receive(self, decoder: msgspec.msgpack.Decoder[T], *, max_bytes: int = MAX_FRAME_BYTES) -> T:
        """The next frame.

        Raises:
            BrokenLink: hung up, longer than `max_bytes`, or not what `decoder` reads.
        """
        await self._fill(_LENGTH.size)
        (length,) = _LENGTH.unpack_from(self._unread)
        if length > max_bytes:
            raise BrokenLink(f"A frame of {length} bytes came; at most {max_bytes} are read.")
        end = _LENGTH.size + length
        await self._fill(end)
        payload = self._unread[_LENGTH.size : end]
        del self._unread[:end]
        try:
            return decoder.decode(payload)
        except msgspec.DecodeError as error:
            raise BrokenLink(f"The other side does not speak our protocol: {error}") from error

    async def _fill(self, size: int) -> None:
        """Have so many bytes to take apart. All that has come is read at once: mostly that is a whole frame.

        Raises:
            BrokenLink: hung up.
        """
        while len(self._unread) < size:
            received = await self._reader.read(_READ_BYTES)
            if not received:
                raise BrokenLink("The other side hung up.")
            self._unread += received

    async def hung_up(self) -> None:
        """Return once the other side hangs up, or says something although it is not its turn."""
        with contextlib.suppress(ConnectionError):
            await self._fill(1)

    def close(self) -> None:
        """Hang up; what was sent before still arrives."""
        self._writer.close()


async def connect(address: str) -> Link:
    """Connect to a worker.

    Raises:
        OSError: nobody listens there.
    """
    kind, _, place = address.partition(":")
    if kind == "unix":
        return Link(*await asyncio.open_unix_connection(place))
    host, _, port = place.rpartition(":")
    return Link(*await asyncio.open_connection(host, int(port)))


async def listen(address: str, answer: Callable[[Link], Awaitable[None]]) -> tuple[asyncio.Server, str]:
    """Answer connections until the server is closed; returns it and where it listens in truth."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Before Python 3.12 asyncio logs a cancelled connection as if it had failed.
        with contextlib.suppress(asyncio.CancelledError):
            await answer(Link(reader, writer))

    kind, _, place = address.partition(":")
    if kind == "unix":
        return await asyncio.start_unix_server(connected, place), address
    host, _, port = place.rpartition(":")
    server = await asyncio.start_server(connected, host, int(port))
    return server, f"tcp:{host}:{server.sockets[0].getsockname()[1]}"


async def receive_call(link: Link, secret: str) -> Call:
    """The worker's side of a connection's beginning.

    Raises:
        BrokenLink: the secret is wrong, or the other side does not speak our protocol.
    """
    hello = await link.receive(_HELLOS, max_bytes=_MAX_HELLO_BYTES)
    if not hmac.compare_digest(hello.secret.encode(), secret.encode()):
        raise BrokenLink("A connection came with a wrong secret.")
    return await link.receive(CALLS)


async def stream_chat(address: str, secret: str, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
    """Ask a worker; its events up to Completed or Failure. Closing the generator cancels the request.

    Raises:
        OSError: the worker cannot be reached, or hung up before the end.
    """
    link = await connect(address)
    try:
        await link.send(Hello(secret))
        await link.send(ChatCall(request))
        event: ChatEvent | None = None
        while not isinstance(event, Completed | Failure):
            event = await link.receive(_EVENTS)
            yield event
    finally:
        link.close()


async def ask(address: str, secret: str, request: UnaryRequest) -> UnaryReply:
    """Ask a worker what is answered all at once. Cancelling cancels the request.

    Raises:
        ReportedError: the request was refused, or failed.
        OSError: the worker cannot be reached, or hung up.
    """
    return await _call(address, secret, UnaryCall(request), _REPLIES, MAX_FRAME_BYTES)


async def ask_status(address: str, secret: str) -> WorkerStatus:
    """Ask a worker what it is doing.

    Raises:
        OSError: the worker cannot be reached, or hung up.
    """
    return await _call(address, secret, StatusCall(), _STATUSES, _MAX_STATUS_BYTES)


async def ask_for_token(address: str, secret: str) -> WorkerStatus:
    """Have a worker's engine compute a token; what the worker is doing then.

    Raises:
        ReportedError: the engine failed.
        OSError: the worker cannot be reached, or hung up.
    """
    return await _call(address, secret, TokenCall(), _STATUSES, _MAX_STATUS_BYTES)


async def _call(
    address: str, secret: str, call: Call, answers: msgspec.msgpack.Decoder[T | Failure], max_bytes: int
) -> T:
    link = await connect(address)
    try:
        await link.send(Hello(secret))
        await link.send(call)
        answer = await link.receive(answers, max_bytes=max_bytes)
    finally:
        link.close()
    if isinstance(answer, Failure):
        raise ReportedError(answer.error)
    return answer
