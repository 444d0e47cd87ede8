"""`gallama plan`: what a model would take, and whether this machine has it. Asks no gateway."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from gallama.catalog import ResolvedModel, resolve_model
from gallama.catalog.memory_need import MemoryNeed, estimate_memory
from gallama.cli.gateway_client import printable
from gallama.config import find_config_file, load_config, parse_model_argument
from gallama.errors import NotEnoughMemory
from gallama.pool.gpus import CONTEXT_BYTES, GIGABYTE, Gpu, Placement, place, seen_gpus, without_promised


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What is needed of one memory, and what is free there."""

    memory: str
    needed_bytes: int
    free_bytes: int

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.free_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all instances of a model would take."""

    model: ResolvedModel
    need: MemoryNeed
    """Of one instance."""
    shares: tuple[Share, ...]
    unseen_gpus: tuple[int, ...]
    """The indexes of GPUs that are asked for where none are seen: nothing is known of them."""
    problem: str
    """Why the instances cannot even be placed; ""."""

    @property
    def fits(self) -> bool:
        return not self.problem and all(share.fits for share in self.shares)


def describe_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "spec",
        metavar="SPEC",
        help="as behind `serve -id`: 'model_id=mistral cache_size=8192', or a name alone",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the config file")
    parser.set_defaults(command=plan)


def plan(arguments: argparse.Namespace) -> int:
    """
    Returns:
        The exit status: 1 when the model does not fit.

    Raises:
        InvalidConfig: there is no such model, its file tells nothing, or it asks for a GPU that is not there
            or for more than one has.
    """
    config = load_config(arguments.config or find_config_file(os.environ), os.environ, {})
    is_spec = "=" in arguments.spec
    values = parse_model_argument(arguments.spec) if is_spec else {"model_id": arguments.spec}
    planned = plan_memory(resolve_model(values, config), seen_gpus(), psutil.virtual_memory().available)
    print(json.dumps(to_json(planned), indent=2) if arguments.json else printable("\n".join(lines(planned))))
    return 0 if planned.fits else 1


def plan_memory(model: ResolvedModel, gpus: Sequence[Gpu], available_bytes: int) -> Plan:
    """Place the instances of a model, one after the other.

    Args:
        gpus: those of this machine, with what is free on them.
        available_bytes: main memory that programs may have.

    Raises:
        InvalidConfig: see `plan`.
    """
    need = estimate_memory(model)
    placements: list[Placement] = []
    problem = ""
    try:
        for _ in range(model.spec.replicas):
            free = without_promised(gpus, placements)
            placements.append(place(model.spec, need.gpu_bytes, free, draft_bytes=need.draft_gpu_bytes))
    except NotEnoughMemory as error:
        number = f"Instance {len(placements) + 1} of {model.spec.replicas}: " if placements else ""
        problem = number + error.report().message
    shares = [] if problem else [*_on_gpus(gpus, placements), _main_memory(need, placements, available_bytes)]
    asked = {index for placement in placements for index in placement.gpus}
    if need.needs_gpus and not asked and not problem:
        asked = {0}
    unseen = tuple(sorted(asked - {gpu.index for gpu in gpus}))
    return Plan(model=model, need=need, shares=tuple(shares), unseen_gpus=unseen, problem=problem)


def _on_gpus(gpus: Sequence[Gpu], placements: Sequence[Placement]) -> Iterator[Share]:
    for gpu in gpus:
        needed = sum(placement.bytes_by_gpu.get(gpu.index, 0) for placement in placements)
        if needed:
            name = f"GPU {gpu.index} ({gpu.name})"
            yield Share(memory=name, needed_bytes=needed, free_bytes=gpu.free_bytes)


def _main_memory(need: MemoryNeed, placements: Sequence[Placement], available_bytes: int) -> Share:
    """What is not on GPUs: all of it where an instance uses none."""
    on_gpus = sum(
        size - CONTEXT_BYTES for placement in placements for size in placement.bytes_by_gpu.values()
    )
    instances = len(placements)
    if need.needs_gpus:
        needed = need.least_host_bytes * instances
    else:
        needed = max(0, need.host_bytes * instances - on_gpus)
    return Share(memory="main memory", needed_bytes=needed, free_bytes=available_bytes)


def to_json(planned: Plan) -> dict[str, object]:
    """The plan for programs; sizes in bytes, `needs` for one instance."""
    need = planned.need
    return {
        "model": planned.model.name,
        "path": str(planned.model.path),
        "instances": planned.model.spec.replicas,
        "needs": {
            "weight_bytes": need.model.weight_bytes,
            "cache_bytes": need.model.cache_bytes,
            "compute_bytes": need.model.compute_bytes,
            "draft_model_bytes": need.draft.total_bytes if need.draft else 0,
            "process_bytes": need.process_bytes,
            "total_bytes": need.host_bytes,
            "shelf_bytes": need.shelf_bytes,
        },
        "memories": [asdict(share) | {"fits": share.fits} for share in planned.shares],
        "unseen_gpus": list(planned.unseen_gpus),
        "fits": planned.fits,
        "problem": planned.problem,
    }


def lines(planned: Plan) -> list[str]:
    """The plan for people."""
    need, instances = planned.need, planned.model.spec.replicas
    each = ", for each of its instances" if instances > 1 else ""
    parts = {
        "weights": need.model.weight_bytes,
        "cache": need.model.cache_bytes,
        "computing": need.model.compute_bytes,
        "draft model": need.draft.total_bytes if need.draft else 0,
        "process": need.process_bytes,
        "total": need.host_bytes,
    }
    return [
        f"{planned.model.name} needs about{each}:",
        *(f"  {name:<12} {_size(size):>9}" for name, size in parts.items() if size or name == "total"),
        *(
            [f"  and up to {_size(need.shelf_bytes)} more in time, for finished texts"]
            if need.shelf_bytes
            else []
        ),
        *(
            f"{share.memory}: {_size(share.needed_bytes)} of {_size(share.free_bytes)} free"
            + ("" if share.fits else ", which is too little")
            for share in planned.shares
        ),
        *(f"GPU {index}: not seen from here, so not judged" for index in planned.unseen_gpus),
        planned.problem or _verdict(planned),
    ]


def _verdict(planned: Plan) -> str:
    if not planned.fits:
        return "It does not fit."
    return "It fits, as far as can be seen." if planned.unseen_gpus else "It fits."


def _size(size: int) -> str:
    return f"{size / GIGABYTE:.1f} GB" if size >= GIGABYTE else f"{size / 10**6:.0f} MB"
