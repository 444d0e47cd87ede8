"""An answer under way in a library's generator.

The library calls back for masks and with tokens in the middle of a step for everybody. What is raised there
would break the step for all, so nothing here raises: what goes wrong becomes the outcome of the one text.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gallama.engines.answer_streams import DraftChecked, Ended, Job, Started, TokensAdded, Update
from gallama.errors import ConstraintFailed, EngineFailed, GallamaError, NotEnoughMemory
from gallama.generation import TokenLogprob, Vocabulary

logger = logging.getLogger(__name__)


class Text:
    """A prompt and its answer so far, which must follow a grammar if there is one.

    It is computed in legs: each is one job of the library, over all that is written by then. Where a text
    goes on in a new leg, and why, the library need not know. Used by one thread at a time.
    """

    def __init__(self, job: Job, vocabulary: Vocabulary) -> None:
        request = job.request
        self.job = job
        self.prompt_length = len(request.prompt_token_ids)
        self.token_ids = list(request.prompt_token_ids)
        """Of the prompt and the answer, without the token that ends it."""
        self.leg: Any | None = None
        """The library's job; None: it needs one."""
        self.outcome: Ended | GallamaError | None = None
        """Set once there will be no more tokens."""
        self._vocabulary = vocabulary
        self._state = request.state
        self._keeps_choices = request.logprobs is not None
        """Whether all tokens must be computed one by one, since their log probabilities are wanted."""
        self._mask = np.zeros((len(vocabulary.tokens) + 31) // 32, dtype=np.int32)
        self._allows_all = True
        self._run: deque[int] = deque()
        """Forced tokens that come next."""
        self._has_begun = False
        self._begun: list[Update] = []
        self._taken: deque[tuple[int, bool]] = deque()
        """Tokens that nobody was told of yet, and whether each was forced."""
        self._scores: deque[TokenLogprob] = deque()
        self._checked: list[Update] = []

    @property
    def room(self) -> int:
        """Tokens that the answer may still grow by."""
        return self.job.request.max_tokens - (len(self.token_ids) - self.prompt_length)

    @property
    def is_constrained(self) -> bool:
        return self._state is not None

    def append_forced(self) -> None:
        """Before a leg: what the grammar leaves no choice about is read with the prompt."""
        if self.room <= 0 and self.outcome is None:
            self.outcome = Ended("length")
        self._guard(self._settle)
        while self._run and self.outcome is None:
            run, self._run = list(self._run), deque()
            self._guard(partial(self._advance, run))
            if self.outcome is None:
                self._add(run, were_forced=True)
                self._guard(self._settle)

    def mask(self) -> NDArray[np.int32] | None:
        """The tokens that may come next, packed as in `State.mask`; None: all.

        At least one bit is set. It is of the same array each time, which the next call changes.
        """
        if self.outcome is not None:
            return self._only(self._vocabulary.end_token_id)
        if self._run:
            return self._only(self._run[0])
        self._guard(self._compute_mask)
        if self.outcome is not None:
            return self._only(self._vocabulary.end_token_id)
        return None if self._allows_all else self._mask

    def forced_run(self, most: int) -> list[int]:
        """What must come next, as far as it is known; [] where there is a choice."""
        return [] if self.outcome is not None or not self._run else list(islice(self._run, most))

    def take(self, token_id: int, logprob: TokenLogprob | None = None) -> None:
        """Go on with a token that was chosen by the last mask; nothing, if the text has ended."""
        if self.outcome is not None:
            return
        if not self._allows(token_id):
            self.fail(EngineFailed("The engine chose a token that is not allowed."))
        elif token_id in self._vocabulary.end_token_ids:
            self.outcome = Ended("stop")
        else:
            self._take(token_id, logprob)

    def score(self, logprobs: Iterable[TokenLogprob]) -> None:
        """Tell the log probabilities of taken tokens, in their order, where `take` was not told."""
        self._scores.extend(logprobs)

    def begin(self, cached_tokens: int) -> None:
        """The prompt was read, so many of its tokens from the cache; only the first leg counts."""
        if not self._has_begun:
            self._has_begun = True
            self._begun.append(Started(min(cached_tokens, self.prompt_length)))

    def check_drafts(self, *, drafted: int, accepted: int) -> None:
        if drafted:
            self._checked.append(DraftChecked(drafted, accepted))

    def end_leg(self) -> None:
        self.leg = None

    def fail(self, error: BaseException) -> None:
        """End in an error, unless the text has ended already."""
        if self.outcome is None:
            self.outcome = as_told(error)

    def step_back(self) -> None:
        """After a step that broke: forget tokens of which it should have told the log probabilities."""
        unscored = len(self._taken) - len(self._scores) if self._keeps_choices else 0
        if unscored <= 0 or isinstance(self.outcome, GallamaError):
            return
        self.outcome = None
        for _ in range(unscored):
            self._taken.pop()
        del self.token_ids[-unscored:]
        if self._state is not None:
            self._guard(partial(self._state.rollback, unscored))

    def take_updates(self) -> list[Update]:
        """What is new since the last call, in order; the outcome comes last."""
        added = self._added() if self._taken else []
        if added or isinstance(self.outcome, Ended):
            self.begin(0)
        updates = [*self._begun, *added, *self._checked]
        self._begun, self._checked = [], []
        return updates if self.outcome is None else [*updates, self.outcome]

    def _added(self) -> list[Update]:
        """Sampled tokens one by one, forced ones by the run."""
        told = min(len(self._taken), len(self._scores)) if self._keeps_choices else len(self._taken)
        added: list[Update] = []
        run: list[int] = []
        for _ in range(told):
            token, was_forced = self._taken.popleft()
            if was_forced:
                run.append(token)
                continue
            if run:
                added.append(TokensAdded(tuple(run), were_forced=True))
                run = []
            logprobs = (self._scores.popleft(),) if self._keeps_choices else ()
            added.append(TokensAdded((token,), were_forced=False, logprobs=logprobs))
        if run:
            added.append(TokensAdded(tuple(run), were_forced=True))
        return added

    def _take(self, token_id: int, logprob: TokenLogprob | None) -> None:
        was_forced = bool(self._run)
        if was_forced:
            self._run.popleft()
        if self._state is not None:
            self._guard(partial(self._advance, [token_id]))
            if self.outcome is not None:
                return
        if logprob is not None:
            self._scores.append(logprob)
        self._add([token_id], were_forced=was_forced)
        if self._state is not None and not self._run:
            self._guard(self._settle)

    def _add(self, token_ids: list[int], *, were_forced: bool) -> None:
        self.token_ids += token_ids
        self._taken.extend((token, were_forced) for token in token_ids)
        if self._state is not None and self._state.status == "must_end":
            self.outcome = Ended("stop")
        elif self.room <= 0:
            self.outcome = Ended("length")

    def _settle(self) -> None:
        """See what the grammar forces behind what is written."""
        if self._state is not None and self.outcome is None and not self._run and not self._keeps_choices:
            self._run.extend(self._state.forced()[: self.room])

    def _advance(self, token_ids: list[int]) -> None:
        if self._state is not None and self._state.advance(token_ids) != len(token_ids):
            raise ConstraintFailed("The constraint engine gave up in the middle of the answer.")

    def _compute_mask(self) -> None:
        self._allows_all = self._state is None or not self._state.mask(self._mask)
        if not self._allows_all and not self._mask.any():
            raise ConstraintFailed("The constraint leaves no token to go on with.")

    def _only(self, token_id: int) -> NDArray[np.int32]:
        self._allows_all = False
        self._mask[:] = 0
        self._mask.view(np.uint32)[token_id >> 5] = 1 << (token_id & 31)
        return self._mask

    def _allows(self, token_id: int) -> bool:
        if not 0 <= token_id < len(self._vocabulary.tokens):
            return False
        if self._state is None or self._allows_all:
            return True
        return bool(self._mask.view(np.uint32)[token_id >> 5] >> (token_id & 31) & 1)

    def _guard(self, action: Callable[[], object]) -> None:
        """Keep what the constraint engine raises from the library. Rust panics are BaseExceptions, too."""
        try:
            action()
        except BaseException as error:
            if not isinstance(error, GallamaError):
                logger.exception("a constraint broke")
            self.fail(error)


def as_told(error: BaseException) -> GallamaError:
    """What a client is told of something that broke; the log has it in full."""
    if isinstance(error, GallamaError):
        return error
    # PyTorch's class for that is a RuntimeError like many others, and is not imported for this.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return NotEnoughMemory("There is too little memory to compute this answer any further.")
    return GallamaError("The answer could not be generated any further.")
