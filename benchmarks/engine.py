"""gallama against llama.cpp's own server: python -m benchmarks.engine [--json FILE] [--full] [--kinds KINDS]

Serves SmolLM2-135M three times: with gallama, with gallama and `jump_forward` off, and with llama-server, the
peer, compiled with the same flags, with as many threads, slots and tokens of context. All do the same work
(benchmarks/load.py) in turns, so many requests at once:

- free: free text of 160 tokens.
- json: a person that a schema describes. The peer indents, gallama writes compact JSON.
- tool: a call that must be made. The peer gets a Hermes template, as it ignores `tools` with SmolLM2's own,
  and a schema of the call: `tool_choice` "required" lets SmolLM2 write prose there, and no call ever comes.
- thinking: a thinking template. The peer has none.
- prefix: a long prefix that all prompts share and that both have read before; other questions in each round.

The ratios are ours / peer's and ours / without jump-forward, of the time for all answers of a round: below 1
gallama is faster; medians over the rounds, on a quiet machine. "tok/s" is each answer's own, from its first
piece to its last, in the median; json over free compares those. Ends with an error when an answer of
gallama's does not have the form that was asked for; a target that is missed is only told.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import PEER_REQUESTS, REQUESTS, Answer, ask_all, is_valid, new_client
from benchmarks.servers import TOOL_TEMPLATE, serving_gallama, serving_peer, settings, token_counter

OURS, WITHOUT, PEER = "ours", "without", "peer"
JUMPING = ("json", "tool", "thinking")
MOST_OF_PEER = {
    ("free", 1): 0.95,
    ("free", 8): 1.00,
    ("json", 1): 0.45,
    ("json", 8): 0.60,
    ("tool", 1): 0.50,
    ("tool", 8): 0.60,
    ("prefix", 1): 1.05,
    ("prefix", 8): 0.90,
}
LEAST_JSON_OVER_FREE = 1.15
LEAST_REQUESTS = 4
PAUSE_SECONDS = 0.3
"""After each server's turn, so that its threads are asleep when the next one works."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    name: str
    base_url: str
    model: str


@dataclass
class Turns:
    """What one contender did in all rounds of one kind of work."""

    seconds: list[float] = field(default_factory=list)
    """For all answers of each round."""
    answers: list[Answer] = field(default_factory=list)

    @property
    def tokens_per_answer(self) -> float:
        return statistics.mean(answer.completion_tokens for answer in self.answers)

    def tokens_per_second(self, count_tokens: Callable[[str], int]) -> float:
        """In the median answer, after its first piece and to its last."""
        return statistics.median(
            (answer.completion_tokens - count_tokens(answer.first_piece))
            / (answer.last_piece_seconds - answer.first_piece_seconds)
            for answer in self.answers
        )

    def invalid(self, kind: str) -> int:
        return sum(not is_valid(kind, answer) for answer in self.answers)


@contextlib.contextmanager
def serving(kinds: Sequence[str], slots: int, *, with_peer: bool) -> Iterator[dict[str, list[Contender]]]:
    """The contenders for each kind of work."""
    models = {OURS: settings(slots), WITHOUT: settings(slots, backend_extra_args={"jump_forward": False})}
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(serving_gallama(models))
        peers = {
            template: stack.enter_context(serving_peer(slots, template))
            for template in {peer_template(kind) for kind in kinds if with_peer and kind != "thinking"}
        }
        contenders = {}
        for kind in kinds:
            names = [OURS, WITHOUT] if kind in JUMPING else [OURS]
            contenders[kind] = [Contender(name, gateway.base_url, name) for name in names]
            if with_peer and kind != "thinking":
                contenders[kind].append(Contender(PEER, peers[peer_template(kind)].base_url, "any"))
        yield contenders


def peer_template(kind: str) -> Path | None:
    return TOOL_TEMPLATE if kind == "tool" else None


def numbers(kind: str, count: int) -> Iterator[list[int]]:
    """The requests of each round, after those that warm up: the same ones, but for fresh questions."""
    first = 0
    while True:
        yield list(range(first, first + count))
        first += count if kind == "prefix" else 0


async def compete(
    client: httpx.AsyncClient, contenders: Sequence[Contender], kind: str, at_once: int, rounds: int
) -> dict[str, Turns]:
    turns = {contender.name: Turns() for contender in contenders}
    rounds_numbers = numbers(kind, max(LEAST_REQUESTS, at_once))
    warming_up = next(rounds_numbers)[:at_once]
    for contender in contenders:
        await take_turn(client, contender, kind, warming_up, at_once)
    for _ in range(rounds):
        round_numbers = next(rounds_numbers)
        for contender in contenders:
            seconds, answers = await take_turn(client, contender, kind, round_numbers, at_once)
            turns[contender.name].seconds.append(seconds)
            turns[contender.name].answers += answers
    return turns


async def take_turn(
    client: httpx.AsyncClient, contender: Contender, kind: str, request_numbers: Sequence[int], at_once: int
) -> tuple[float, list[Answer]]:
    to_body = (PEER_REQUESTS if contender.name == PEER else REQUESTS)[kind]
    bodies = [to_body(contender.model, number) for number in request_numbers]
    took = await ask_all(client, contender.base_url, bodies, at_once)
    await asyncio.sleep(PAUSE_SECONDS)
    return took


def to_figures(
    kind: str, at_once: int, turns: Mapping[str, Turns], count_tokens: Callable[[str], int]
) -> Figures:
    figures: Figures = {"kind": kind, "at_once": at_once}
    for name, taken in turns.items():
        figures |= {
            f"{name}_seconds": statistics.median(taken.seconds),
            f"{name}_tokens_per_answer": taken.tokens_per_answer,
            f"{name}_tokens_per_second": taken.tokens_per_second(count_tokens),
            f"{name}_invalid": taken.invalid(kind),
        }
    for name in (PEER, WITHOUT):
        if name in turns:
            figures[f"ratio_to_{name}"] = ratio(turns[OURS], turns[name])
    if PEER in turns and (kind, at_once) in MOST_OF_PEER:
        figures["target"] = MOST_OF_PEER[kind, at_once]
    return figures


def ratio(ours: Turns, other: Turns) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours.seconds, other.seconds, strict=True))


def json_over_free(rows: Sequence[Figures]) -> list[Figures]:
    """How many times as fast as free text gallama writes JSON, wherever both were measured."""
    rates = {(row["kind"], row["at_once"]): row["ours_tokens_per_second"] for row in rows}
    return [
        {
            "at_once": at_once,
            "json_over_free": rate / rates["free", at_once],
            "target": LEAST_JSON_OVER_FREE,
        }
        for (kind, at_once), rate in rates.items()
        if kind == "json" and ("free", at_once) in rates
    ]


async def measure(
    kinds: Sequence[str], at_once: Sequence[int], rounds: int, with_peer: bool
) -> list[Figures]:
    count_tokens = token_counter()
    rows = []
    with serving(kinds, max(at_once), with_peer=with_peer) as contenders:
        print_head()
        async for kind, count, client in each(kinds, at_once):
            turns = await compete(client, contenders[kind], kind, count, rounds)
            rows.append(to_figures(kind, count, turns, count_tokens))
            print_row(rows[-1])
    return rows


async def each(
    kinds: Sequence[str], at_once: Sequence[int]
) -> AsyncIterator[tuple[str, int, httpx.AsyncClient]]:
    async with new_client() as client:
        for count in at_once:
            for kind in kinds:
                yield kind, count, client


def print_head() -> None:
    print("                   ours             peer                                without jump-forward")
    print("work      at once     s tokens tok/s      s tokens tok/s  ratio target       s  ratio  invalid")


def print_row(row: Figures) -> None:
    def cells(name: str) -> str:
        if f"{name}_seconds" not in row:
            return f"{'-':>6s} {'-':>6s} {'-':>5s}"
        seconds, tokens = row[f"{name}_seconds"], row[f"{name}_tokens_per_answer"]
        return f"{seconds:6.2f} {tokens:6.1f} {row[f'{name}_tokens_per_second']:5.0f}"

    without = cells(WITHOUT).split()[0]
    invalid = " ".join(
        f"{name} {row[key]}" for name in (OURS, WITHOUT, PEER) if row.get(key := f"{name}_invalid")
    )
    print(
        f"{row['kind']:9s} {row['at_once']:7d} {cells(OURS)} {cells(PEER)} {number(row.get('ratio_to_peer'))}"
        f" {number(row.get('target'))} {verdict(row):6s} {without:>6s} {number(row.get('ratio_to_without'))}"
        f"  {invalid or 'none'}",
        flush=True,
    )


def number(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>6s}"


def verdict(row: Figures) -> str:
    if "target" not in row:
        return ""
    return "met" if row["ratio_to_peer"] <= row["target"] else "MISSED"


def main() -> int:
    parser = argparse.ArgumentParser(description="gallama against llama.cpp's own server.")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(REQUESTS), help="default: %(default)s")
    parser.add_argument("--at-once", default="1,8", help="requests at once; default: %(default)s")
    parser.add_argument("--full", action="store_true", help="1, 4, 8 and 16 requests at once")
    parser.add_argument(
        "--quick", action="store_true", help="one round without the peer: to see that it runs"
    )
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - REQUESTS.keys():
        parser.error(f"no such kind: {', '.join(unknown)}; there are {', '.join(REQUESTS)}")
    at_once = [1, 4, 8, 16] if options.full else [int(count) for count in options.at_once.split(",")]
    rounds = 1 if options.quick else options.rounds
    rows = asyncio.run(measure(kinds, at_once, rounds, with_peer=not options.quick))
    speeds = json_over_free(rows)
    for row in speeds:
        is_met = row["json_over_free"] >= row["target"]
        print(
            f"json over free text, tok/s, {row['at_once']} at once: {row['json_over_free']:.2f}"
            f" (target {row['target']}, {'met' if is_met else 'MISSED'})"
        )
    if options.json:
        options.json.write_text(json.dumps({"work": rows, "json_over_free": speeds}, indent=2) + "\n")
    return int(any(row["ours_invalid"] or row.get("without_invalid") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
