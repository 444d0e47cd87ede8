"""Models that come and go while the pool runs."""

from __future__ import annotations

import asyncio

import pytest

from gallama.conversation import AnswerText, Failure
from gallama.errors import InvalidConfig, ModelLoadFailed, ModelNotFound, ModelUnloaded, TaskNotFound
from gallama.pool.pool import WorkerPool
from gallama.pool.views import LoadTask
from tests.pool.fake_workers import DONE, FakeLauncher, answer, end, model, running, text_of, until


async def over(pool: WorkerPool, task: LoadTask) -> LoadTask:
    await until(lambda: pool.task(task.id).status in ("completed", "failed"))
    return pool.task(task.id)


class TestAdding:
    async def test_a_model_is_loaded_and_answers(self) -> None:
        async with running(model("a")) as pool:
            task = await over(pool, pool.add([model("b", ("x",))]))
            assert (task.status, task.progress) == ("completed", 1.0)
            assert await text_of(pool, name="x") == "b: hi"

    async def test_a_task_tells_how_far_it_is(self) -> None:
        launcher = FakeLauncher()
        launcher.may_load.clear()
        async with running(launcher=launcher) as pool:
            task = pool.add([model("a"), model("b")])
            await until(lambda: pool.task(task.id).progress == 0.5)
            assert pool.task(task.id).status == "loading"
            assert [each.name for each in pool.task(task.id).models] == ["a", "b"]
            launcher.may_load.set()
            assert (await over(pool, task)).status == "completed"

    async def test_who_asks_twice_while_it_loads_gets_the_same_task(self) -> None:
        launcher = FakeLauncher()
        launcher.may_load.clear()
        async with running(launcher=launcher) as pool:
            task = pool.add([model("a"), model("b")])
            assert pool.add([model("b")]).id == task.id
            assert pool.add([model("b", cache_size=512)]).id != task.id
            assert len(pool.find("b").instances) == 2

    async def test_a_model_that_is_loaded_gets_another_instance(self) -> None:
        async with running(model("a")) as pool:
            await pool.settled()
            await over(pool, pool.add([model("a")]))
            assert pool.find("a").states == ("ready", "ready")

    async def test_a_model_named_twice_gets_two_instances_and_replicas_as_many(self) -> None:
        async with running() as pool:
            task = await over(pool, pool.add([model("a"), model("a"), model("b", replicas=3)]))
            assert len(task.models) == 5
            assert pool.find("a").states == ("ready",) * 2
            assert pool.find("b").states == ("ready",) * 3

    async def test_other_settings_take_the_place_of_those_that_are_not_loaded(self) -> None:
        launcher = FakeLauncher()
        async with running(on_demand=(model("a"),), launcher=launcher) as pool:
            await over(pool, pool.add([model("a", cache_size=512)]))
            assert pool.find("a").states == ("ready",)
            assert [worker.model.spec.cache_size for worker in launcher.workers] == [512]

    async def test_a_failed_load_leaves_nothing_but_its_reason(self) -> None:
        launcher = FakeLauncher()
        async with running(model("a"), launcher=launcher) as pool:
            await pool.settled()
            launcher.load_errors = [ModelLoadFailed("Not enough memory.")]
            task = await over(pool, pool.add([model("b")]))
            assert (task.status, task.models[0].problem) == ("failed", "Not enough memory.")
            assert [served.name for served in pool.models] == ["a"]
            assert [problem.message for problem in pool.recent_problems] == ["Not enough memory."]

    async def test_a_failed_load_of_a_known_model_leaves_it_known(self) -> None:
        launcher = FakeLauncher()
        launcher.load_errors = [ModelLoadFailed("Not enough memory.")]
        async with running(on_demand=(model("a"),), launcher=launcher) as pool:
            await over(pool, pool.add([model("a", cache_size=512)]))
            assert await text_of(pool, name="a") == "a: hi"
            assert launcher.workers[-1].model.spec.cache_size is None

    async def test_a_name_that_belongs_to_another_model_is_refused_and_nothing_is_done(self) -> None:
        async with running(model("a", ("x",))) as pool:
            with pytest.raises(InvalidConfig, match="belongs to two models"):
                pool.add([model("b"), model("x")])
            assert [served.name for served in pool.models] == ["a"]

    async def test_a_task_that_never_was_is_not_found(self) -> None:
        async with running() as pool:
            with pytest.raises(TaskNotFound, match="load-1"):
                pool.task("load-1")

    async def test_what_is_loaded_already_is_completed_at_once(self) -> None:
        async with running(model("a")) as pool:
            await pool.settled()
            assert pool.load("a").status == "completed"
            with pytest.raises(ModelNotFound):
                pool.load("b")


class TestRemoving:
    async def test_running_answers_end_before_the_process_does(self) -> None:
        launcher = FakeLauncher()
        async with running(model("a"), launcher=launcher) as pool:
            running_answer = asyncio.create_task(answer(pool, "hang", name="a"))
            await until(lambda: pool.find("a").busy == 1)
            removing = asyncio.create_task(pool.remove("a"))
            await until(lambda: pool.find("a").states == ("draining",))
            assert launcher.stopped == 0
            await end(running_answer)
            (unloaded,) = await removing
            assert (unloaded.memory_bytes, unloaded.cut_requests, unloaded.is_verified) == (1000, 0, True)
            assert launcher.stopped == 1

    async def test_answers_that_take_too_long_are_cut_with_an_error(self) -> None:
        async with running(model("a"), drain_seconds=0.05) as pool:
            running_answer = asyncio.create_task(answer(pool, "hang", name="a"))
            await until(lambda: pool.find("a").busy == 1)
            (unloaded,) = await pool.remove("a")
            assert unloaded.cut_requests == 1
            failure = (await running_answer)[-1]
            assert isinstance(failure, Failure)
            assert failure.error.code == "model_unloaded"

    async def test_who_waits_and_who_comes_hears_of_it(self) -> None:
        async with running(model("a", max_concurrent_requests=1)) as pool:
            busy = asyncio.create_task(answer(pool, "hang", name="a"))
            await until(lambda: pool.find("a").busy == 1)
            waiting = asyncio.create_task(answer(pool, name="a"))
            await until(lambda: pool.find("a").waiting == 1)
            removing = asyncio.create_task(pool.remove("a"))
            with pytest.raises(ModelUnloaded):
                await waiting
            with pytest.raises(ModelUnloaded) as refused:
                await answer(pool, name="a")
            assert refused.value.retry_after_seconds == 1
            await end(busy)
            await removing

    async def test_it_is_forgotten_unless_it_was_known_before(self) -> None:
        async with running(model("a", ("x",)), on_demand=(model("b"), model("c"))) as pool:
            await answer(pool, name="b")
            await pool.remove("x")
            await pool.remove("b")
            assert [(served.name, served.states) for served in pool.models] == [
                ("b", ("unloaded",)),
                ("c", ("unloaded",)),
            ]
            with pytest.raises(ModelNotFound):
                pool.find("x")
            assert await text_of(pool, name="b") == "b: hi"

    async def test_a_name_that_is_free_again_may_be_given_to_another_model(self) -> None:
        async with running(model("a", ("x",)), model("b")) as pool:
            await pool.remove("a")
            await over(pool, pool.add([model("x")]))
            assert await text_of(pool, name="x") == "x: hi"

    async def test_a_load_is_given_up(self) -> None:
        launcher = FakeLauncher()
        launcher.may_load.clear()
        async with running(launcher=launcher) as pool:
            task = pool.add([model("a")])
            await until(lambda: len(launcher.workers) == 1)
            await pool.remove("a")
            assert pool.task(task.id).models[0].status == "failed"
            assert "unloaded before it was loaded" in pool.task(task.id).models[0].problem
            assert (pool.models, launcher.stopped) == ([], 1)

    async def test_two_who_remove_at_once_both_hear_of_it(self) -> None:
        async with running(model("a"), model("b")) as pool:
            await pool.settled()
            results = await asyncio.gather(pool.remove("a"), pool.remove("a"))
            assert [result[0].name for result in results] == ["a", "a"]

    async def test_an_unknown_name_is_not_found(self) -> None:
        async with running(model("a")) as pool:
            with pytest.raises(ModelNotFound):
                await pool.remove("b")

    async def test_one_instance_goes_and_the_others_answer(self) -> None:
        launcher = FakeLauncher()
        async with running(model("a", replicas=2), launcher=launcher) as pool:
            await pool.settled()
            first, second = pool.find("a").instances
            assert (await pool.remove_instance(first.number)).instance == first.number
            assert [each.number for each in pool.find("a").instances] == [second.number]
            assert await text_of(pool, name="a") == "a: hi"
            with pytest.raises(ModelNotFound):
                await pool.remove_instance(first.number)

    async def test_a_request_whose_instance_goes_before_it_began_is_answered_by_another(self) -> None:
        launcher = FakeLauncher()
        async with running(
            model("a", replicas=2), launcher=launcher, drain_seconds=0.02, policy="round_robin"
        ) as pool:
            await pool.settled()
            asking = asyncio.create_task(answer(pool, "slow before", name="a"))
            await until(lambda: pool.find("a").busy == 1)
            busy = next(each for each in pool.find("a").instances if each.busy)
            await pool.remove_instance(busy.number)
            events = await asking
            assert events[1:] == [AnswerText(0, "a: slow before"), DONE]

    async def test_what_is_added_meanwhile_stays(self) -> None:
        async with running(model("a")) as pool:
            busy = asyncio.create_task(answer(pool, "hang", name="a"))
            await until(lambda: pool.find("a").busy == 1)
            removing = asyncio.create_task(pool.remove("a"))
            await until(lambda: pool.find("a").states == ("draining",))
            task = await over(pool, pool.add([model("a")]))
            assert task.status == "completed"
            await end(busy)
            assert len(await removing) == 1
            assert pool.find("a").states == ("ready",)
            assert await text_of(pool, name="a") == "a: hi"

    async def test_it_goes_on_when_nobody_waits_for_it(self) -> None:
        launcher = FakeLauncher()
        async with running(model("a"), model("b", replicas=2), launcher=launcher) as pool:
            await pool.settled()
            launcher.may_stop.clear()
            first, second = pool.find("b").instances
            removing = [
                asyncio.create_task(pool.remove("a")),
                asyncio.create_task(pool.remove_instance(first.number)),
            ]
            await until(lambda: "stopping" in pool.find("a").states + pool.find("b").states)
            await end(*removing)
            launcher.may_stop.set()
            await until(lambda: len(pool.models) == 1 and len(pool.find("b").instances) == 1)
            assert pool.find("b").instances[0].number == second.number

    async def test_who_waits_for_an_instance_that_never_had_room_hears_of_it(self) -> None:
        async with running(model("a"), max_loaded_models=1) as pool:
            busy = asyncio.create_task(answer(pool, "hang", name="a"))
            await until(lambda: pool.find("a").busy == 1)
            pool.add([model("b")])
            asking = asyncio.create_task(answer(pool, name="b"))
            await until(lambda: pool.find("b").waiting == 1)
            await pool.remove_instance(pool.find("b").instances[0].number)
            with pytest.raises(ModelUnloaded):
                await asyncio.wait_for(asking, 5)
            await end(busy)

    async def test_who_waits_for_a_model_to_come_back_hears_that_it_does_not(self) -> None:
        launcher = FakeLauncher()
        async with running(
            model("a"), on_demand=(model("b"),), launcher=launcher, max_loaded_models=1
        ) as pool:
            await pool.settled()
            launcher.may_stop.clear()
            for_b = asyncio.create_task(text_of(pool, name="b"))
            await until(lambda: pool.find("a").states == ("stopping",))
            for_a = asyncio.create_task(text_of(pool, name="a"))
            await until(lambda: pool.find("a").waiting == 1)
            removing = asyncio.create_task(pool.remove_instance(pool.find("a").instances[0].number))
            await asyncio.sleep(0)
            launcher.may_stop.set()
            with pytest.raises(ModelUnloaded):
                await asyncio.wait_for(for_a, 5)
            await removing
            assert await for_b == "b: hi"

    async def test_it_leaves_no_task_even_if_the_pool_closes_at_once(self) -> None:
        async with running(model("a", replicas=2)) as pool:
            await pool.settled()
            await pool.remove_instance(pool.find("a").instances[0].number)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def test_a_failed_load_is_counted_once_whatever_becomes_of_it(self) -> None:
        launcher = FakeLauncher()
        launcher.load_errors = [ModelLoadFailed("Not enough memory.")]
        async with running(model("a"), on_demand=(model("a"),), launcher=launcher) as pool:
            await pool.settled()
            await pool.remove_instance(pool.find("a").instances[0].number)
            assert (pool.find("a").load_failures, len(pool.recent_problems)) == (1, 1)

    async def test_what_is_being_unloaded_is_not_told_to_be_loaded(self) -> None:
        async with running(model("a")) as pool:
            busy = asyncio.create_task(answer(pool, "hang", name="a"))
            await until(lambda: pool.find("a").busy == 1)
            removing = asyncio.create_task(pool.remove("a"))
            await until(lambda: pool.find("a").states == ("draining",))
            task = pool.load("a")
            assert task.status != "completed"
            await end(busy)
            await removing
            assert pool.task(task.id).status == "failed"

    async def test_numbers_are_never_given_twice(self) -> None:
        async with running(model("a")) as pool:
            seen = {pool.find("a").instances[0].number}
            for _ in range(3):
                await pool.remove("a")
                await over(pool, pool.add([model("a")]))
                seen.add(pool.find("a").instances[0].number)
            assert len(seen) == 4


async def test_loads_failures_and_restarts_are_counted() -> None:
    launcher = FakeLauncher()
    async with running(model("a"), launcher=launcher) as pool:
        await pool.settled()
        launcher.workers[0].die()
        await until(lambda: len(launcher.workers) == 2 and pool.find("a").states == ("ready",))
        served = pool.find("a")
        assert (served.loads, served.load_failures, served.restarts) == (2, 0, 1)
