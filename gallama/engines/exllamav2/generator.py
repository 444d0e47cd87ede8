"""Texts in exllamav2's generator: a step for all of them, whose tokens are chosen here.

A text goes on in legs of some hundred tokens, since the library takes the pages for a whole job when it
starts. Between two legs it lies in the cache as it is, or waits until there is room.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gallama.engines.exllamav2.library import Leg, LegGenerator
from gallama.engines.exllamav2.loading import Models
from gallama.engines.exllamav2.options import LEG_TOKENS
from gallama.engines.exllamav2.sampling import Sampler
from gallama.engines.generators.settings import PAGE_TOKENS
from gallama.engines.generators.text import Text
from gallama.engines.logits import log_probabilities
from gallama.engines.processor_cores import usable_cores
from gallama.engines.step_cost import StepCost
from gallama.errors import ContextLengthExceeded, EngineFailed, GallamaError
from gallama.generation import Vocabulary

logger = logging.getLogger(__name__)

# A forced run is read as a prompt is, in a leg of its own, where that is done in so many steps less; it holds
# up each of the others by one.
_WORTH_A_LEG = 2
# Tokens of a prompt in a step, times all that they see, where the library cannot do without them all at once.
_MOST_PAIRS = 2048 * 2048


@dataclass(slots=True)
class _Kept:
    """What a text takes along from leg to leg."""

    sampler: Sampler
    last: Leg | None = None
    waiting: Leg | None = None
    """Made, but there was no room for it."""


class PagedGenerator:
    """A loaded model with the library's generator; see `generators.thread.Generator`."""

    def __init__(self, models: Models, vocabulary: Vocabulary, *, step_seconds: float) -> None:
        """Compute a first token, so that what does not work shows now.

        Args:
            step_seconds: how long a step may take because of a prompt while others write.

        Raises:
            Whatever computing raises.
        """
        self.slots = models.sizes.slots
        self.context_length = models.sizes.context_length
        self._models = models
        self._vocabulary = vocabulary
        self._unused = vocabulary.unused_token_ids()
        self._step_seconds = step_seconds
        self._cost = StepCost()
        self._legs: dict[Leg, Text] = {}
        self._kept: dict[Text, _Kept] = {}
        self._library = self._new_library()
        self._compute_alone()
        self._library.reset_page_table()

    def start(self, text: Text) -> bool:
        if not self._may_read(text):
            return False
        kept = self._kept_of(text)
        leg = kept.waiting
        if leg is None or leg.length != len(text.token_ids):
            leg = kept.waiting = self._new_leg(text, kept)
        if not self._library.has_room(leg):
            return False
        self._library.enqueue(leg)
        kept.last, kept.waiting = leg, None
        text.leg = leg
        self._legs[leg] = text
        return True

    def cancel(self, text: Text) -> None:
        leg: Leg | None = text.leg
        assert leg is not None, "only what has been started is cancelled"
        self._library.cancel(leg)
        self._legs.pop(leg, None)

    def step(self) -> None:
        if self._unread():
            self._read_in_time()
        else:
            self._library.iterate()
        for leg, text in list(self._legs.items()):
            text.check_drafts(drafted=leg.guessed, accepted=leg.accepted)
            if leg.is_over:
                del self._legs[leg]
                text.end_leg()

    def rebuild(self) -> None:
        self._library.end_threads()
        self._legs.clear()
        for kept in self._kept.values():
            kept.last = kept.waiting = None
        self._models.free_unused()
        self._library = self._new_library()

    def probe(self) -> None:
        if not self._models.is_tensor_parallel:
            self._check_numbers(self._models.logits_without_cache(self._vocabulary.probe_token_id))
            return
        # There the library computes nothing without its cache, of which this takes the oldest page.
        try:
            self._compute_alone()
        except BaseException:
            self.rebuild()
            raise

    def cached_tokens(self) -> int:
        return self._library.kept_tokens()

    def close(self) -> None:
        self._library.end_threads()
        self._legs.clear()
        self._kept.clear()  # whose legs hold the library's generator, and that the cache
        del self._library
        self._models.close()

    def _new_library(self) -> LegGenerator:
        models, sizes = self._models, self._models.sizes
        return LegGenerator(
            model=models.model,
            cache=models.cache,
            slots=sizes.slots,
            chunk=sizes.chunk,
            drafts=sizes.drafts,
            paged=models.is_paged,
            threads=min(sizes.slots, usable_cores()),
            token_ids=len(self._vocabulary.tokens),
            draft_model=models.draft_model,
            draft_cache=models.draft_cache,
            guesses_ngrams=models.guesses_ngrams,
        )

    def _may_read(self, text: Text) -> bool:
        """Whether a text may be read now: prompts wait for each other, but for short ones.

        One that goes on need not, for it lies in the cache.
        """
        kept, unread = self._kept.get(text), self._unread()
        goes_on = kept is not None and kept.last is not None
        return goes_on or not unread or unread + len(text.token_ids) <= self._chunk()

    def _chunk(self) -> int:
        """Tokens of a prompt that are read in a step; fewer while others write. Whole pages."""
        most = self._models.sizes.chunk
        if not self._models.is_paged and self._legs:
            # There the library has a number for each pair of tokens, to say which one sees the other.
            longest = max(leg.length for leg in self._legs)
            most = min(most, max(_MOST_PAIRS // longest // PAGE_TOKENS, 1) * PAGE_TOKENS)
        if not any(leg.is_writing for leg in self._legs):
            return most
        in_time = self._cost.tokens_within(self._step_seconds) // PAGE_TOKENS * PAGE_TOKENS
        return min(max(in_time, PAGE_TOKENS), most)

    def _read_in_time(self) -> None:
        """A step in which prompts are read, by as much as there is time for."""
        self._library.max_chunk_size = self._chunk()
        computed, start = self._computed(), time.perf_counter()
        self._library.iterate()
        if tokens := self._computed() - computed:
            # Where nobody writes, the library has only told the GPU what to do; the next step would wait.
            self._models.wait()
            self._cost.record(tokens, time.perf_counter() - start)

    def _unread(self) -> int:
        return sum(leg.unread for leg in self._legs)

    def _computed(self) -> int:
        return sum(leg.computed for leg in self._legs)

    def _kept_of(self, text: Text) -> _Kept:
        if text not in self._kept:
            # Nobody tells of those that have ended between two legs.
            self._kept = {other: kept for other, kept in self._kept.items() if _goes_on(other)}
            self._kept[text] = _Kept(self._new_sampler(text))
        return self._kept[text]

    def _new_sampler(self, text: Text) -> Sampler:
        return Sampler(
            text.job.request.sampling,
            prompt_length=text.prompt_length,
            vocabulary_size=len(self._vocabulary.tokens),
            unused_token_ids=self._unused,
        )

    def _new_leg(self, text: Text, kept: _Kept) -> Leg:
        """
        Raises:
            ContextLengthExceeded: the text can be no longer.
        """
        length = len(text.token_ids)
        room = min(text.room, self.context_length - length)
        if room <= 0:
            raise ContextLengthExceeded(f"The text has {length} tokens, and cannot go on.")
        most = min(room, LEG_TOKENS) if self._models.is_paged else room
        return Leg(
            text.token_ids,
            most_tokens=most + self._models.sizes.drafts,
            choose=partial(self._choose, text, kept.sampler),
            forced_run=text.forced_run,
            earlier=kept.last,
        )

    def _choose(
        self, text: Text, sampler: Sampler, leg: Leg, logits: NDArray[np.float32]
    ) -> tuple[int, bool]:
        """See `Leg`. Legs are asked side by side, on threads of the library's."""
        text.begin(leg.read_from_cache)
        try:
            token = self._take_next(text, sampler, logits[: len(self._vocabulary.tokens)])
        except BaseException as error:  # what is raised here would break the step for all
            if not isinstance(error, GallamaError):
                logger.exception("a token could not be chosen")
            text.fail(error)
            token = self._vocabulary.end_token_id
        return token, text.outcome is not None or self._is_better_read(text)

    def _take_next(self, text: Text, sampler: Sampler, logits: NDArray[np.float32]) -> int:
        token = sampler.sample(logits, text.mask(), text.token_ids)
        wanted = text.job.request.logprobs
        text.take(token, None if wanted is None else log_probabilities(logits, token, wanted))
        return token

    def _is_better_read(self, text: Text) -> bool:
        """Whether so long a run is forced that a new leg, which reads it at once, is faster than drafts."""
        if not self._models.is_paged:
            return False
        steps = _WORTH_A_LEG + len(self._legs)
        tokens = steps * (1 + self._library.width(len(self._legs)))
        return len(text.forced_run(tokens + 1)) > tokens

    def _compute_alone(self) -> None:
        """Compute a token for nobody, in the way in which those of texts are computed.

        Raises:
            EngineFailed: that gives no numbers; or whatever computing raises.
        """
        rows: list[NDArray[np.float32]] = []

        def keep(leg: Leg, logits: NDArray[np.float32]) -> tuple[int, bool]:
            rows.append(logits.copy())
            return self._vocabulary.end_token_id, True

        leg = Leg(
            [self._vocabulary.probe_token_id],
            most_tokens=1 + self._models.sizes.drafts,
            choose=keep,
            forced_run=lambda most: [],
        )
        self._library.enqueue(leg)
        while not leg.is_over:
            self._library.iterate()
        self._check_numbers(rows[-1])

    def _check_numbers(self, logits: NDArray[np.float32]) -> None:
        if not np.isfinite(logits[: len(self._vocabulary.tokens)].max()):
            raise EngineFailed("The model computes no numbers.")


def _goes_on(text: Text) -> bool:
    return text.outcome is None and not text.job.cancelled
