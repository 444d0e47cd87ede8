"""What guessing ahead gives: python -m benchmarks.speculative [--json FILE] [--rounds N] [--at-once 1,4]

Serves SmolLM2-135M plain, with `speculative: ngram`, and with itself as its draft model, and asks each for
the same answers in turns, at temperature 0:

- copy: texts to be repeated with something changed, as far as so small a model follows.
- json: rows of the prompt as JSON, held by a schema.
- free: stories, in which there is little to guess.

A draft model that is as large as its model guesses nearly all right and cannot win: its row tells what a
draft model costs that should be left alone. Printed are tokens per second of an answer, from its first piece
to its last, and how many times as fast as plain that is: medians over the rounds, after one that warms up;
above 1 guessing is faster. Copies have a target for one at once only: four answers with cells of their own
share each step, and guesses are made for the one that is left over.

The answers must be those of the plain model. Where two tokens are all but equally likely, batches of another
size may round to the other one: an answer that leaves the plain one at such a place (the two are within
TIE_LOGPROB of each other) is counted; any other difference ends this with an error. A target that is missed
is only told.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import Answer, Body, answer_in, ask_all, chat, free_request, new_client
from benchmarks.servers import MODEL, Server, serving_gallama, settings, token_counter

PLAIN = "plain"
WAYS: Mapping[str, Mapping[str, Any]] = {
    "ngram": {"speculative": "ngram"},
    "draft": {"draft_model_id": MODEL},
}
LEAST_TIMES_AS_FAST = {("ngram", "copy", 1): 1.5, ("ngram", "free", 1): 0.97, ("ngram", "free", 4): 0.97}
"""By way, task, and how many at once."""
TIE_LOGPROB = 0.1
PAUSE_SECONDS = 0.3

LIGHTHOUSE = (
    "The old lighthouse stood at the end of the bay. Every evening the keeper climbed its ninety-one steps,"
    " lit the lamp and wrote the weather in a book. Ships from many countries passed, and their captains"
    " waved. In winter the waves reached the door, and the keeper stayed inside with his dog, a pot of soup"
    " and a pile of letters."
)
SALAD = (
    "1. Wash the potatoes and cut them into cubes.\n2. Boil them in salted water for twelve minuts.\n"
    "3. Drain the water and let the potatoes cool.\n4. Mix yoghurt, mustard and chopped onions in a bowl.\n"
    "5. Add the potatoes, stir gently and serve the salad cold."
)
PEOPLE = (
    "name: Anna Schmidt, city: Hamburg, phone: 040-555-0117, role: engineer\n"
    "name: Paulo Lima, city: Recife, phone: 081-555-0142, role: teacher\n"
    "name: Mei Tanaka, city: Osaka, phone: 06-555-0163, role: doctor\n"
    "name: Omar Haddad, city: Tunis, phone: 071-555-0188, role: artist"
)
PEOPLE_SCHEMA = {
    "type": "array",
    "minItems": 4,
    "maxItems": 4,
    "items": {
        "type": "object",
        "properties": {name: {"type": "string", "maxLength": 24} for name in ("name", "city", "phone")},
        "required": ["name", "city", "phone"],
    },
}
COPIES = (
    f'Repeat this text word for word, but write "captain" instead of "keeper".\n\n{LIGHTHOUSE}',
    f'Repeat this list, with "carrots" instead of "potatoes":\n\n{SALAD}',
    f"Correct the spelling of this text and write it again:\n\n{SALAD}",
    f'Write these lines again, with "Lagos" instead of "Recife":\n\n{PEOPLE}',
)
BODIES: Mapping[str, Sequence[Body]] = {
    "copy": [chat(PLAIN, prompt, 200) for prompt in COPIES],
    "json": [
        chat(PLAIN, f"Write {wish} as JSON:\n\n{PEOPLE}", 200) | answer_in("people", PEOPLE_SCHEMA)
        for wish in ("these lines", "this table", "these people", "the list")
    ],
    "free": [free_request(PLAIN, number) for number in range(4)],
}

Figures = dict[str, Any]


async def compete(
    client: httpx.AsyncClient,
    server: Server,
    task: str,
    at_once: int,
    rounds: int,
    count_tokens: Callable[[str], int],
) -> Figures:
    models = (PLAIN, *WAYS)
    speeds: dict[str, list[float]] = {model: [] for model in models}
    answers: dict[str, list[Answer]] = {}
    for _ in range(1 + rounds):
        for model in models:
            bodies = [body | {"model": model} for body in BODIES[task]]
            _, answers[model] = await ask_all(client, server.base_url, bodies, at_once)
            speeds[model].append(tokens_per_second(answers[model], count_tokens))
            await asyncio.sleep(PAUSE_SECONDS)
    measured = {model: speed[1:] for model, speed in speeds.items()}
    figures: Figures = {"task": task, "at_once": at_once, "plain": statistics.median(measured[PLAIN])}
    for way in WAYS:
        others = await differences(client, server, BODIES[task], answers[PLAIN], answers[way])
        target = {"target": LEAST_TIMES_AS_FAST.get((way, task, at_once))}
        figures[way] = to_figures(way, measured, answers[way]) | target | others
    return figures


def tokens_per_second(answers: Sequence[Answer], count_tokens: Callable[[str], int]) -> float:
    """Of the answers' own time, from the first piece of each, which is left out, to its last."""
    tokens = sum(answer.completion_tokens - count_tokens(answer.first_piece) for answer in answers)
    return tokens / sum(answer.last_piece_seconds - answer.first_piece_seconds for answer in answers)


def to_figures(way: str, speeds: Mapping[str, Sequence[float]], answers: Sequence[Answer]) -> Figures:
    right = sum(answer.guessed_right for answer in answers)
    wrong = sum(answer.guessed_wrong for answer in answers)
    return {
        "tokens_per_second": statistics.median(speeds[way]),
        "times_as_fast": statistics.median(
            fast / plain for plain, fast in zip(speeds[PLAIN], speeds[way], strict=True)
        ),
        "share_guessed": right / sum(answer.completion_tokens for answer in answers),
        "share_right": right / max(right + wrong, 1),
    }


async def differences(
    client: httpx.AsyncClient,
    server: Server,
    bodies: Sequence[Body],
    plain: Sequence[Answer],
    guessed: Sequence[Answer],
) -> Figures:
    """How many answers are other ones than the plain model's: at a tie, and at none."""
    gaps = [
        await gap_where_they_part(client, server, body, mine.content, yours.content)
        for body, mine, yours in zip(bodies, plain, guessed, strict=True)
        if mine.content != yours.content
    ]
    ties = sum(gap <= TIE_LOGPROB for gap in gaps)
    return {"ties": ties, "wrong_answers": len(gaps) - ties}


async def gap_where_they_part(
    client: httpx.AsyncClient, server: Server, body: Body, plain: str, guessed: str
) -> float:
    """By how much the plain model prefers its token where the other text leaves its own.

    In natural logarithms, between its two likeliest tokens; infinite where that cannot be told.
    """
    whole = body | {"stream": False, "logprobs": True, "top_logprobs": 2}
    del whole["stream_options"]
    response = await client.post(f"{server.base_url}/chat/completions", json=whole)
    text = b""
    for entry in response.raise_for_status().json()["choices"][0]["logprobs"]["content"]:
        text += bytes(entry["bytes"])
        if not guessed.encode().startswith(text) or not plain.encode().startswith(text):
            first, second = (other["logprob"] for other in entry["top_logprobs"])
            return float(first - second)
    return float("inf")


async def measure(tasks: Sequence[str], at_once: Sequence[int], rounds: int) -> list[Figures]:
    slots = max(at_once)
    models = {PLAIN: settings(slots)} | {way: settings(slots, **more) for way, more in WAYS.items()}
    count_tokens = token_counter()
    rows = []
    with serving_gallama(models) as server:
        print("                plain  ngram                                   itself as draft model")
        print(
            "task  at once   tok/s  tok/s guessed right times target  ties  tok/s guessed right times  ties"
        )
        async with new_client() as client:
            for count in at_once:
                for task in tasks:
                    rows.append(await compete(client, server, task, count, rounds, count_tokens))
                    print_row(rows[-1])
    return rows


def print_row(row: Figures) -> None:
    ngram, draft = row["ngram"], row["draft"]
    target = ngram["target"]
    verdict = "" if target is None else "met" if ngram["times_as_fast"] >= target else "MISSED"
    print(
        f"{row['task']:5s} {row['at_once']:7d} {row['plain']:7.0f} {way_cells(ngram)} {target or '-':>4}"
        f" {verdict:6s} {ngram['ties']:5d} {way_cells(draft)} {draft['ties']:5d}",
        flush=True,
    )
    for way in WAYS:
        if wrong := row[way]["wrong_answers"]:
            print(f"{wrong} of the answers with {way} are wrong: other than the plain model's, and at no tie")


def way_cells(figures: Figures) -> str:
    return (
        f"{figures['tokens_per_second']:6.0f} {figures['share_guessed']:7.0%} {figures['share_right']:5.0%}"
        f" {figures['times_as_fast']:5.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="What guessing ahead gives.")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", default=",".join(BODIES), help="default: %(default)s")
    parser.add_argument("--at-once", default="1,4", help="requests at once; default: %(default)s")
    options = parser.parse_args()
    tasks = options.tasks.split(",")
    if unknown := set(tasks) - BODIES.keys():
        parser.error(f"no such task: {', '.join(unknown)}; there are {', '.join(BODIES)}")
    at_once = [int(count) for count in options.at_once.split(",")]
    rows = asyncio.run(measure(tasks, at_once, options.rounds))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return int(any(row[way]["wrong_answers"] for row in rows for way in WAYS))


if __name__ == "__main__":
    sys.exit(main())
