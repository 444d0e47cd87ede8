"""Which GPUs a worker sees: what is asked for is checked, and `auto` goes by free memory."""

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gallama.config import ModelSpec
from gallama.errors import InvalidConfig, NotEnoughMemory
from gallama.pool import gpus as gpus_module
from gallama.pool.gpus import (
    CONTEXT_BYTES,
    GIGABYTE,
    UNEVEN_PART,
    Gpu,
    Placement,
    gpu_bytes_in_use,
    place,
    seen_gpus,
    without_promised,
)

CONTEXT_GIGABYTES = CONTEXT_BYTES / GIGABYTE


def spec_of(**values: Any) -> ModelSpec:
    return ModelSpec(model_id="m", **values)


def drafting(**values: Any) -> ModelSpec:
    return spec_of(draft_model_id="d", **values)


def cards(*free: float, total: float = 24) -> list[Gpu]:
    """GPUs with so many gigabytes free."""
    return [
        Gpu(index=index, name="card", total_bytes=int(total * GIGABYTE), free_bytes=int(size * GIGABYTE))
        for index, size in enumerate(free)
    ]


def visible(placement: Placement) -> str | None:
    return placement.environment.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("asked", "seen", "split"),
    [
        ("20,0,0,0", "0", (20.0,)),
        ("0,0,20,0", "2", (20.0,)),
        ("22,0,10,0", "0,2", (22.0, 10.0)),
        ("22,22,10,5", "0,1,2,3", (22.0, 22.0, 10.0, 5.0)),
        ("7", "0", (7.0,)),
        ("0,0", "", (0.0,)),
        ("0", "", (0.0,)),
    ],
)
@pytest.mark.parametrize("gpus", [cards(24, 24, 24, 24), []])
def test_a_worker_sees_the_gpus_that_have_gigabytes(
    asked: str, seen: str, split: tuple[float, ...], gpus: list[Gpu]
) -> None:
    placement = place(spec_of(gpus=asked), None, gpus, environment={})
    assert visible(placement) == seen
    assert placement.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert placement.split == split
    assert placement.applied_to(spec_of(gpus=asked)).gpus == split


@pytest.mark.parametrize(
    ("asked", "drafts", "seen", "split", "draft_split"),
    [
        ("20,0,0,0", "0,0,0,2", "0,3", (20.0, 0.0), (0.0, 2.0)),
        ("0,20,10", "0,2", "1,2", (20.0, 10.0), (2.0, 0.0)),
        ("20,0", "0", "0", (20.0,), (0.0,)),
        ("0", "0,2", "1", (0.0,), (2.0,)),
        ("0,0", "0", "", (0.0,), (0.0,)),
        ("20,5", "auto", "0,1", (20.0, 5.0), ()),
    ],
)
def test_model_and_draft_model_count_the_same_gpus(
    asked: str, drafts: str, seen: str, split: tuple[float, ...], draft_split: tuple[float, ...]
) -> None:
    spec = drafting(gpus=asked, draft_gpus=drafts)
    placement = place(spec, None, cards(24, 24, 24, 24))
    assert visible(placement) == seen
    assert (placement.split, placement.draft_split) == (split, draft_split)
    assert placement.applied_to(spec).draft_gpus == (draft_split or "auto")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            spec_of(gpus="0,0,0,1"),
            r"`gpus`: 1 GB are asked for on GPU 3, but there are only 2, counted from 0",
        ),
        (drafting(draft_gpus="0,0,3"), "`draft_gpus`: 3 GB are asked for on GPU 2, but there are only 2"),
        (spec_of(gpus="0,25"), r"25 \(`gpus`\) GB are asked for on GPU 1, but it has 24.0 GB \(card\)"),
        (spec_of(gpus="1e9"), "1e[+]09"),
        (drafting(gpus="20", draft_gpus="5"), r"20 \(`gpus`\) [+] 5 \(`draft_gpus`\) GB"),
        (drafting(draft_gpus="25"), r"25 \(`draft_gpus`\) GB are asked for on GPU 0"),
        (spec_of(gpus="22", reserve_vram=3), r"22 \(`gpus`\) [+] 3 \(`reserve_vram`\) GB"),
    ],
)
def test_what_no_gpu_has_is_refused(spec: ModelSpec, reason: str) -> None:
    with pytest.raises(InvalidConfig, match=reason):
        place(spec, None, cards(24, 24))


def test_indexes_without_gigabytes_need_no_gpu() -> None:
    assert visible(place(spec_of(gpus="20,0,0,0"), None, cards(24))) == "0"


def test_what_is_free_does_not_matter_where_gigabytes_are_asked_for() -> None:
    assert visible(place(spec_of(gpus="20"), 20 * GIGABYTE, cards(0))) == "0"


def test_gigabytes_that_the_model_will_not_keep_to_are_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"needs about 26\.0 GB of GPU memory, but `gpus` gives 20"):
        place(spec_of(gpus="10,10"), 26 * GIGABYTE, cards(24, 24))
    with pytest.raises(InvalidConfig, match=r"set a smaller `cache_size` or `cache_quant`\.$"):
        place(spec_of(gpus="10,10", backend="exllamav3"), 26 * GIGABYTE, cards(24, 24))
    with pytest.raises(InvalidConfig, match=r"the draft model needs about 3\.0 GB .*`draft_gpus` gives 2"):
        place(drafting(draft_gpus="2"), 9 * GIGABYTE, cards(24, 24), draft_bytes=3 * GIGABYTE)


def test_an_estimate_a_little_above_the_gigabytes_is_let_pass() -> None:
    assert visible(place(spec_of(gpus="20"), 21 * GIGABYTE, cards(24))) == "0"


def test_a_gateway_that_sees_some_gpus_only_passes_their_names_on() -> None:
    gpus = [
        Gpu(index=index, name="card", total_bytes=24 * GIGABYTE, free_bytes=size * GIGABYTE, device=device)
        for index, size, device in ((0, 10, "GPU-aa"), (1, 20, "GPU-bb"))
    ]
    assert visible(place(spec_of(gpus="0,5"), None, gpus)) == "GPU-bb"
    assert visible(place(spec_of(), 15 * GIGABYTE, gpus)) == "GPU-bb"
    assert visible(place(spec_of(), 25 * GIGABYTE, gpus)) == "GPU-aa,GPU-bb"


def test_where_no_gpu_is_seen_the_gateways_own_choice_still_counts() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "3, 5"}
    assert visible(place(spec_of(gpus="0,5"), None, [], environment=environment)) == "5"
    with pytest.raises(InvalidConfig, match="on GPU 2, but there are only 2"):
        place(spec_of(gpus="0,0,5"), None, [], environment=environment)


def test_auto_takes_the_gpu_with_the_most_free_memory() -> None:
    placement = place(spec_of(), 8 * GIGABYTE, cards(10, 20, 15))
    assert visible(placement) == "1"
    assert placement.split == ()
    assert placement.bytes_by_gpu == {1: 8 * GIGABYTE + CONTEXT_BYTES}


def test_auto_takes_the_fewest_gpus_that_hold_a_model_together() -> None:
    placement = place(spec_of(), 30 * GIGABYTE, cards(10, 20, 15))
    assert visible(placement) == "1,2"
    assert place(spec_of(), 38 * GIGABYTE, cards(10, 20, 15)).gpus == (0, 1, 2)


def test_auto_takes_all_gpus_for_a_model_whose_layers_are_split() -> None:
    assert place(spec_of(tp=True), 8 * GIGABYTE, cards(10, 20, 15)).gpus == (0, 1, 2)
    assert place(spec_of(tp=True), 8 * GIGABYTE, cards(20)).gpus == (0,)
    with pytest.raises(NotEnoughMemory):
        place(spec_of(tp=True), 60 * GIGABYTE, cards(10, 20, 15))


def test_a_reserve_is_kept_free() -> None:
    assert place(spec_of(), 10 * GIGABYTE, cards(12, 3)).gpus == (0,)
    placement = place(spec_of(reserve_vram=2), 10 * GIGABYTE, cards(12, 5))
    assert placement.gpus == (0, 1)
    assert placement.split == pytest.approx((10 - CONTEXT_GIGABYTES, 3 - CONTEXT_GIGABYTES))


def test_too_little_memory_is_told_with_numbers() -> None:
    with pytest.raises(NotEnoughMemory) as error:
        place(spec_of(reserve_vram=1), 40 * GIGABYTE, cards(20, 10))
    message = error.value.report().message
    assert (
        "m needs 40.0 GB of GPU memory. Less what a process takes and the 1 GB of `reserve_vram`" in message
    )
    assert "there are free: GPU 0 18.5 GB, GPU 1 8.5 GB. Split over several, it needs 1.2 GB more" in message
    assert "`gpus=0`" in message
    assert (error.value.status, error.value.code) == (503, "insufficient_memory")


def test_a_need_that_is_not_known_may_use_all_gpus() -> None:
    placement = place(spec_of(), None, cards(1, 2))
    assert visible(placement) == "0,1"
    assert (placement.split, placement.bytes_by_gpu) == ((), {})


def test_auto_without_gpus_changes_nothing() -> None:
    placement = place(spec_of(), 8 * GIGABYTE, [], environment={"CUDA_VISIBLE_DEVICES": "7"})
    assert placement == Placement()
    assert placement.applied_to(spec_of()) == spec_of()


def test_a_model_that_needs_no_gpu_memory_is_not_bound_to_a_gpu() -> None:
    assert place(spec_of(), 0, cards(0, 0)) == Placement()


def test_a_draft_model_with_gigabytes_of_its_own_has_them_set_aside() -> None:
    spec = drafting(draft_gpus="4,0")
    assert place(spec, 12 * GIGABYTE, cards(12, 11), draft_bytes=2 * GIGABYTE).gpus == (0, 1)
    placement = place(spec, 12 * GIGABYTE, cards(12, 11), draft_bytes=2 * GIGABYTE)
    assert placement.split == pytest.approx((0.0, 11 - CONTEXT_GIGABYTES))
    assert placement.draft_split == (4.0, 0.0)
    assert placement.bytes_by_gpu == {
        0: 2 * GIGABYTE + CONTEXT_BYTES,
        1: 10 * GIGABYTE + CONTEXT_BYTES,
    }


def test_what_still_loads_takes_its_memory_already() -> None:
    first = place(spec_of(), 15 * GIGABYTE, cards(20, 18))
    second = place(spec_of(), 15 * GIGABYTE, without_promised(cards(20, 18), [first]))
    assert (first.gpus, second.gpus) == ((0,), (1,))
    with pytest.raises(NotEnoughMemory):
        place(spec_of(), 15 * GIGABYTE, without_promised(cards(20, 18), [first, second]))


def test_memory_in_use_is_that_of_the_gpus_asked_about() -> None:
    assert gpu_bytes_in_use(lambda: cards(20, 10, 24), (0, 1, 9)) == (4 + 14) * GIGABYTE
    assert gpu_bytes_in_use(list, (0,)) == 0


def test_auto_never_exceeds_what_is_free() -> None:
    rng = random.Random(0)
    refused = 0
    for _ in range(3000):
        gpus = _random_cards(rng)
        spec = spec_of(reserve_vram=rng.choice([None, rng.uniform(0, 8)]))
        need = rng.randrange(1, 100 * GIGABYTE)
        try:
            placement = place(spec, need, gpus)
        except NotEnoughMemory:
            refused += 1
            continue
        kept = int((spec.reserve_vram or 0) * GIGABYTE)
        for index, size in placement.bytes_by_gpu.items():
            assert size <= gpus[index].free_bytes - kept
        assert sum(placement.bytes_by_gpu.values()) >= need + len(placement.gpus) * CONTEXT_BYTES
        fewer = len(placement.gpus) - 1
        most_room = max(_room(chosen, kept) for chosen in itertools.combinations(gpus, fewer))
        assert most_room < need * (1 + fewer * UNEVEN_PART), "fewer would have done"
    assert 300 < refused < 2700


def test_compaction_keeps_every_gigabyte_with_its_gpu() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        gpus = _random_cards(rng)
        asked, drafts = (_random_gigabytes(rng, gpus) for _ in range(2))
        placement = place(drafting(gpus=asked, draft_gpus=drafts), None, gpus)
        names = [name for name in str(visible(placement)).split(",") if name]
        assert names == [str(index) for index in placement.gpus]
        for gigabytes, split in ((asked, placement.split), (drafts, placement.draft_split)):
            assert sum(split) == pytest.approx(sum(gigabytes))
            assert dict(zip(placement.gpus, split, strict=False)) == {
                index: _at(gigabytes, index) for index in placement.gpus
            }


def test_explicit_gigabytes_hold_what_the_models_are_expected_to_take() -> None:
    rng = random.Random(2)
    for _ in range(1000):
        gpus = _random_cards(rng)
        asked = _random_gigabytes(rng, gpus)
        need = int(sum(asked) * GIGABYTE * rng.uniform(0, 1))
        for index, size in place(spec_of(gpus=asked), need, gpus).bytes_by_gpu.items():
            assert size <= asked[index] * GIGABYTE + CONTEXT_BYTES + 1


class FakeNvml:
    """NVIDIA's library as far as it is asked, over GPUs that are their own handles."""

    class NVMLError(Exception):
        pass

    def __init__(self, uuids: Sequence[str], *, is_lost: bool = False) -> None:
        self._uuids = uuids
        self._is_lost = is_lost

    def nvmlDeviceGetCount(self) -> int:
        return len(self._uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self._uuids[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in PARTS:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"card {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        if self._is_lost:
            raise self.NVMLError("GPU is lost")
        return SimpleNamespace(total=24 * GIGABYTE, free=20 * GIGABYTE)


UUIDS = ("GPU-a1", "GPU-a2", "GPU-b1")
PARTS = ("MIG-c1",)


@pytest.mark.parametrize(
    ("variable", "seen"),
    [
        (None, ["GPU-a1", "GPU-a2", "GPU-b1"]),
        ("2,0", ["GPU-b1", "GPU-a1"]),
        (" 1 ", ["GPU-a2"]),
        ("GPU-b,GPU-a2", ["GPU-b1", "GPU-a2"]),
        ("MIG-c1,0", ["MIG-c1", "GPU-a1"]),
        ("", []),
        ("-1", []),
        ("0,-1,1", ["GPU-a1"]),
        ("0,7,1", ["GPU-a1"]),
        ("0,GPU-a,1", ["GPU-a1"]),
        ("0,none,1", ["GPU-a1"]),
        ("1,1", ["GPU-a2"]),
    ],
)
def test_the_gateways_own_variable_chooses_and_orders_the_gpus(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, seen: list[str]
) -> None:
    monkeypatch.setattr(gpus_module, "_nvml", lambda: FakeNvml(UUIDS))
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    gpus = seen_gpus(environment)
    assert [gpu.device for gpu in gpus] == seen
    assert [gpu.index for gpu in gpus] == list(range(len(seen)))
    assert all((gpu.total_bytes, gpu.free_bytes) == (24 * GIGABYTE, 20 * GIGABYTE) for gpu in gpus)


@pytest.mark.parametrize(
    ("nvml", "environment"),
    [
        (None, {}),
        (FakeNvml(UUIDS, is_lost=True), {}),
        (FakeNvml(UUIDS), {"CUDA_VISIBLE_DEVICES": "MIG-gone"}),
    ],
)
def test_gpus_that_cannot_be_asked_are_not_seen(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None, environment: Mapping[str, str]
) -> None:
    monkeypatch.setattr(gpus_module, "_nvml", lambda: nvml)
    assert seen_gpus(environment) == ()


@pytest.mark.needs_gpu
@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="there is no NVIDIA driver")
def test_the_gpus_of_this_machine_have_memory_and_names_of_their_own() -> None:
    gpus = seen_gpus()
    assert gpus
    assert all(0 < gpu.free_bytes <= gpu.total_bytes for gpu in gpus)
    assert len({gpu.device for gpu in gpus}) == len(gpus)
    in_use = gpu_bytes_in_use(seen_gpus, [gpu.index for gpu in gpus])
    assert 0 <= in_use < sum(gpu.total_bytes for gpu in gpus)


def _random_cards(rng: random.Random) -> list[Gpu]:
    return cards(*(rng.uniform(0, 24) for _ in range(rng.randint(1, 6))))


def _random_gigabytes(rng: random.Random, gpus: Sequence[Gpu]) -> tuple[float, ...]:
    """At most half of each GPU, and zeros, also for GPUs that are not there."""
    sizes = [rng.choice([0.0, rng.uniform(0, 12)]) for _ in range(rng.randint(1, len(gpus)))]
    return (*sizes, *(0.0,) * rng.randint(0, 2))


def _room(gpus: Sequence[Gpu], kept: int) -> int:
    return sum(max(0, gpu.free_bytes - kept - CONTEXT_BYTES) for gpu in gpus)


def _at(gigabytes: Sequence[float], index: int) -> float:
    return gigabytes[index] if index < len(gigabytes) else 0.0
