"""The pool: names, the line, and workers that die. On workers that run inside the test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from gallama.catalog import ResolvedModel
from gallama.config.model_spec import ModelType
from gallama.conversation import Accepted, AnswerText, Failure
from gallama.embedding import Embeddings, EmbedRequest
from gallama.errors import (
    DeadlineExceeded,
    GallamaError,
    InvalidConfig,
    ModelLoadFailed,
    ModelNotFound,
    ReportedError,
    UnsupportedValue,
    WorkerBusy,
    WorkerDied,
)
from gallama.pool import supervisor
from gallama.pool.pool import MAX_TRIES, WorkerPool
from gallama.pool.supervisor import Backoff
from gallama.pool.ticket import RequestRecord, Ticket
from gallama.wire import UnaryReply
from tests.pool.fake_workers import DONE, FakeLauncher, answer, ask, model, running, text_of, until


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backoff, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(supervisor, "_EXIT_NOTICE_SECONDS", 0.05)


async def test_a_request_is_answered() -> None:
    async with running(model()) as pool:
        assert await answer(pool) == [Accepted(1), AnswerText(0, "m: hi"), DONE]


async def test_every_worker_is_stopped_at_the_end() -> None:
    launcher = FakeLauncher()
    async with running(model("a"), model("b"), model("b"), launcher=launcher) as pool:
        await pool.settled()
    assert launcher.stopped == len(launcher.workers) == 3


async def test_requests_wait_while_the_model_loads() -> None:
    launcher = FakeLauncher()
    launcher.may_load.clear()
    async with running(model(), launcher=launcher) as pool:
        asking = asyncio.create_task(text_of(pool))
        await asyncio.sleep(0.02)
        assert pool.find("m").waiting == 1
        launcher.may_load.set()
        assert await asking == "m: hi"


class TestNames:
    async def test_a_model_answers_to_its_name_and_its_aliases(self) -> None:
        async with running(model("a", ("x",)), model("b")) as pool:
            assert [pool.find(name).name for name in ("a", "x", "b")] == ["a", "a", "b"]

    async def test_an_unknown_name_is_answered_by_the_only_model(self) -> None:
        async with running(model("a")) as pool:
            assert await text_of(pool, name="gpt-4") == "a: hi"

    async def test_an_unknown_name_is_answered_by_the_only_loaded_model(self) -> None:
        async with running(model("a"), on_demand=(model("b"),)) as pool:
            assert pool.find("gpt-4").name == "a"

    async def test_with_several_loaded_models_an_unknown_name_is_not_found(self) -> None:
        async with running(model("a"), model("b")) as pool:
            with pytest.raises(ModelNotFound, match="gpt-4"):
                await answer(pool, name="gpt-4")

    async def test_a_strict_server_answers_only_to_known_names(self) -> None:
        async with running(model("a", ("x",)), strict=True) as pool:
            assert pool.find("x").name == "a"
            with pytest.raises(ModelNotFound):
                pool.find("gpt-4")

    async def test_a_strict_model_answers_only_to_its_names(self) -> None:
        async with running(model("a", strict=True)) as pool:
            with pytest.raises(ModelNotFound):
                pool.find("gpt-4")

    async def test_an_unknown_name_is_answered_by_the_only_model_of_the_kind_that_is_asked(self) -> None:
        async with running(model("a"), model("e", model_type="embedding")) as pool:
            assert pool.identify("gpt-4").name == "a"
            assert pool.identify("ada", "embedding").name == "e"
            with pytest.raises(ModelNotFound):
                pool.identify("any", None)

    @pytest.mark.parametrize(
        ("name", "model_type", "way_out"), [("e", "llm", "/v1/embeddings"), ("a", "embedding", "/v1/chat")]
    )
    async def test_a_model_that_is_for_something_else_says_where_to_ask_it(
        self, name: str, model_type: ModelType, way_out: str
    ) -> None:
        async with running(model("a"), model("e", model_type="embedding")) as pool:
            with pytest.raises(UnsupportedValue, match=way_out) as error:
                pool.identify(name, model_type)
            assert error.value.param == "model"

    def test_an_alias_that_means_two_models_is_refused(self) -> None:
        for models in ([model("a", ("x",)), model("b", ("x",))], [model("a", ("b",)), model("b")]):
            with pytest.raises(InvalidConfig, match="belongs to two models"):
                WorkerPool(models)


def embed(
    pool: WorkerPool, text: str = "hi", ticket: Ticket | None = None
) -> Coroutine[Any, Any, UnaryReply]:
    return pool.ask(EmbedRequest(request_id="r", model="e", inputs=(text,)), ticket)


def embedder(**values: Any) -> ResolvedModel:
    return model("e", model_type="embedding", **values)


class TestWhatIsAnsweredAtOnce:
    async def test_it_is_answered_and_recorded(self) -> None:
        records: list[RequestRecord] = []
        async with running(embedder(), observers=[records.append]) as pool:
            assert await embed(pool) == Embeddings(vectors=(b"e: hi",), prompt_tokens=7)
        (record,) = records
        assert (record.outcome, record.prompt_tokens, record.completion_tokens) == ("completed", 7, 0)

    async def test_a_refusal_of_the_worker_is_heard_and_recorded(self) -> None:
        records: list[RequestRecord] = []
        async with running(embedder(), observers=[records.append]) as pool:
            with pytest.raises(ReportedError, match="No"):
                await embed(pool, "refuse")
        assert (records[0].outcome, records[0].error_code) == ("failed", "invalid_value")

    async def test_another_worker_is_asked_where_one_dies(self) -> None:
        launcher = FakeLauncher()
        async with running(embedder(), launcher=launcher) as pool:
            assert await embed(pool, "die") == Embeddings(vectors=(b"e: die",), prompt_tokens=7)
        assert len(launcher.workers) == 2

    async def test_after_some_dead_workers_it_is_given_up(self) -> None:
        launcher = FakeLauncher()
        launcher.bad_workers = MAX_TRIES
        async with running(embedder(), launcher=launcher) as pool:
            with pytest.raises(WorkerDied):
                await embed(pool, "die")

    async def test_a_client_that_leaves_gives_its_slot_back(self) -> None:
        launcher = FakeLauncher()
        async with running(embedder(max_concurrent_requests=1), launcher=launcher) as pool:
            hanging = asyncio.create_task(embed(pool, "hang"))
            await until(lambda: bool(launcher.workers) and launcher.workers[0].busy == 1)
            waiting = asyncio.create_task(embed(pool))
            await until(lambda: pool.find("e").waiting == 1)
            hanging.cancel()
            assert await waiting == Embeddings(vectors=(b"e: hi",), prompt_tokens=7)
            await asyncio.gather(hanging, return_exceptions=True)
            assert pool.find("e").busy == 0

    async def test_its_deadline_ends_it(self) -> None:
        async with running(embedder()) as pool:
            await embed(pool)
            with pytest.raises(DeadlineExceeded):
                await embed(pool, "hang", Ticket(deadline=time.monotonic() + 0.05))
            assert pool.find("e").busy == 0


class TestAdmission:
    async def test_no_more_than_the_limit_run_at_the_same_time(self) -> None:
        launcher = FakeLauncher()
        async with running(model(max_concurrent_requests=2), launcher=launcher) as pool:
            tasks = [asyncio.create_task(answer(pool, "hang")) for _ in range(3)]
            await until(lambda: bool(launcher.workers) and launcher.workers[0].busy == 2)
            assert pool.find("m").waiting == 1
            tasks[0].cancel()
            await until(lambda: len(launcher.workers[0].asked) == 3)
            assert pool.find("m").busy == 2
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert pool.find("m").busy == 0

    async def test_those_who_wait_are_served_in_their_order(self) -> None:
        launcher = FakeLauncher()
        async with running(model(max_concurrent_requests=1), launcher=launcher) as pool:
            first = asyncio.create_task(answer(pool, "hang"))
            await until(lambda: bool(launcher.workers) and launcher.workers[0].busy == 1)
            others = [asyncio.create_task(answer(pool, str(i))) for i in range(5)]
            await asyncio.sleep(0)
            first.cancel()
            await asyncio.gather(*others)
        assert launcher.workers[0].asked == ["hang", "0", "1", "2", "3", "4"]

    async def test_a_full_queue_is_refused_with_a_time_to_try_again(self) -> None:
        async with running(model(max_concurrent_requests=1, queue_limit=1)) as pool:
            tasks = [asyncio.create_task(answer(pool, "hang")) for _ in range(2)]
            await until(lambda: pool.find("m").waiting == 1)
            with pytest.raises(WorkerBusy) as refused:
                await answer(pool)
            assert refused.value.retry_after_seconds is not None
            assert refused.value.retry_after_seconds >= 1
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert await text_of(pool) == "m: hi"

    async def test_who_leaves_the_queue_frees_its_place(self) -> None:
        async with running(model(max_concurrent_requests=1, queue_limit=1)) as pool:
            running_task = asyncio.create_task(answer(pool, "hang"))
            await until(lambda: pool.find("m").busy == 1)
            waiting = asyncio.create_task(answer(pool))
            await until(lambda: pool.find("m").waiting == 1)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert pool.find("m").waiting == 0
            running_task.cancel()
            await asyncio.gather(running_task, return_exceptions=True)

    async def test_a_slot_given_to_one_who_leaves_in_that_moment_is_not_lost(self) -> None:
        async with running(model(max_concurrent_requests=1)) as pool:
            holder = asyncio.create_task(answer(pool, "hang"))
            await until(lambda: pool.find("m").busy == 1)
            leaving = asyncio.create_task(answer(pool))
            await until(lambda: pool.find("m").waiting == 1)
            holder.cancel()
            while pool.find("m").waiting:  # noqa: ASYNC110  the very turn of the loop matters
                await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.gather(holder, leaving, return_exceptions=True)
            assert pool.find("m").busy == 0
            assert await text_of(pool) == "m: hi"

    async def test_closing_a_stream_frees_its_slot_in_the_worker(self) -> None:
        launcher = FakeLauncher()
        async with running(model(), launcher=launcher) as pool:
            events = ask(pool, "hang")
            await anext(events)
            assert launcher.workers[0].busy == 1
            await events.aclose()
            await until(lambda: launcher.workers[0].busy == 0)
            assert pool.find("m").busy == 0

    async def test_two_instances_share_the_work(self) -> None:
        launcher = FakeLauncher()
        async with running(model(), model(), launcher=launcher, policy="least_busy") as pool:
            await pool.settled()
            for _ in range(4):
                await answer(pool)
        assert [len(worker.asked) for worker in launcher.workers] == [2, 2]


class TestDeath:
    async def test_a_request_whose_worker_dies_before_it_began_is_asked_again(self) -> None:
        launcher = FakeLauncher()
        async with running(model(), launcher=launcher) as pool:
            assert await text_of(pool, "die before") == "m: die before"
        assert len(launcher.workers) == 2

    async def test_a_request_that_ends_every_worker_is_given_up(self) -> None:
        launcher = FakeLauncher()
        launcher.bad_workers = MAX_TRIES
        async with running(model(), launcher=launcher) as pool:
            with pytest.raises(WorkerDied):
                await answer(pool, "die before")
            assert await text_of(pool) == "m: hi"

    async def test_a_request_whose_worker_dies_in_the_middle_ends_in_a_failure(self) -> None:
        async with running(model()) as pool:
            accepted, failure = await answer(pool, "die after")
            assert accepted == Accepted(1)
            assert isinstance(failure, Failure)
            assert (failure.error.status, failure.error.code) == (503, "worker_died")
            assert await text_of(pool) == "m: hi"

    async def test_while_one_instance_restarts_the_other_answers(self) -> None:
        launcher = FakeLauncher()
        async with running(model(), model(), launcher=launcher) as pool:
            await pool.settled()
            launcher.may_load.clear()
            launcher.workers[0].die()
            await until(lambda: "restarting" in pool.find("m").states)
            assert await text_of(pool) == "m: hi"

    async def test_a_broken_connection_does_not_condemn_a_living_worker(self) -> None:
        launcher = FakeLauncher()
        async with running(model(), launcher=launcher) as pool:
            await pool.settled()
            supervised = pool._queues["m"].instances[0].supervisor
            assert supervised.endpoint is not None
            supervised.suspect(supervised.endpoint)
            assert pool.find("m").states == ("restarting",)
            assert await text_of(pool) == "m: hi"
        assert len(launcher.workers) == 1


class TestFailedLoads:
    async def test_the_workers_own_reason_is_the_answer(self) -> None:
        launcher = FakeLauncher()
        launcher.load_errors = [ModelLoadFailed("Not enough memory.")]
        async with running(model(), launcher=launcher) as pool:
            assert await pool.settled() == ["failed"]
            with pytest.raises(GallamaError, match="Not enough memory") as raised:
                await answer(pool)
            assert raised.value.report().status == 503
            assert pool.find("m").problem == "Not enough memory."

    async def test_those_who_wait_for_the_load_hear_of_it(self) -> None:
        launcher = FakeLauncher()
        launcher.load_errors = [ModelLoadFailed("Not enough memory.")]
        async with running(on_demand=(model(),), launcher=launcher) as pool:
            results = await asyncio.gather(*(answer(pool) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, ReportedError) for result in results)

    async def test_a_failed_load_is_tried_again_by_a_request_only_after_a_delay(self) -> None:
        launcher = FakeLauncher()
        launcher.load_errors = [ModelLoadFailed("Not enough memory.")]
        async with running(model(), launcher=launcher) as pool:
            await pool.settled()
            for _ in range(10):
                with pytest.raises(ReportedError):
                    await answer(pool)
            assert len(launcher.workers) == 1
            await asyncio.sleep(Backoff.FIRST_SECONDS)
            assert await text_of(pool) == "m: hi"

    async def test_one_instance_that_failed_does_not_stop_the_other(self) -> None:
        launcher = FakeLauncher()
        launcher.load_errors = [ModelLoadFailed("Not enough memory.")]
        async with running(model(), model(), launcher=launcher) as pool:
            assert sorted(await pool.settled()) == ["failed", "ready"]
            assert await text_of(pool) == "m: hi"


def test_the_delay_doubles_up_to_a_limit_and_starts_anew_after_a_stable_run() -> None:
    backoff = Backoff()
    delays = [backoff.next_delay(ran_seconds=1) for _ in range(12)]
    assert delays[:3] == [0.05, 0.1, 0.2]
    assert delays[-1] == Backoff.LONGEST_SECONDS
    assert backoff.next_delay(ran_seconds=61) == 0.05
