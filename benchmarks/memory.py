"""Whether a worker's memory grows: python -m benchmarks.memory [--json FILE] [--few N] [--many N]

Serves SmolLM2-135M and sends it a mix of short requests, AT_ONCE at a time: free text, JSON and tool calls,
streamed and whole, with two choices, and some whose client leaves in the middle. After FEW requests and after
MANY it reads the worker's resident memory (RSS) and its proportional share of it (PSS) from /proc, so it runs
on Linux only. FEW are enough to fill the shelf, where a worker keeps what finished requests have computed:
from there on nothing may grow. Ends with an error when either has grown by more than MOST_GROWTH.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import Body, free_request, json_request, new_client, tool_request
from benchmarks.servers import Server, serving_gallama, settings

FEW, MANY = 200, 2000
AT_ONCE = 8
ANSWER_TOKENS = 8
MOST_GROWTH = 1.05


def mixed_requests(count: int, first: int) -> Iterator[tuple[Body, bool]]:
    """Requests, and whether the client leaves when the answer begins."""
    makers = (free_request, json_request, tool_request)
    for number in range(first, first + count):
        body = makers[number % 3]("model", number) | {"max_tokens": ANSWER_TOKENS}
        match number // 3 % 4:
            case 0:
                yield body, False
            case 1:
                yield to_whole(body), False
            case 2:
                yield to_whole(body) | {"n": 2}, False
            case _:
                yield body, True


def to_whole(body: Body) -> Body:
    return {name: value for name, value in body.items() if name not in ("stream", "stream_options")}


async def send(client: httpx.AsyncClient, server: Server, body: Body, leaves: bool) -> None:
    async with client.stream("POST", f"{server.base_url}/chat/completions", json=body) as response:
        response.raise_for_status()
        async for _ in response.aiter_lines():
            if leaves:
                return


async def send_mix(client: httpx.AsyncClient, server: Server, count: int, first: int) -> None:
    requests = mixed_requests(count, first)

    async def send_the_next() -> None:
        for body, leaves in requests:
            await send(client, server, body, leaves)

    await asyncio.gather(*(send_the_next() for _ in range(AT_ONCE)))


def memory(process_id: int) -> dict[str, float]:
    """MiB of a process by measure."""
    lines = Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return {"rss": kilobytes["Rss"] / 1024, "pss": kilobytes["Pss"] / 1024}


async def measure(few: int, many: int) -> list[dict[str, Any]]:
    with serving_gallama({"model": settings(AT_ONCE)}) as server:
        (worker,) = server.worker_ids
        async with new_client() as client:
            await send_mix(client, server, few, 0)
            after_few = memory(worker)
            await send_mix(client, server, many - few, few)
            after_many = memory(worker)
    return [
        {
            "measure": name,
            "after_few_mib": after_few[name],
            "after_many_mib": after_many[name],
            "ratio": after_many[name] / after_few[name],
            "target": MOST_GROWTH,
        }
        for name in after_few
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether a worker's memory grows.")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--few", type=int, default=FEW, help="requests before the first look")
    parser.add_argument("--many", type=int, default=MANY, help="requests before the second one")
    options = parser.parse_args()
    rows = asyncio.run(measure(options.few, options.many))
    print(f"memory  MiB after {options.few:5d}  MiB after {options.many:5d}  ratio  target")
    for row in rows:
        verdict = "met" if row["ratio"] <= MOST_GROWTH else "MISSED"
        print(
            f"{row['measure']:6s} {row['after_few_mib']:16.1f} {row['after_many_mib']:16.1f}"
            f" {row['ratio']:6.3f} {row['target']:7.2f} {verdict}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return int(any(row["ratio"] > MOST_GROWTH for row in rows))


if __name__ == "__main__":
    sys.exit(main())
