"""Which GPUs a worker may see, and how much of a model goes onto each. Nothing here starts a process.

A gigabyte is 10**9 bytes. GPUs are numbered as the gateway sees them: by their place on the bus, or in the
order of the gateway's own CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from gallama.config import ModelSpec
from gallama.errors import InvalidConfig, NotEnoughMemory

logger = logging.getLogger(__name__)

GIGABYTE = 10**9
CONTEXT_BYTES = 512 * 2**20
"""What a process takes on each GPU that it uses before it holds anything of a model."""
ESTIMATE_TOLERANCE = 1.25
"""By which factor a model may need more than the gigabytes that it is given: the need is an estimate."""
UNEVEN_PART = 1 / 32
"""The part of a model that is kept free beside it on each GPU where it is split: layers are not divided."""

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
DEVICE_ORDER = "CUDA_DEVICE_ORDER"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU that the gateway may use, and its memory at the moment."""

    index: int
    """What `gpus` counts: 0 for the first that the gateway may see."""
    name: str
    total_bytes: int
    free_bytes: int
    device: str = ""
    """What names it in CUDA_VISIBLE_DEVICES; "": its index."""


GpuInventory = Callable[[], Sequence[Gpu]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a worker's models go."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """To be added to the worker's environment."""
    split: tuple[float, ...] = ()
    """Gigabytes of the model on each GPU that the worker sees; (): the engine's own choice."""
    draft_split: tuple[float, ...] = ()
    """As `split`, for the draft model; (): as its spec says."""
    gpus: tuple[int, ...] = ()
    """The indexes of the GPUs that the worker uses, in the order in which it sees them."""
    bytes_by_gpu: Mapping[int, int] = field(default_factory=dict)
    """What the models are expected to take on each of `gpus`; empty where that is not known."""

    def applied_to(self, spec: ModelSpec) -> ModelSpec:
        """The spec as the worker must read it: it counts only the GPUs that it sees."""
        changes: dict[str, object] = {}
        if self.split:
            changes["gpus"] = self.split
        if self.draft_split:
            changes["draft_gpus"] = self.draft_split
        return spec.model_copy(update=changes) if changes else spec


def seen_gpus(environment: Mapping[str, str] = os.environ) -> Sequence[Gpu]:
    """The NVIDIA GPUs that this process may use; none where there is no driver. Blocks for some milliseconds.

    Args:
        environment: its CUDA_VISIBLE_DEVICES chooses and orders them.
    """
    nvml = _nvml()
    if nvml is None:
        return ()
    try:
        handles = _visible_handles(nvml, environment.get(VISIBLE_DEVICES))
        return [_describe(nvml, index, handle) for index, handle in enumerate(handles)]
    except nvml.NVMLError as error:
        logger.debug("The GPUs cannot be asked: %s", error)
        return ()


def gpu_bytes_in_use(inventory: GpuInventory, indexes: Collection[int]) -> int:
    """The bytes that all processes together use on these GPUs; 0 where none of them is seen. Blocks."""
    return sum(gpu.total_bytes - gpu.free_bytes for gpu in inventory() if gpu.index in indexes)


def without_promised(gpus: Sequence[Gpu], placements: Iterable[Placement]) -> list[Gpu]:
    """The GPUs as they will be once the models of these placements, which are still loading, are there."""
    promised: dict[int, int] = {}
    for placement in placements:
        for index, size in placement.bytes_by_gpu.items():
            promised[index] = promised.get(index, 0) + size
    return [replace(gpu, free_bytes=max(0, gpu.free_bytes - promised.get(gpu.index, 0))) for gpu in gpus]


def place(
    spec: ModelSpec,
    need_bytes: int | None,
    gpus: Sequence[Gpu],
    *,
    draft_bytes: int = 0,
    environment: Mapping[str, str] = os.environ,
) -> Placement:
    """Decide which GPUs a worker sees.

    GPUs that `gpus` and `draft_gpus` name are taken as they are asked for: what is free on them is not looked
    at, as it may be about to be given back. `auto` goes by free memory: onto the GPU with the most of it if
    that is enough, else onto the fewest that hold the model together. A draft model on `auto` goes along.

    Args:
        need_bytes: what the models take on GPUs all told; None: not known.
        gpus: all that the gateway sees, by index from 0; () where it cannot tell.
        draft_bytes: the part of `need_bytes` that is the draft model's.
        environment: the gateway's own, whose CUDA_VISIBLE_DEVICES counts where no GPU is seen.

    Raises:
        InvalidConfig: the spec names a GPU that is not there, more memory than a GPU has, or much less
            than the model needs: engines divide by the gigabytes, but none stops at them.
        NotEnoughMemory: with `auto`, the GPUs have too little free.
    """
    asked, drafts = _gigabytes(spec.gpus), _gigabytes(spec.draft_gpus)
    devices = _devices(gpus, environment)
    if devices is not None:
        _check_indexes(spec, asked or (), drafts or (), len(devices))
    for gpu in gpus:
        _check_size(spec, _at(asked or (), gpu.index), _at(drafts or (), gpu.index), gpu)
    if need_bytes is not None:
        _check_enough(spec, "gpus", asked, need_bytes if drafts is None else need_bytes - draft_bytes)
        _check_enough(spec, "draft_gpus", drafts, draft_bytes)
    if asked is not None:
        return _place_as_asked(asked, drafts, need_bytes, draft_bytes, devices)
    if not gpus:
        return Placement(draft_split=drafts or ())
    return _place_by_free_memory(spec, drafts, need_bytes, draft_bytes, gpus)


def _gigabytes(asked: str | tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Gigabytes by index; None: none are named."""
    return asked if isinstance(asked, tuple) else None


def _check_indexes(spec: ModelSpec, asked: tuple[float, ...], drafts: tuple[float, ...], count: int) -> None:
    for key, gigabytes in (("gpus", asked), ("draft_gpus", drafts)):
        for index, size in enumerate(gigabytes):
            if size and index >= count:
                raise InvalidConfig(
                    f"model {_name(spec)!r}, `{key}`: {size:g} GB are asked for on GPU {index}, but there"
                    f" are only {count}, counted from 0."
                )


def _check_size(spec: ModelSpec, asked: float, drafts: float, gpu: Gpu) -> None:
    sizes = {"gpus": asked, "draft_gpus": drafts, "reserve_vram": spec.reserve_vram or 0.0}
    if not asked + drafts or sum(sizes.values()) * GIGABYTE <= gpu.total_bytes:
        return
    wanted = " + ".join(f"{size:g} (`{key}`)" for key, size in sizes.items() if size)
    raise InvalidConfig(
        f"model {_name(spec)!r}: {wanted} GB are asked for on GPU {gpu.index}, but it has"
        f" {gpu.total_bytes / GIGABYTE:.1f} GB ({gpu.name})."
    )


def _check_enough(spec: ModelSpec, key: str, given: tuple[float, ...] | None, need_bytes: int) -> None:
    if not any(given or ()) or need_bytes <= sum(given or ()) * GIGABYTE * ESTIMATE_TOLERANCE:
        return
    what = "the draft model" if key == "draft_gpus" else "it"
    in_part = ", or put fewer layers on GPUs (`backend_extra_args.n_gpu_layers`)"
    raise InvalidConfig(
        f"model {_name(spec)!r}: {what} needs about {need_bytes / GIGABYTE:.1f} GB of GPU memory, but `{key}`"
        f" gives {sum(given or ()):g}. Give more, or set a smaller `cache_size` or `cache_quant`"
        f"{in_part if spec.backend in ('auto', 'llama_cpp') else ''}."
    )


def _name(spec: ModelSpec) -> str:
    return spec.model_name or spec.model_id


def _place_as_asked(
    asked: tuple[float, ...],
    drafts: tuple[float, ...] | None,
    need_bytes: int | None,
    draft_bytes: int,
    devices: Sequence[str] | None,
) -> Placement:
    most = max(len(asked), len(drafts or ()))
    used = [index for index in range(most) if _at(asked, index) or _at(drafts or (), index)]
    split = _compacted(asked, used)
    draft_split = () if drafts is None else _compacted(drafts, used)
    return Placement(
        environment=_environment(used, devices),
        split=split,
        draft_split=draft_split,
        gpus=tuple(used),
        bytes_by_gpu=_expected(used, split, draft_split or split, need_bytes, draft_bytes),
    )


def _place_by_free_memory(
    spec: ModelSpec,
    drafts: tuple[float, ...] | None,
    need_bytes: int | None,
    draft_bytes: int,
    gpus: Sequence[Gpu],
) -> Placement:
    """Choose GPUs for the model; a draft model whose GPUs are named has its gigabytes there set aside."""
    set_aside = drafts or ()
    model_bytes = None if need_bytes is None else need_bytes - (draft_bytes if drafts is not None else 0)
    if model_bytes == 0 and not any(set_aside):
        return Placement(draft_split=set_aside)
    usable = {gpu.index: _usable_bytes(gpu, spec.reserve_vram, _at(set_aside, gpu.index)) for gpu in gpus}
    chosen = list(usable) if model_bytes is None else _fewest_that_hold(spec, model_bytes, usable)
    used = sorted({*chosen, *(index for index, size in enumerate(set_aside) if size)})
    shares = tuple(usable[index] / GIGABYTE if index in chosen else 0.0 for index in used)
    draft_split = () if drafts is None else _compacted(drafts, used)
    # An engine divides by what is free, which is the same as here unless something is to stay free.
    must_be_told = len(used) > 1 and any(shares) and (spec.reserve_vram or any(set_aside))
    return Placement(
        environment=_environment(used, _devices(gpus, {})),
        split=shares if must_be_told else (),
        draft_split=draft_split,
        gpus=tuple(used),
        bytes_by_gpu=_expected(used, shares, draft_split or shares, need_bytes, draft_bytes),
    )


def _usable_bytes(gpu: Gpu, reserve_gigabytes: float | None, set_aside_gigabytes: float) -> int:
    kept = int(((reserve_gigabytes or 0.0) + set_aside_gigabytes) * GIGABYTE)
    return max(0, gpu.free_bytes - kept - CONTEXT_BYTES)


def _fewest_that_hold(spec: ModelSpec, need_bytes: int, usable: Mapping[int, int]) -> list[int]:
    """The indexes of the GPUs to use, those with the most room first; none for a model that needs nothing.
    Whoever splits every layer wants all of them."""
    if not need_bytes:
        return []
    by_room = sorted(usable, key=lambda index: (-usable[index], index))
    if usable[by_room[0]] >= need_bytes and not spec.tp:
        return by_room[:1]
    uneven = math.ceil(need_bytes * UNEVEN_PART)
    room = 0
    for count, index in enumerate(by_room, start=1):
        room += max(0, usable[index] - uneven)
        if room >= need_bytes and (count == len(by_room) or not spec.tp):
            return by_room[:count]
    each = ", ".join(f"GPU {index} {usable[index] / GIGABYTE:.1f} GB" for index in sorted(usable))
    kept = f" and the {spec.reserve_vram:g} GB of `reserve_vram`" if spec.reserve_vram else ""
    if_split = (
        f" Split over several, it needs {uneven / GIGABYTE:.1f} GB more on each: layers are not divided."
        if len(usable) > 1
        else ""
    )
    raise NotEnoughMemory(
        f"{_name(spec)} needs {need_bytes / GIGABYTE:.1f} GB of GPU memory. Less what a process takes{kept},"
        f" there are free: {each}.{if_split}"
    )


def _at(gigabytes: Sequence[float], index: int) -> float:
    return gigabytes[index] if index < len(gigabytes) else 0.0


def _compacted(gigabytes: Sequence[float], used: Sequence[int]) -> tuple[float, ...]:
    """The gigabytes of the GPUs that the worker sees; one zero where it sees none, which means the CPU."""
    return tuple(_at(gigabytes, index) for index in used) or (0.0,)


def _expected(
    used: Sequence[int],
    split: Sequence[float],
    draft_split: Sequence[float],
    need_bytes: int | None,
    draft_bytes: int,
) -> dict[int, int]:
    """Bytes by index, with what a process takes on each GPU."""
    if need_bytes is None:
        return {}
    parts = ((need_bytes - draft_bytes, split), (draft_bytes, draft_split))
    return {
        index: CONTEXT_BYTES + sum(_share(size, gigabytes, place) for size, gigabytes in parts)
        for place, index in enumerate(used)
    }


def _share(size: int, gigabytes: Sequence[float], place: int) -> int:
    return math.ceil(size * (gigabytes[place] / sum(gigabytes))) if any(gigabytes) else 0


def _environment(used: Sequence[int], devices: Sequence[str] | None) -> dict[str, str]:
    names = [str(index) if devices is None else devices[index] for index in used]
    return {VISIBLE_DEVICES: ",".join(names), DEVICE_ORDER: "PCI_BUS_ID"}


def _devices(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> Sequence[str] | None:
    """What names each GPU in CUDA_VISIBLE_DEVICES; None: its index."""
    if gpus:
        return [gpu.device or str(gpu.index) for gpu in gpus]
    visible = environment.get(VISIBLE_DEVICES)
    return None if visible is None else _listed(visible)


def _listed(visible: str) -> list[str]:
    """The entries of a CUDA_VISIBLE_DEVICES; like CUDA, up to the first that cannot be."""
    entries = (entry.strip() for entry in visible.split(","))
    return list(itertools.takewhile(lambda entry: entry not in ("", "-1"), entries))


@cache
def _nvml() -> Any:
    """NVIDIA's management library, ready to be asked; None where it is not."""
    try:
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
    except Exception as error:  # a missing or broken driver must not keep the gateway from its work
        logger.debug("No NVIDIA GPUs can be seen: %s", error)
        return None
    return pynvml


def _visible_handles(nvml: Any, visible: str | None) -> list[Any]:
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if visible is None:
        return handles
    by_uuid = {nvml.nvmlDeviceGetUUID(handle): handle for handle in handles}
    chosen: dict[str, Any] = {}
    for entry in _listed(visible):
        uuid = _uuid_of(entry, list(by_uuid))
        if uuid is None or uuid in chosen:  # CUDA, too, looks no further
            break
        chosen[uuid] = by_uuid[uuid] if uuid in by_uuid else nvml.nvmlDeviceGetHandleByUUID(uuid)
    return list(chosen.values())


def _uuid_of(entry: str, uuids: Sequence[str]) -> str | None:
    """The whole UUID for a number or the beginning of a UUID; None: there is no such GPU."""
    if entry.startswith("MIG-"):  # a part of a GPU, which has no number
        return entry
    if entry.isdecimal():
        return uuids[int(entry)] if int(entry) < len(uuids) else None
    matching = [uuid for uuid in uuids if entry.startswith("GPU-") and uuid.startswith(entry)]
    return matching[0] if len(matching) == 1 else None


def _describe(nvml: Any, index: int, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        index=index,
        name=nvml.nvmlDeviceGetName(handle),
        total_bytes=memory.total,
        free_bytes=memory.free,
        device=nvml.nvmlDeviceGetUUID(handle),
    )
