from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from gallama.conversation import (
    Accepted,
    AnswerText,
    ChatRequest,
    Completed,
    Constraint,
    Failure,
    Finished,
    Guarantee,
    LogprobEntry,
    Message,
    ToolArguments,
    ToolCall,
    ToolCallStarted,
    ToolChoice,
    ToolSpec,
    Usage,
)
from gallama.errors import ErrorReport, ReportedError
from gallama.generation import SamplingSettings
from gallama.wire import (
    MAX_FRAME_BYTES,
    BrokenLink,
    ChatCall,
    Hello,
    Link,
    Loading,
    StatusCall,
    TokenCall,
    WorkerReport,
    WorkerStatus,
    ask_for_token,
    ask_status,
    connect,
    listen,
    receive_call,
    stream_chat,
)

SECRET = "a secret"
REQUEST = ChatRequest(
    request_id="r-1",
    model="m",
    messages=(
        Message(role="user", content="héllo \u0000 😀"),
        Message(role="assistant", tool_calls=(ToolCall(id="c", name="f", arguments="{}"),)),
        Message(role="tool", content="", tool_call_id="c"),
    ),
    tools=(ToolSpec(name="f", parameters={"type": "object", "maximum": 2**64 - 1, "x": [None, -0.5]}),),
    tool_choice=ToolChoice(mode="required", allowed=("f",)),
    constraints=(Constraint(kind="json_schema", source={"enum": [1, "a", None]}, strict=True),),
    sampling=SamplingSettings(temperature=0.0, seed=-(2**63), logit_bias={7: -100.0}),
    stop=("a", "b"),
)
EVENTS = (
    Accepted(3),
    AnswerText(0, "hé", (LogprobEntry("h", b"h", -0.5, (("x", b"\xff", -1.0),)),)),
    ToolCallStarted(1, 0, "c", "f"),
    ToolArguments(1, 0, '{"a":'),
    Finished(
        0, "length", Guarantee(kind="tools", engine="e", complete=False, sampled_tokens=1, forced_tokens=2)
    ),
    Completed(Usage(prompt_tokens=1, completion_tokens=2)),
)


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "tcp":
        yield "tcp:127.0.0.1:0"
        return
    with tempfile.TemporaryDirectory(prefix="wire-") as directory:
        yield f"unix:{Path(directory) / 'worker.sock'}"


@contextlib.asynccontextmanager
async def answering(address: str, answer: Callable[[Link], Awaitable[None]]) -> AsyncIterator[str]:
    """Serve connections with `answer`; hangs up when it returns."""
    tasks: set[asyncio.Task[object] | None] = set()

    async def answer_and_close(link: Link) -> None:
        tasks.add(asyncio.current_task())
        try:
            await answer(link)
        finally:
            link.close()

    server, actual = await listen(address, answer_and_close)
    try:
        yield actual
    finally:
        server.close()
        for task in filter(None, tasks):
            task.cancel()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)


async def send_events(link: Link) -> None:
    await receive_call(link, SECRET)
    for event in EVENTS:
        await link.send(event)


async def test_a_request_arrives_as_it_was_sent(address: str) -> None:
    received = []

    async def answer(link: Link) -> None:
        received.append(await receive_call(link, SECRET))
        await link.send(EVENTS[-1])

    async with answering(address, answer) as actual:
        _ = [event async for event in stream_chat(actual, SECRET, REQUEST)]
    assert received == [ChatCall(REQUEST)]


async def test_events_arrive_in_order_and_end_with_the_last(address: str) -> None:
    async with answering(address, send_events) as actual:
        assert [event async for event in stream_chat(actual, SECRET, REQUEST)] == list(EVENTS)


async def test_a_failure_ends_the_stream(address: str) -> None:
    failure = Failure(ErrorReport(status=400, type="t", code="c", message="m", param="p"))

    async def answer(link: Link) -> None:
        await receive_call(link, SECRET)
        await link.send(failure)

    async with answering(address, answer) as actual:
        assert [event async for event in stream_chat(actual, SECRET, REQUEST)] == [failure]


async def test_a_wrong_secret_is_hung_up_on(address: str) -> None:
    async def answer(link: Link) -> None:
        with pytest.raises(BrokenLink, match="wrong secret"):
            await receive_call(link, SECRET)

    async with answering(address, answer) as actual:
        with pytest.raises(ConnectionError):
            await anext(stream_chat(actual, "another secret ä", REQUEST))


async def test_hanging_up_in_the_middle_is_a_connection_error(address: str) -> None:
    async def answer(link: Link) -> None:
        await receive_call(link, SECRET)
        await link.send(EVENTS[0])

    async with answering(address, answer) as actual:
        events = stream_chat(actual, SECRET, REQUEST)
        assert await anext(events) == EVENTS[0]
        with pytest.raises(BrokenLink):
            await anext(events)


async def test_closing_the_stream_is_seen_by_the_other_side_at_once(address: str) -> None:
    hung_up = asyncio.Event()

    async def answer(link: Link) -> None:
        await receive_call(link, SECRET)
        await link.send(EVENTS[0])
        await link.hung_up()
        hung_up.set()

    async with answering(address, answer) as actual:
        events = stream_chat(actual, SECRET, REQUEST)
        await anext(events)
        await events.aclose()
        await asyncio.wait_for(hung_up.wait(), 1)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
        (3).to_bytes(4, "big") + b"\xc1\xc1\xc1",
        (4).to_bytes(4, "big") + b"\x81\xa1a\x01",
    ],
    ids=["another protocol", "too long", "no msgpack", "no event"],
)
async def test_an_answer_that_is_no_frame_is_a_connection_error(garbage: bytes) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(garbage)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(BrokenLink):
        await anext(stream_chat(f"tcp:127.0.0.1:{port}", SECRET, REQUEST))
    server.close()
    await asyncio.sleep(0.05)


async def test_a_slow_reader_slows_the_writer_down(address: str) -> None:
    sent = 0

    async def answer(link: Link) -> None:
        nonlocal sent
        await receive_call(link, SECRET)
        while True:
            await link.send(AnswerText(0, "x" * 100_000))
            sent += 1

    async with answering(address, answer) as actual:
        events = stream_chat(actual, SECRET, REQUEST)
        await anext(events)
        await asyncio.sleep(0.2)
        assert sent < 200
        await events.aclose()


async def test_speaking_out_of_turn_is_taken_as_hanging_up(address: str) -> None:
    hung_up = asyncio.Event()

    async def answer(link: Link) -> None:
        await receive_call(link, SECRET)
        await link.hung_up()
        hung_up.set()

    async with answering(address, answer) as actual:
        link = await connect(actual)
        for message in (Hello(SECRET), StatusCall(), StatusCall()):
            await link.send(message)
        await asyncio.wait_for(hung_up.wait(), 1)
        link.close()


async def test_frames_may_be_cut_anywhere() -> None:
    frames = b"".join(len(raw).to_bytes(4, "big") + raw for raw in map(msgspec.msgpack.encode, EVENTS))
    rng = random.Random(0)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cuts = sorted(rng.sample(range(1, len(frames)), k=rng.randint(1, 20)))
        for begin, end in pairwise([0, *cuts, len(frames)]):
            writer.write(frames[begin:end])
            await asyncio.sleep(0.001)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    address = f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for _ in range(20):
        assert [event async for event in stream_chat(address, SECRET, REQUEST)] == list(EVENTS)
    server.close()
    await asyncio.sleep(0.05)


async def test_status_is_asked_and_told(address: str) -> None:
    status = WorkerStatus(busy_slots=1, waiting=2, cached_tokens=3)

    async def answer(link: Link) -> None:
        assert await receive_call(link, SECRET) == StatusCall()
        await link.send(status)

    async with answering(address, answer) as actual:
        assert await ask_status(actual, SECRET) == status


async def test_nobody_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        await connect(f"unix:{tmp_path}/nobody")


async def test_a_token_is_asked_for_and_the_status_is_told(address: str) -> None:
    status = WorkerStatus(busy_slots=0, waiting=0, cached_tokens=0, steps=1)

    async def answer(link: Link) -> None:
        assert await receive_call(link, SECRET) == TokenCall()
        await link.send(status)

    async with answering(address, answer) as actual:
        assert await ask_for_token(actual, SECRET) == status


async def test_a_token_that_cannot_be_had_is_told_with_its_reason(address: str) -> None:
    report = ErrorReport(status=500, type="server_error", code="internal_error", message="No GPU.")

    async def answer(link: Link) -> None:
        await receive_call(link, SECRET)
        await link.send(Failure(report))

    async with answering(address, answer) as actual:
        with pytest.raises(ReportedError) as refused:
            await ask_for_token(actual, SECRET)
    assert refused.value.report() == report


async def test_a_status_that_is_far_too_long_is_not_read(address: str) -> None:
    async def answer(link: Link) -> None:
        await receive_call(link, SECRET)
        await link.send(AnswerText(0, "x" * 100_000))

    async with answering(address, answer) as actual:
        with pytest.raises(BrokenLink, match="at most 65536"):
            await ask_status(actual, SECRET)


def test_progress_of_a_load_is_a_line_of_json_and_may_be_left_out() -> None:
    decode = msgspec.json.Decoder[WorkerReport](WorkerReport).decode
    assert decode(msgspec.json.encode(Loading(0.5))) == Loading(0.5)
    assert decode(b'{"type": "Loading"}') == Loading(0.0)
