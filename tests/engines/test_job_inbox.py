"""How others reach the thread that computes."""

from __future__ import annotations

import threading

import pytest

from gallama.engines.answer_streams import Job
from gallama.engines.job_inbox import JobInbox
from gallama.errors import GallamaError, WorkerUnavailable
from gallama.generation import GenerationRequest, SamplingSettings

SECONDS = 20


def job() -> Job:
    return Job(GenerationRequest(prompt_token_ids=[1], max_tokens=1, sampling=SamplingSettings()))


def compute() -> None:
    pass


def test_jobs_are_received_in_order() -> None:
    inbox, jobs = JobInbox(), [job() for _ in range(3)]
    for one in jobs:
        inbox.submit(one)
    inbox.receive(may_sleep=False)
    assert list(inbox.waiting) == jobs


def test_jobs_on_their_way_count_like_those_that_wait() -> None:
    inbox = JobInbox()
    inbox.submit(job())
    inbox.receive(may_sleep=False)
    inbox.submit(job())
    assert len(inbox) == 2


def test_who_sleeps_is_woken() -> None:
    inbox = JobInbox()
    sleeper = threading.Thread(target=lambda: inbox.receive(may_sleep=True), daemon=True)
    sleeper.start()
    inbox.wake()
    sleeper.join(SECONDS)
    assert not sleeper.is_alive()


def test_jobs_that_were_cancelled_are_dropped() -> None:
    inbox, kept, dropped = JobInbox(), job(), job()
    for one in (dropped, kept):
        inbox.submit(one)
    inbox.receive(may_sleep=False)
    dropped.cancelled = True
    inbox.drop_cancelled()
    assert list(inbox.waiting) == [kept]


def test_a_probe_is_done_once_something_was_computed() -> None:
    inbox = JobInbox()
    beside_a_step = inbox.probe()
    inbox.receive(may_sleep=False)
    inbox.answer_probes(None)
    beside_a_step.result(SECONDS)
    alone = inbox.probe()
    inbox.receive(may_sleep=False)
    inbox.answer_probes(compute)
    alone.result(SECONDS)


def test_a_probe_tells_what_breaks_and_the_next_one_is_computed_anew() -> None:
    def broken() -> None:
        raise RuntimeError("no numbers")

    inbox = JobInbox()
    probe = inbox.probe()
    inbox.receive(may_sleep=False)
    inbox.answer_probes(broken)
    with pytest.raises(GallamaError, match="no numbers"):
        probe.result(SECONDS)
    probe = inbox.probe()
    inbox.receive(may_sleep=False)
    inbox.answer_probes(compute)
    probe.result(SECONDS)


def test_a_probe_for_which_nobody_waits_any_more_does_no_harm() -> None:
    inbox = JobInbox()
    probe = inbox.probe()
    assert probe.cancel()
    inbox.receive(may_sleep=False)
    inbox.answer_probes(compute)


def test_at_the_end_probes_are_refused() -> None:
    inbox = JobInbox()
    probe = inbox.probe()
    inbox.receive(may_sleep=False)
    inbox.refuse_probes(WorkerUnavailable("The model is being unloaded."))
    with pytest.raises(GallamaError, match="being unloaded"):
        probe.result(SECONDS)
