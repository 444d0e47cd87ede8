"""What the pool does with GPUs: each instance is told its own, and what fits nowhere is told why."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from gallama.catalog import ResolvedModel, resolve_model
from gallama.catalog.memory_need import estimate_memory
from gallama.config import ServerConfig
from gallama.errors import GallamaError
from gallama.pool.gpus import CONTEXT_BYTES, GIGABYTE, Gpu, Placement
from gallama.pool.launchers import RunningWorker
from gallama.pool.pool import WorkerPool
from tests.pool.fake_workers import FakeLauncher, answer, until


class PlacingLauncher(FakeLauncher):
    """Remembers where its workers were to go."""

    def __init__(self) -> None:
        super().__init__()
        self.placements: list[Placement | None] = []

    async def launch(self, model: ResolvedModel, placement: Placement | None = None) -> RunningWorker:
        self.placements.append(placement)
        return await super().launch(model, placement)

    @property
    def visible(self) -> list[str | None]:
        return [each.environment.get("CUDA_VISIBLE_DEVICES") if each else None for each in self.placements]


@contextlib.asynccontextmanager
async def pool_of(
    *models: ResolvedModel, gpus: Sequence[Gpu], launcher: FakeLauncher
) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(models, launcher=launcher, inventory=lambda: gpus)
    pool.start()
    try:
        yield pool
    finally:
        await pool.close()


def smollm2(**values: Any) -> ResolvedModel:
    return resolve_model({"model_id": "smollm2-135m", "model_name": "m", **values}, ServerConfig())


def card(index: int, free_bytes: int) -> Gpu:
    return Gpu(index=index, name="card", total_bytes=24 * GIGABYTE, free_bytes=free_bytes)


def room_for_one() -> int:
    return estimate_memory(smollm2()).gpu_bytes + CONTEXT_BYTES


async def test_instances_that_load_at_once_are_not_promised_the_same_memory() -> None:
    launcher = PlacingLauncher()
    launcher.may_load.clear()
    gpus = [card(0, room_for_one()), card(1, room_for_one() + 1)]
    async with pool_of(smollm2(replicas=2), gpus=gpus, launcher=launcher) as pool:
        await until(lambda: len(launcher.placements) == 2)
        launcher.may_load.set()
        assert await pool.settled() == ["ready", "ready"]
        assert sorted(map(str, launcher.visible)) == ["0", "1"]
        assert sorted(instance.gpus for instance in pool.models[0].instances) == [(0,), (1,)]


async def test_a_model_that_fits_nowhere_says_so_to_its_clients() -> None:
    launcher = PlacingLauncher()
    async with pool_of(smollm2(), gpus=[card(0, GIGABYTE // 2)], launcher=launcher) as pool:
        assert await pool.settled() == ["failed"]
        with pytest.raises(GallamaError) as error:
            await answer(pool)
        report = error.value.report()
        assert (report.status, report.code) == (503, "insufficient_memory")
        assert "m needs 0.3 GB of GPU memory" in report.message
    assert launcher.placements == []


async def test_a_gpu_that_is_not_there_is_told_of_at_the_load() -> None:
    launcher = PlacingLauncher()
    async with pool_of(smollm2(gpus="0,1"), gpus=[card(0, 20 * GIGABYTE)], launcher=launcher) as pool:
        assert await pool.settled() == ["failed"]
        assert "1 GB are asked for on GPU 1, but there are only 1" in pool.models[0].problem
    assert launcher.placements == []


async def test_a_model_for_the_cpu_sees_no_gpu() -> None:
    launcher = PlacingLauncher()
    async with pool_of(smollm2(gpus="0"), gpus=[card(0, 0)], launcher=launcher) as pool:
        assert await pool.settled() == ["ready"]
        assert launcher.visible == [""]
        assert pool.models[0].instances[0].gpus == ()
