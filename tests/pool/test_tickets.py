"""What the pool is told of a request beside its content, and what it tells in the end."""

from __future__ import annotations

import asyncio
import time

import pytest

from gallama.conversation import Failure
from gallama.errors import DeadlineExceeded, WorkerBusy
from gallama.pool.ticket import RequestRecord, Ticket
from tests.pool.fake_workers import FakeLauncher, answer, ask, end, model, running, text_of, until


class TestRecords:
    async def test_a_whole_answer_is_recorded_with_its_tokens_and_times(self) -> None:
        records: list[RequestRecord] = []
        mine: list[RequestRecord] = []
        async with running(model("m", ("x",)), observers=[records.append]) as pool:
            await answer(pool, name="x", ticket=Ticket(key_name="alice", on_end=mine.append))
        (record,) = records
        assert mine == [record]
        assert (record.model, record.instance, record.key_name) == ("m", 1, "alice")
        assert (record.outcome, record.error_code, record.tries) == ("completed", "", 1)
        assert (record.prompt_tokens, record.completion_tokens) == (1, 1)
        assert record.first_token_seconds is not None
        assert 0 <= record.queue_seconds <= record.first_token_seconds <= record.seconds

    async def test_a_client_that_leaves_is_recorded_as_cancelled(self) -> None:
        records: list[RequestRecord] = []
        async with running(model(), observers=[records.append]) as pool:
            events = ask(pool, "hang")
            await anext(events)
            await events.aclose()
        assert [(record.outcome, record.first_token_seconds) for record in records] == [("cancelled", None)]

    async def test_a_death_in_the_middle_is_recorded_as_failed(self) -> None:
        records: list[RequestRecord] = []
        async with running(model(), observers=[records.append]) as pool:
            await answer(pool, "die after")
        assert [(record.outcome, record.error_code) for record in records] == [("failed", "worker_died")]

    async def test_one_that_found_no_room_is_recorded_as_refused(self) -> None:
        records: list[RequestRecord] = []
        async with running(
            model(max_concurrent_requests=1, queue_limit=0), observers=[records.append]
        ) as pool:
            busy = asyncio.create_task(answer(pool, "hang"))
            await until(lambda: pool.find("m").busy == 1)
            with pytest.raises(WorkerBusy):
                await answer(pool)
            assert [(record.outcome, record.error_code) for record in records] == [
                ("refused", "model_overloaded")
            ]
            assert (records[0].instance, records[0].tries) == (None, 0)
            await end(busy)

    async def test_a_second_try_is_counted(self) -> None:
        records: list[RequestRecord] = []
        async with running(model(), observers=[records.append]) as pool:
            await answer(pool, "die before")
        assert [(record.outcome, record.tries) for record in records] == [("completed", 2)]

    async def test_an_observer_that_fails_costs_the_client_nothing(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(_: RequestRecord) -> None:
            raise RuntimeError("broken")

        async with running(model(), observers=[fail]) as pool:
            assert await text_of(pool) == "m: hi"
        assert "An observer failed on request r." in caplog.text


class TestDeadlines:
    async def test_one_that_passes_in_the_line_leaves_the_line(self) -> None:
        async with running(model(max_concurrent_requests=1)) as pool:
            busy = asyncio.create_task(answer(pool, "hang"))
            await until(lambda: pool.find("m").busy == 1)
            with pytest.raises(DeadlineExceeded):
                await answer(pool, ticket=Ticket(deadline=time.monotonic() + 0.05))
            assert pool.find("m").waiting == 0
            await end(busy)

    async def test_one_that_passes_before_the_answer_begins_is_an_error(self) -> None:
        async with running(model()) as pool:
            await pool.settled()
            with pytest.raises(DeadlineExceeded):
                await answer(pool, "slow before", ticket=Ticket(deadline=time.monotonic() + 0.05))
            assert pool.find("m").busy == 0

    async def test_one_that_passes_in_the_answer_ends_it_and_the_work(self) -> None:
        launcher = FakeLauncher()
        async with running(model(), launcher=launcher) as pool:
            await pool.settled()
            _, failure = await answer(pool, "hang", ticket=Ticket(deadline=time.monotonic() + 0.5))
            assert isinstance(failure, Failure)
            assert failure.error.code == "deadline_exceeded"
            await until(lambda: launcher.workers[0].busy == 0)
            assert pool.find("m").busy == 0

    async def test_one_that_has_passed_already_is_never_asked(self) -> None:
        launcher = FakeLauncher()
        async with running(model(max_concurrent_requests=1), launcher=launcher) as pool:
            busy = asyncio.create_task(answer(pool, "hang"))
            await until(lambda: bool(launcher.workers) and launcher.workers[0].asked == ["hang"])
            with pytest.raises(DeadlineExceeded):
                await answer(pool, ticket=Ticket(deadline=time.monotonic() - 1))
            assert launcher.workers[0].asked == ["hang"]
            await end(busy)

    async def test_one_that_does_not_pass_changes_nothing(self) -> None:
        async with running(model()) as pool:
            events = await answer(pool, ticket=Ticket(deadline=time.monotonic() + 60))
            assert len(events) == 3


async def test_a_ticket_knows_its_place_in_the_line() -> None:
    async with running(model(max_concurrent_requests=1)) as pool:
        busy = asyncio.create_task(answer(pool, "hang"))
        await until(lambda: pool.find("m").busy == 1)
        tickets = [Ticket() for _ in range(3)]
        waiting = [asyncio.create_task(answer(pool, "hang", ticket=ticket)) for ticket in tickets]
        await until(lambda: pool.find("m").waiting == 3)
        assert [ticket.position for ticket in tickets] == [1, 2, 3]
        await end(waiting[0])
        assert [ticket.position for ticket in tickets] == [None, 1, 2]
        await end(busy)
        await until(lambda: pool.find("m").waiting == 1)
        assert [ticket.position for ticket in tickets] == [None, None, 1]
        await end(*waiting)


class TestPromptTokens:
    async def test_too_many_that_wait_are_refused(self) -> None:
        async with running(model(max_concurrent_requests=1, queue_token_limit=1000)) as pool:
            busy = asyncio.create_task(answer(pool, "hang"))
            await until(lambda: pool.find("m").busy == 1)
            waiting = [asyncio.create_task(answer(pool, "word " * 400)) for _ in range(1)]
            await until(lambda: pool.find("m").waiting_tokens > 400)
            with pytest.raises(WorkerBusy, match="of at most 1000 tokens"):
                await answer(pool, "word " * 600)
            await end(busy, *waiting)
            assert pool.find("m").waiting_tokens == 0

    async def test_one_for_which_nobody_waits_is_taken_whatever_its_size(self) -> None:
        async with running(model(max_concurrent_requests=1, queue_token_limit=1)) as pool:
            busy = asyncio.create_task(answer(pool, "hang"))
            await until(lambda: pool.find("m").busy == 1)
            waiting = asyncio.create_task(text_of(pool, "word " * 600))
            await until(lambda: pool.find("m").waiting == 1)
            await end(busy)
            assert (await waiting).startswith("m: word")
