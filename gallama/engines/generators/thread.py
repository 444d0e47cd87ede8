"""The one thread that a library's generator lives on: it loads the model, and computes step after step.

When a step breaks, the library's generator is made anew over the same memory, and the oldest text goes on
alone until it has ended: one that breaks alone ends in the error, and the others go on from where they were.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import Protocol

from gallama.engines.answer_streams import Job, Outbox, Sink
from gallama.engines.generators.text import Text, as_told
from gallama.engines.job_inbox import JobInbox
from gallama.errors import EngineFailed, GallamaError, WorkerUnavailable
from gallama.generation import EngineStatus, Vocabulary

logger = logging.getLogger(__name__)

# While texts are at work, the cache is counted no more often: a library walks all of its pages for that.
_COUNT_SECONDS = 1.0


class Generator(Protocol):
    """A library's generator with its model. Made and used by one thread, and by no other."""

    slots: int
    """Texts that it computes side by side, at most."""
    context_length: int
    """Tokens of prompt and answer together that one text may have."""

    def start(self, text: Text) -> bool:
        """Begin a leg over what is written of a text, and set `text.leg`.

        Returns:
            False: there is no room now; to be asked again after a step. Only while others are under way.

        Raises:
            GallamaError, or anything else: this text cannot be computed.
        """
        ...

    def cancel(self, text: Text) -> None:
        """End a text's leg between two steps; its place in the cache is free at once."""
        ...

    def step(self) -> None:
        """Compute one step of all legs, and tell the texts what came of it.

        A leg that is over is ended by `text.end_leg`. If the text has no outcome then, it gets another one.

        Raises:
            Anything: the step broke, and all legs are lost.
        """
        ...

    def rebuild(self) -> None:
        """After a step that broke: forget all legs and what the cache holds."""
        ...

    def probe(self) -> None:
        """Compute a token for nobody; the cache stays as it is.

        Raises:
            Anything: that did not work, or gave no numbers.
        """
        ...

    def cached_tokens(self) -> int: ...

    def close(self) -> None:
        """Give all memory back."""
        ...


class GeneratorThread:
    """Runs jobs until they end, side by side. Its public methods may be called from any thread."""

    def __init__(
        self, make_generator: Callable[[], Generator], vocabulary: Vocabulary, sink: Sink, *, name: str
    ) -> None:
        """
        Args:
            make_generator: loads the model; called on the thread.
            name: of the thread.
        """
        self._make_generator = make_generator
        self._vocabulary = vocabulary
        self._inbox = JobInbox()
        self._outbox = Outbox(sink)
        self._texts: list[Text] = []
        """Those that have a slot, the oldest first."""
        self._alone: Text | None = None
        """The only text that is computed, to see whether it is the one that breaks."""
        self._is_defective = False
        """Whether nothing can be computed any more."""
        self._cached_tokens = 0
        self._counted_at = -_COUNT_SECONDS
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._loaded: Future[int] = Future()

    def start(self) -> int:
        """Load the model; the length of its context. Blocks for as long as that takes.

        Raises:
            Whatever loading raises.
        """
        self._thread.start()
        return self._loaded.result()

    def submit(self, job: Job) -> None:
        self._inbox.submit(job)

    def probe(self) -> Future[None]:
        """Compute a token and forget it, unless something is computed anyway; done once that has worked."""
        return self._inbox.probe()

    def cancel(self, job: Job) -> None:
        """End a job; its slot is free at the next step."""
        job.cancelled = True

    def status(self) -> EngineStatus:
        return EngineStatus(
            busy_slots=len(self._texts),
            waiting=len(self._inbox),
            cached_tokens=self._cached_tokens,
            **asdict(self._outbox.totals),
        )

    def close(self) -> None:
        """End after the step at hand, and give all memory back; jobs under way end in an error."""
        self._is_closing = True
        self._inbox.wake()
        self._thread.join()

    def _run(self) -> None:
        try:
            generator = self._make_generator()
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(generator.context_length)
        while not self._is_closing:
            self._inbox.receive(may_sleep=not (self._texts or self._inbox.waiting))
            try:
                self._turn(generator)
            except BaseException as error:  # this thread must outlive every bug, or nobody answers
                logger.exception("what runs the answers broke; %d of them are lost", len(self._texts))
                self._give_up(generator, as_told(error))
        self._end_all(generator)

    def _turn(self, generator: Generator) -> None:
        self._drop_cancelled(generator)
        self._take_waiting(generator.slots)
        self._start_legs(generator)
        has_computed = self._step(generator)
        self._publish(generator)
        self._inbox.answer_probes(None if has_computed else partial(self._compute_for_nobody, generator))

    def _drop_cancelled(self, generator: Generator) -> None:
        self._inbox.drop_cancelled()
        self._leave(generator, [text for text in self._texts if text.job.cancelled])

    def _take_waiting(self, slots: int) -> None:
        waiting = self._inbox.waiting
        while waiting and len(self._texts) < slots:
            self._texts.append(Text(waiting.popleft(), self._vocabulary))

    def _start_legs(self, generator: Generator) -> None:
        """Start what has no leg, in order; nobody overtakes one for which there is no room."""
        for text in self._texts if self._alone is None else [self._alone]:
            if self._is_defective:
                text.fail(_defect())
            if text.leg is None and text.outcome is None and not self._start_leg(generator, text):
                return

    def _start_leg(self, generator: Generator, text: Text) -> bool:
        """Whether the next one may be started, too."""
        text.append_forced()
        if text.outcome is not None:
            return True
        try:
            has_started = generator.start(text)
        except BaseException as error:
            if not isinstance(error, GallamaError):
                logger.exception("an answer could not be started")
            text.fail(error)
            return True
        if not has_started and not self._running():
            text.fail(EngineFailed("The engine has no room for this answer, though it computes no other."))
            return True
        assert not has_started or text.leg is not None, "what has started has a leg"
        return has_started

    def _running(self) -> list[Text]:
        return [text for text in self._texts if text.leg is not None]

    def _step(self, generator: Generator) -> bool:
        """Whether something was computed."""
        running = self._running()
        if not running:
            return False
        try:
            generator.step()
        except BaseException as error:
            logger.exception("a step with %d answers broke", len(running))
            told = as_told(error)
        else:
            self._outbox.totals.steps += 1
            return True
        # Only here, where nobody holds the tensors of the broken step any more.
        self._go_on_alone(generator, running, told)
        return False

    def _go_on_alone(self, generator: Generator, running: list[Text], error: GallamaError) -> None:
        """After a step that broke: the oldest text is computed alone until it has ended.

        Args:
            running: those that were in the step.
        """
        if len(running) == 1:
            running[0].fail(error)
        self._alone = running[0]
        self._rebuild(generator)

    def _rebuild(self, generator: Generator) -> None:
        """Make the library forget all legs; the texts get new ones."""
        for text in self._texts:
            text.step_back()
            text.end_leg()
        try:
            generator.rebuild()
        except BaseException:
            logger.exception("the generator could not be made anew")
            self._is_defective = True

    def _publish(self, generator: Generator) -> None:
        """Hand over what is new, and let go of what has ended, before anybody hears of that."""
        self._tell_of(self._texts)
        self._leave(generator, [text for text in self._texts if text.outcome is not None])
        self._outbox.hand_over()

    def _tell_of(self, texts: Sequence[Text]) -> None:
        for text in texts:
            for update in text.take_updates():
                self._outbox.tell(text.job, update)

    def _leave(self, generator: Generator, texts: Sequence[Text]) -> None:
        """Free the slots of texts that go on no more."""
        for text in texts:
            self._texts.remove(text)
            if text is self._alone:
                self._alone = None
            if text.leg is not None:
                self._cancel(generator, text)
        if texts and not self._is_defective:
            self._count_cached(generator)

    def _cancel(self, generator: Generator, text: Text) -> None:
        try:
            generator.cancel(text)
        except BaseException:
            logger.exception("an answer could not be cancelled; all are started again")
            self._rebuild(generator)
        text.end_leg()

    def _count_cached(self, generator: Generator) -> None:
        """For the status alone, so it costs nobody an answer, nor those that write much time."""
        now = time.monotonic()
        if self._texts and now - self._counted_at < _COUNT_SECONDS:
            return
        self._counted_at = now
        try:
            self._cached_tokens = generator.cached_tokens()
        except BaseException:
            logger.exception("the cached tokens could not be counted")

    def _compute_for_nobody(self, generator: Generator) -> None:
        if self._is_defective:
            raise _defect()
        generator.probe()
        self._outbox.totals.steps += 1

    def _give_up(self, generator: Generator, error: GallamaError) -> None:
        """End all texts in an error."""
        texts, self._texts, self._alone = self._texts, [], None
        self._rebuild(generator)
        for text in texts:
            text.fail(error)
        self._tell_of(texts)
        self._outbox.hand_over()

    def _end_all(self, generator: Generator) -> None:
        """Let everybody know that there will be no more steps, also those who came only now."""
        error = WorkerUnavailable("The model is being unloaded.")
        self._inbox.receive(may_sleep=False)
        self._texts += [Text(job, self._vocabulary) for job in self._inbox.waiting]
        self._inbox.waiting.clear()
        for text in self._texts:
            text.fail(error)
        self._publish(generator)
        self._inbox.refuse_probes(error)
        try:
            generator.close()
        except BaseException:
            logger.exception("the generator could not be closed")


def _defect() -> EngineFailed:
    """One for each: what is raised again and again keeps the frames of all who have raised it."""
    return EngineFailed("The model cannot be computed any more; it must be loaded again.")
