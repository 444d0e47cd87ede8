"""What an engine must do right beside what tests/conformance says: many at once, cancelled, broken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.load import (
    UnderWay,
    can_compute,
    compile_work,
    problem_with,
    request_for,
    tokens_of,
    until_busy_with,
    until_written,
    works,
    write,
    write_all,
)
from gallama.constraints import LLGuidanceBackend
from gallama.errors import GallamaError
from gallama.generation import Engine

MOST_STEPS_TO_CANCEL = 3
"""One that was under way, and what passes before this process's other thread has looked."""
_TOKENS_BEFORE_BREAK = 12
_TOLD_PROBLEMS = 5


async def check_load(findings: Findings, engine: Engine, *, count: int) -> None:
    """So many constrained requests at once, every answer of which must follow its grammar."""
    backend = LLGuidanceBackend(engine.vocabulary)
    before, started = engine.status(), time.monotonic()
    problems = await write_all(engine, backend, count)
    seconds, after = time.monotonic() - started, engine.status()
    findings.check(
        "all constrained answers follow their grammars",
        not problems,
        requests=count,
        wrong=len(problems),
        problems=problems[:_TOLD_PROBLEMS],
        seconds=round(seconds, 2),
        steps=after.steps - before.steps,
        sampled_tokens=after.sampled_tokens - before.sampled_tokens,
        forced_tokens=after.forced_tokens - before.forced_tokens,
    )


async def check_cancelling(findings: Findings, engine: Engine, *, slots: int) -> None:
    """One of many answers is cancelled, then the others: slots and pages must be free at once.

    Args:
        slots: answers that the engine computes side by side.
    """
    room = engine.context_length // 2
    under_way = UnderWay(engine, LLGuidanceBackend(engine.vocabulary))
    await under_way.begin(slots, max_tokens=room)
    steps, started = engine.status().steps, time.monotonic()
    await under_way.cancel(under_way.streams[:1])
    await until_busy_with(engine, slots - 1)
    seconds, steps = time.monotonic() - started, engine.status().steps - steps
    findings.check(
        "a cancelled answer frees its slot within three steps",
        steps <= MOST_STEPS_TO_CANCEL,
        steps=steps,
        milliseconds=round(seconds * 1000, 1),
    )
    await under_way.cancel(under_way.streams)
    await until_busy_with(engine, 0)
    await check_pages(findings, engine)


async def check_pages(findings: Findings, engine: Engine) -> None:
    """A prompt that needs almost all pages of the cache is read, which it is only if they are free."""
    room = 8
    word = engine.vocabulary.encode(b" word")
    prompt = (word * engine.context_length)[: engine.context_length - room]
    request = replace(request_for(engine, "x", max_tokens=room), prompt_token_ids=prompt)
    try:
        async with asyncio.timeout(60):
            written = await write(engine, request)
    except TimeoutError:
        findings.check("all pages are free afterwards", False, why="a prompt that needs them waits for ever")
        return
    findings.check("all pages are free afterwards", written.tokens > 0, prompt_tokens=len(prompt))


async def check_broken_step(
    findings: Findings, engine: Engine, break_a_step: Callable[[], None], *, slots: int
) -> None:
    """A step breaks in the middle: all answers go on and follow their grammars, and none waits for ever.

    Args:
        break_a_step: makes the library raise within the next step, once.
    """
    backend = LLGuidanceBackend(engine.vocabulary)
    (work, *_) = works()
    grammar = compile_work(backend, work.kind, work.source)
    requests = [
        request_for(engine, f"Text {number}. ", max_tokens=400, state=grammar.start())
        for number in range(slots)
    ]
    written = tokens_of(engine)
    tasks = [asyncio.create_task(write(engine, request)) for request in requests]
    try:
        # More than a grammar forces before the prompt is read.
        await until_written(engine, written + _TOKENS_BEFORE_BREAK * slots)
        break_a_step()
        async with asyncio.timeout(120):
            answers = await asyncio.gather(*tasks, return_exceptions=True)
    except TimeoutError:
        findings.check(
            "answers outlive a broken step, or one that was alone is told of it",
            False,
            why="they never ended",
        )
        return
    finally:
        for task in tasks:
            task.cancel()
    problems = [problem for answer in answers if (problem := problem_with(work, answer))]
    # One that was alone in the step is the one that broke it.
    is_told = slots == 1 and isinstance(answers[0], GallamaError)
    findings.check(
        "answers outlive a broken step, or one that was alone is told of it",
        is_told or not problems,
        answers=slots,
        problems=problems[:_TOLD_PROBLEMS],
    )
    problems = await write_all(engine, backend, slots)
    findings.check(
        "the engine computes after a broken step",
        not problems and await can_compute(engine),
        problems=problems[:_TOLD_PROBLEMS],
    )
