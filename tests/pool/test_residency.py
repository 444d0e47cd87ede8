"""Which models are loaded: on demand, within limits, and who leaves for whom."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from gallama.errors import InvalidConfig, ModelLoadFailed, ReportedError, WorkerUnavailable
from gallama.pool import residency
from gallama.pool.gpus import Gpu
from gallama.pool.pool import WorkerPool
from gallama.pool.supervisor import Backoff
from tests.pool.fake_workers import FakeLauncher, answer, end, model, running, text_of, until


def loaded(pool: WorkerPool) -> list[str]:
    return [served.name for served in pool.models if served.is_loaded]


async def test_a_model_is_loaded_by_its_first_request() -> None:
    launcher = FakeLauncher()
    async with running(on_demand=(model("a"), model("b")), launcher=launcher) as pool:
        assert pool.find("b").states == ("unloaded",)
        assert await text_of(pool, name="b") == "b: hi"
        assert [worker.model.name for worker in launcher.workers] == ["b"]


async def test_requests_at_once_share_one_load() -> None:
    launcher = FakeLauncher()
    async with running(on_demand=(model("a"),), launcher=launcher) as pool:
        texts = await asyncio.gather(*(text_of(pool, name="a") for _ in range(5)))
    assert texts == ["a: hi"] * 5
    assert len(launcher.workers) == 1


async def test_without_auto_load_a_request_hears_how_to_load_the_model() -> None:
    async with running(on_demand=(model("a"),), auto_load=False) as pool:
        with pytest.raises(WorkerUnavailable, match="add_model") as refused:
            await answer(pool, name="a")
        assert refused.value.report().code == "model_not_loaded"
        assert loaded(pool) == []


def test_more_models_at_the_start_than_may_be_loaded_are_refused() -> None:
    async def start() -> None:
        async with running(model("a"), model("b"), max_loaded_models=1):
            pass

    with pytest.raises(InvalidConfig, match="`max_loaded_models` is 1, but 2 models"):
        asyncio.run(start())


class TestRoomForOne:
    async def test_an_idle_model_leaves_for_one_that_is_asked_for(self) -> None:
        launcher = FakeLauncher()
        async with running(
            on_demand=(model("a"), model("b")), launcher=launcher, max_loaded_models=1
        ) as pool:
            assert await text_of(pool, name="a") == "a: hi"
            assert await text_of(pool, name="b") == "b: hi"
            assert loaded(pool) == ["b"]
            assert launcher.stopped == 1

    async def test_a_busy_one_does_not(self) -> None:
        launcher = FakeLauncher()
        async with running(
            on_demand=(model("a"), model("b")), launcher=launcher, max_loaded_models=1
        ) as pool:
            busy = asyncio.create_task(answer(pool, "hang", name="a"))
            await until(lambda: pool.find("a").busy == 1)
            asking = asyncio.create_task(text_of(pool, name="b"))
            await asyncio.sleep(0.05)
            assert (loaded(pool), launcher.stopped) == (["a"], 0)
            assert pool.find("b").states == ("queued",)
            await end(busy)
            assert await asking == "b: hi"

    async def test_a_pinned_one_does_not(self) -> None:
        async with running(on_demand=(model("a", pinned=True), model("b")), max_loaded_models=1) as pool:
            await answer(pool, name="a")
            with pytest.raises(WorkerUnavailable, match=r"`max_loaded_models` is 1, and .* pinned \(a\)"):
                await answer(pool, name="b")
            assert (loaded(pool), pool.find("b").waiting) == (["a"], 0)

    async def test_none_leaves_before_it_has_stayed_for_a_while(self) -> None:
        async with running(
            on_demand=(model("a"), model("b")), max_loaded_models=1, minimum_stay_seconds=0.3
        ) as pool:
            await answer(pool, name="a")
            ready_since = pool.find("a").instances[0].ready_since
            assert ready_since is not None
            assert await text_of(pool, name="b") == "b: hi"
            assert time.time() - ready_since >= 0.3

    async def test_a_model_that_is_asked_for_without_end_leaves_all_the_same(self) -> None:
        async with running(
            on_demand=(model("a", max_concurrent_requests=1), model("b")), max_loaded_models=1
        ) as pool:

            async def ask_on() -> None:
                while True:
                    await answer(pool, name="a")

            await answer(pool, name="a")
            clients = [asyncio.create_task(ask_on()) for _ in range(3)]
            assert await text_of(pool, name="b") == "b: hi"
            assert await text_of(pool, name="a") == "a: hi"
            await end(*clients)

    async def test_who_comes_while_it_leaves_is_answered_after_its_return(self) -> None:
        launcher = FakeLauncher()
        async with running(
            on_demand=(model("a"), model("b")), launcher=launcher, max_loaded_models=1
        ) as pool:
            await answer(pool, name="a")
            launcher.may_stop.clear()
            for_b = asyncio.create_task(text_of(pool, name="b"))
            await until(lambda: pool.find("a").states == ("stopping",))
            for_a = asyncio.create_task(text_of(pool, name="a"))
            await until(lambda: pool.find("a").waiting == 1)
            launcher.may_stop.set()
            assert (await for_a, await for_b) == ("a: hi", "b: hi")

    async def test_a_wish_ends_with_the_last_who_waits_for_it(self) -> None:
        launcher = FakeLauncher()
        async with running(
            on_demand=(model("a"), model("b")), launcher=launcher, max_loaded_models=1
        ) as pool:
            busy = asyncio.create_task(answer(pool, "hang", name="a"))
            await until(lambda: pool.find("a").busy == 1)
            asking = asyncio.create_task(answer(pool, name="b"))
            await until(lambda: pool.find("b").waiting == 1)
            await end(asking)
            assert pool.find("b").states == ("unloaded",)
            assert await text_of(pool, name="a") == "a: hi"
            await end(busy)
            await asyncio.sleep(0.05)
            assert [worker.model.name for worker in launcher.workers] == ["a"]

    async def test_a_failed_load_is_told_and_costs_the_others_nothing(self) -> None:
        launcher = FakeLauncher()
        async with running(
            on_demand=(model("a"), model("b")), launcher=launcher, max_loaded_models=1
        ) as pool:
            await answer(pool, name="a")
            launcher.load_errors = [ModelLoadFailed("Not enough memory.")]
            with pytest.raises(ReportedError, match="Not enough memory"):
                await answer(pool, name="b")
            assert await text_of(pool, name="a") == "a: hi"


async def test_a_request_for_a_model_that_leaves_loads_nothing_of_it_early() -> None:
    launcher = FakeLauncher()
    launcher.load_errors = [ModelLoadFailed("Not enough memory.")]
    async with running(
        model("a", replicas=2), on_demand=(model("b"),), launcher=launcher, max_loaded_models=1
    ) as pool:
        assert sorted(await pool.settled()) == ["failed", "ready"]
        launcher.may_stop.clear()
        for_b = asyncio.create_task(text_of(pool, name="b"))
        await until(lambda: "stopping" in pool.find("a").states)
        await asyncio.sleep(Backoff.FIRST_SECONDS)
        for_a = asyncio.create_task(text_of(pool, name="a"))
        await until(lambda: pool.find("a").waiting == 1)
        assert sorted(pool.find("a").states) == ["failed", "stopping"]
        launcher.may_stop.set()
        assert (await for_a, await for_b) == ("a: hi", "b: hi")


async def test_a_model_that_was_to_yield_and_failed_begins_anew() -> None:
    launcher = FakeLauncher()
    async with running(
        on_demand=(model("a"), model("b", max_concurrent_requests=1)), launcher=launcher, max_loaded_models=1
    ) as pool:
        busy = asyncio.create_task(answer(pool, "hang", name="a"))
        await until(lambda: pool.find("a").busy == 1)
        for_b = asyncio.create_task(answer(pool, "hang", name="b"))
        await until(lambda: pool.find("b").waiting == 1)
        assert pool._queues["a"].is_yielding
        launcher.load_errors = [ModelLoadFailed("Not enough memory.")]
        launcher.workers[0].die()
        await until(lambda: pool.find("a").states == ("failed",) and pool.find("b").busy == 1)
        assert not pool._queues["a"].is_yielding
        await end(busy, for_b)


async def test_who_waits_for_room_hears_when_the_model_may_not_start_yet() -> None:
    launcher = FakeLauncher()
    async with running(on_demand=(model("a"), model("b")), launcher=launcher, max_loaded_models=1) as pool:
        launcher.load_errors = [ModelLoadFailed("Not enough memory.")]
        with pytest.raises(ReportedError):
            await answer(pool, name="b")
        busy = asyncio.create_task(answer(pool, "hang", name="a"))
        await until(lambda: pool.find("a").busy == 1)
        pool.load("b")
        asking = asyncio.create_task(answer(pool, name="b"))
        await until(lambda: pool.find("b").waiting == 1)
        await end(busy)
        with pytest.raises(ReportedError, match="Not enough memory"):
            await asyncio.wait_for(asking, 5)


async def test_what_goes_wrong_with_asking_for_memory_is_no_matter_of_other_models() -> None:
    is_broken = False

    def inventory() -> Sequence[Gpu]:
        if is_broken:
            raise RuntimeError("the driver is gone")
        return ()

    pool = WorkerPool([model("a")], [model("b")], launcher=FakeLauncher(), inventory=inventory)
    pool.start()
    try:
        await pool.settled()
        is_broken = True
        await asyncio.sleep(0.6)  # what was seen is out of date
        with pytest.raises(ReportedError, match="cannot be started"):
            await answer(pool, name="b")
        assert pool.find("b").waiting == 0
        assert await text_of(pool, name="a") == "a: hi"
    finally:
        await pool.close()


async def test_of_several_idle_ones_the_one_leaves_that_was_used_the_longest_time_ago() -> None:
    models = [model(name) for name in "abc"]
    async with running(on_demand=models, max_loaded_models=2) as pool:
        for name in ("a", "b", "a", "c"):
            await answer(pool, name=name)
        assert loaded(pool) == ["a", "c"]


async def test_an_order_waits_for_room_like_a_request() -> None:
    async with running(on_demand=(model("a"), model("b")), max_loaded_models=1) as pool:
        busy = asyncio.create_task(answer(pool, "hang", name="a"))
        await until(lambda: pool.find("a").busy == 1)
        task = pool.load("b")
        assert task.status == "queued"
        await end(busy)
        await until(lambda: pool.task(task.id).status == "completed")
        assert loaded(pool) == ["b"]


async def test_many_clients_of_more_models_than_fit_are_all_answered_with_few_loads() -> None:
    rng = random.Random(5)
    launcher = FakeLauncher()
    models = [model(name, max_concurrent_requests=2) for name in "abc"]
    async with running(
        on_demand=models, launcher=launcher, max_loaded_models=2, minimum_stay_seconds=0.05
    ) as pool:
        most_loaded = 0

        async def client() -> list[str]:
            nonlocal most_loaded
            texts = []
            for _ in range(10):
                name = rng.choice("abc")
                texts.append((await text_of(pool, name=name)) == f"{name}: hi")
                most_loaded = max(most_loaded, len(loaded(pool)))
            return [str(text) for text in texts]

        answers = await asyncio.gather(*(client() for _ in range(20)))
    assert [text for texts in answers for text in texts] == ["True"] * 200
    assert most_loaded == 2
    assert len(launcher.workers) <= 50


class TestTimeToLive:
    async def test_an_unused_model_is_unloaded_and_comes_back_when_asked_for(self) -> None:
        launcher = FakeLauncher()
        async with running(on_demand=(model("a", ttl_seconds=0.1),), launcher=launcher) as pool:
            await answer(pool, name="a")
            await until(lambda: pool.find("a").states == ("unloaded",))
            assert launcher.stopped == 1
            assert await text_of(pool, name="a") == "a: hi"

    async def test_a_time_that_comes_while_it_is_planned_for_is_not_missed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        jumps = itertools.cycle([0, 3600])
        monkeypatch.setattr(residency, "time", SimpleNamespace(time=lambda: time.time() + next(jumps)))
        async with running(on_demand=(model("a", ttl_seconds=0.1),)) as pool:
            await answer(pool, name="a")
            await until(lambda: pool.find("a").states == ("unloaded",))

    async def test_a_busy_one_stays(self) -> None:
        async with running(on_demand=(model("a", ttl_seconds=0.05),)) as pool:
            busy = asyncio.create_task(answer(pool, "hang", name="a"))
            await until(lambda: pool.find("a").busy == 1)
            await asyncio.sleep(0.15)
            assert pool.find("a").states == ("ready",)
            await end(busy)
            await until(lambda: pool.find("a").states == ("unloaded",))

    async def test_each_request_begins_the_time_anew(self) -> None:
        launcher = FakeLauncher()
        async with running(on_demand=(model("a", ttl_seconds=0.3),), launcher=launcher) as pool:
            for _ in range(5):
                await answer(pool, name="a")
                await asyncio.sleep(0.1)
            assert (pool.find("a").states, launcher.stopped) == (("ready",), 0)
