"""Whether there is memory for a model, and where."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil

from gallama.catalog import ResolvedModel
from gallama.catalog.memory_need import MemoryNeed, estimate_memory
from gallama.errors import NotEnoughMemory
from gallama.pool.gpus import Gpu, GpuInventory, Placement, place, without_promised

_KEPT_NEEDS = 100
_SEEN_SECONDS = 0.5


class Memory:
    """This machine's GPUs and main memory, beside what loads at the moment."""

    def __init__(self, inventory: GpuInventory, placed: Callable[[], Iterable[Placement]]) -> None:
        """`placed`: where those models go that are being loaded: it is taken, but not yet in use."""
        self._inventory = inventory
        self._placed = placed
        self._needs: dict[tuple[Path, str], MemoryNeed] = {}
        self._seen: Sequence[Gpu] = ()
        self._seen_at = -_SEEN_SECONDS

    async def place(self, model: ResolvedModel) -> Placement:
        """The GPUs for a model.

        Raises:
            InvalidConfig: the model asks for a GPU that is not there, or for more than it has.
            NotEnoughMemory: no GPUs have enough free memory.
        """
        await asyncio.to_thread(self._need, model)  # the heads of a large model's files take a while to read
        return self._place(model, self._inventory())

    def _place(self, model: ResolvedModel, seen: Sequence[Gpu]) -> Placement:
        need = self._need(model)
        gpus = without_promised(seen, self._placed())
        return place(model.spec, need.gpu_bytes, gpus, draft_bytes=need.draft_gpu_bytes)

    def lacks(self, model: ResolvedModel) -> bool:
        """Whether it is known that the model does not fit beside what is loaded."""
        try:
            placement = self._place(model, self._seen_lately())
            needed = self._need(model).least_host_bytes
            return not placement.gpus and needed > psutil.virtual_memory().available
        except NotEnoughMemory:
            return True
        except Exception:
            return False  # what is wrong with it, or with asking, its loading tells

    def _seen_lately(self) -> Sequence[Gpu]:
        """The GPUs; asking their driver takes too long to do it for each request that comes or goes."""
        now = time.monotonic()
        if now - self._seen_at >= _SEEN_SECONDS:
            self._seen, self._seen_at = self._inventory(), now
        return self._seen

    def _need(self, model: ResolvedModel) -> MemoryNeed:
        """The estimate is made from the head of the file, which is not to be read at each look."""
        key = (model.path, model.spec.model_dump_json())
        if key not in self._needs:
            while len(self._needs) >= _KEPT_NEEDS:
                self._needs.pop(next(iter(self._needs)), None)
            self._needs[key] = estimate_memory(model)
        return self._needs[key]
