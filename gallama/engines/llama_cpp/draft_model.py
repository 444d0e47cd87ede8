"""A small model that guesses what a large one will say; see `speculation.py`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gallama.config import ModelSpec
from gallama.engines.draft_vocabulary import check_same_vocabulary
from gallama.engines.llama_cpp.bindings import (
    CACHE_TYPES,
    ContextOptions,
    DecodeFailed,
    KvCacheFull,
    ModelOptions,
    NativeContext,
    NativeModel,
    max_gpus,
    supports_gpus,
)
from gallama.engines.llama_cpp.context import BatchPart, CachedSequence, SequenceCache, common_prefix
from gallama.engines.llama_cpp.speculation import (
    NO_DRAFT,
    Draft,
    Drafter,
    NgramDrafter,
    Wish,
    errors_end_the_draft,
)
from gallama.engines.logits import allowed_tokens
from gallama.errors import GallamaError, InvalidConfig
from gallama.generation import State, Vocabulary

logger = logging.getLogger(__name__)

# A guess that the draft model itself believes in less than this is wrong too often to be worth its place.
MIN_PROBABILITY = 0.4
# A text that the draft model has not read yet is read in pieces of this many tokens, one a step, so that
# other answers do not stand still.
READ_TOKENS_PER_STEP = 128


def load_drafter(
    spec: ModelSpec,
    *,
    target: NativeModel,
    vocabulary: Vocabulary,
    target_options: ModelOptions,
    context_options: ContextOptions,
    context_length: int,
    shelf_tokens: int = 0,
) -> Drafter | None:
    """What guesses tokens for a model, as its spec says; None: nothing does.

    Args:
        vocabulary: the target's.
        target_options: how the target was loaded; the draft model is loaded alike where the spec is silent.
        context_options: those of the target's context.
        context_length: tokens that one text may have.
        shelf_tokens: of finished texts, kept in the machine's memory beside the draft model's cache.

    Raises:
        InvalidConfig: the models cannot work together, or the draft model is to be loaded in a way that
            this build of llama.cpp cannot.
        ModelLoadFailed: llama.cpp refused the draft model, or there is too little memory.
    """
    if spec.speculation == "off":
        return None
    if not target.can_forget_partly:
        raise InvalidConfig(
            f"`speculative` is {spec.speculation}, but the model {spec.model_name or spec.model_id!r} cannot"
            " take tokens back: it sums up what it has read in a state. Leave `speculative` and the draft's"
            " keys out."
        )
    if spec.speculation == "ngram":
        return NgramDrafter(vocabulary.end_token_ids)
    assert spec.draft_model_id is not None, "the spec has been validated"
    options = _draft_context_options(spec, context_options)
    model = NativeModel(Path(spec.draft_model_id), _draft_model_options(spec, target_options))
    logger.info("drafting with %s", spec.draft_model_name or spec.draft_model_id)
    try:
        return _draft_with(model, spec, vocabulary, options, context_length, shelf_tokens)
    except GallamaError:
        model.close()
        raise


def _draft_with(
    model: NativeModel,
    spec: ModelSpec,
    vocabulary: Vocabulary,
    options: ContextOptions,
    context_length: int,
    shelf_tokens: int,
) -> ModelDrafter:
    name = spec.draft_model_name or spec.draft_model_id
    if not model.can_forget_partly:
        raise InvalidConfig(
            f"The draft model {name!r} cannot take tokens back: it sums up what it has read in a state. Name"
            " another `draft_model_id`."
        )
    shared = check_same_vocabulary(vocabulary, model.read_vocabulary(()))
    context = NativeContext(model, options)

    def close() -> None:
        context.close()
        model.close()

    return ModelDrafter(
        SequenceCache(
            context,
            sequences=options.sequences,
            can_forget_partly=True,
            has_window=model.has_window,
            shelf_tokens=shelf_tokens,
        ),
        vocabulary_size=len(vocabulary.tokens),
        shared_tokens=shared,
        end_token_ids=vocabulary.end_token_ids,
        batch_tokens=options.batch_tokens,
        context_length=min(context_length, model.trained_context_length),
        set_threads=lambda threads: context.set_threads(threads, threads),
        close=close,
    )


def _draft_model_options(spec: ModelSpec, target: ModelOptions) -> ModelOptions:
    if spec.draft_gpus is None:
        return target
    gigabytes = () if isinstance(spec.draft_gpus, str) else spec.draft_gpus
    if any(gigabytes) and not supports_gpus():
        raise InvalidConfig(
            "`draft_gpus` asks for a GPU, but this build of llama.cpp has no GPU support. Install"
            " llama-cpp-python built for your GPU, or leave it out to run on the CPU."
        )
    if len(gigabytes) > max_gpus():
        raise InvalidConfig(
            f"`draft_gpus` names {len(gigabytes)} GPUs; llama.cpp takes at most {max_gpus()}."
        )
    hides_all_gpus = bool(gigabytes) and not any(gigabytes)
    return replace(target, gpu_layers=0 if hides_all_gpus else -1, gpu_split=gigabytes)


def _draft_context_options(spec: ModelSpec, target: ContextOptions) -> ContextOptions:
    cache_type = CACHE_TYPES[spec.draft_cache_quant] if spec.draft_cache_quant else target.cache_type
    if target.flash_attention is False and cache_type != CACHE_TYPES["FP16"]:
        raise InvalidConfig(
            f"`draft_cache_quant` is {spec.draft_cache_quant}, which needs flash attention; leave"
            " `flash_attn` out."
        )
    return replace(
        target,
        cells=spec.draft_cache_size or target.cells,
        cache_type=cache_type,
        # Texts of any length share one pool, and of each the last token's logits are all that is asked for.
        shares_cells=True,
        outputs=0,
        # They stretch the target's positions; the draft model has its own.
        rope_freq_base=0.0,
        rope_freq_scale=0.0,
    )


@dataclass(slots=True, eq=False)
class _Follower:
    """A slot's text as far as the draft model has read it, with the guesses that were computed behind."""

    sequence: CachedSequence
    verified_tokens: int = 0
    """How many of the sequence's tokens are known to be the text's."""


@dataclass(slots=True, eq=False)
class _Drafting:
    """A draft in the making."""

    wish: Wish
    sequence: CachedSequence
    pending: list[int]
    """What is to be computed before the next guess; [] once the draft is finished."""
    state: State | None
    """The grammar at the end of the draft."""
    token_ids: list[int] = field(default_factory=list)


class ModelDrafter:
    """Drafts greedily with a model, for all slots side by side: one batch for each place in the drafts."""

    def __init__(
        self,
        cache: SequenceCache,
        *,
        vocabulary_size: int,
        shared_tokens: int,
        end_token_ids: Collection[int],
        batch_tokens: int,
        context_length: int,
        set_threads: Callable[[int], None],
        close: Callable[[], None],
    ) -> None:
        """
        Args:
            cache: the draft model's, with at least as many sequences as there are slots.
            vocabulary_size: tokens of the target, which grammars are made for.
            shared_tokens: how many of them, from the first on, the draft model knows.
            context_length: the longest text, draft included, that the draft model is asked about.
        """
        self._cache = cache
        self._shared_tokens = shared_tokens
        self._end_token_ids = frozenset(end_token_ids)
        self._batch_tokens = batch_tokens
        self._context_length = context_length
        self._set_threads = set_threads
        self._close = close
        self.seconds_per_token = 0.0
        self._followers: dict[Hashable, _Follower] = {}
        self._given_up: set[Hashable] = set()
        self._mask = np.zeros((vocabulary_size + 31) // 32, dtype=np.int32)

    def draft(self, wishes: Sequence[Wish]) -> list[Draft]:
        start = time.perf_counter()
        drafts = {wish.key: self._begin(wish) for wish in wishes if self._is_possible(wish)}
        going_on = list(drafts.values())
        while going_on:
            for draft, logits in self._compute(going_on):
                self._extend(draft, logits)
            going_on = [draft for draft in going_on if draft.pending]
        self._learn_cost(sum(len(draft.token_ids) for draft in drafts.values()), time.perf_counter() - start)
        return [Draft(drafts[wish.key].token_ids) if wish.key in drafts else NO_DRAFT for wish in wishes]

    def _learn_cost(self, tokens: int, seconds: float) -> None:
        if tokens:
            # Reading a long prompt, once, must not count as what each token takes.
            seconds_each = min(seconds / tokens, 2 * (self.seconds_per_token or seconds))
            self.seconds_per_token += 0.2 * (seconds_each - self.seconds_per_token)

    def forget(self, key: Hashable) -> None:
        self._given_up.discard(key)
        follower = self._followers.pop(key, None)
        if follower is not None:
            self._cache.release(follower.sequence)

    def set_threads(self, threads: int) -> None:
        self._set_threads(threads)

    def close(self) -> None:
        self._close()

    def _is_possible(self, wish: Wish) -> bool:
        return (
            wish.most_tokens > 0
            and wish.key not in self._given_up
            and len(wish.token_ids) < self._context_length
        )

    def _begin(self, wish: Wish) -> _Drafting:
        """Bring the slot's sequence back to where it agrees with the text."""
        follower = self._followers.get(wish.key)
        if follower is None:
            sequence = self._cache.acquire(wish.token_ids)
            follower = self._followers[wish.key] = _Follower(sequence)
        else:
            sequence, start = follower.sequence, follower.verified_tokens
            same = start + common_prefix(sequence.token_ids[start:], wish.token_ids[start:])
            # The last token is computed again if need be: its logits are what is asked for.
            self._cache.shorten(sequence, min(same, len(wish.token_ids) - 1))
        follower.verified_tokens = len(sequence.token_ids)
        return _Drafting(
            wish,
            sequence,
            pending=wish.token_ids[follower.verified_tokens :],
            state=wish.state.clone() if wish.state is not None else None,
        )

    def _compute(self, drafts: list[_Drafting]) -> list[tuple[_Drafting, NDArray[np.float32]]]:
        """Compute what the drafts wait for; logits where all of it did fit. The others are finished."""
        parts = self._plan(drafts)
        rows: list[list[NDArray[np.float32]]] = []
        while parts and not rows:
            try:
                self._cache.decode([part for _, part in parts])
                rows = self._cache.logits([part for _, part in parts])
            except KvCacheFull:
                parts.remove(longest := max(parts, key=lambda item: len(item[0].wish.token_ids)))
                self._give_up(longest[0])
            except DecodeFailed:
                logger.exception("a batch of the draft model failed; answers at work go on without drafts")
                self._give_up_all()
                parts = []
        for draft in drafts:
            draft.pending = []
        return [(draft, row[0]) for (draft, _), row in zip(parts, rows, strict=True) if row]

    def _plan(self, drafts: list[_Drafting]) -> list[tuple[_Drafting, BatchPart]]:
        """Who gets how much of a batch: first those who need little."""
        parts, budget = [], self._batch_tokens
        for draft in sorted(drafts, key=lambda draft: len(draft.pending)):
            if max(draft.pending) >= self._shared_tokens:  # a token that the draft model has no idea of
                self._give_up(draft)
                continue
            piece = draft.pending[: min(budget, READ_TOKENS_PER_STEP)]
            budget -= len(piece)
            if piece:
                is_all = len(piece) == len(draft.pending)
                parts.append((draft, BatchPart(draft.sequence, piece, logits=int(is_all))))
        return parts

    def _extend(self, draft: _Drafting, logits: NDArray[np.float32]) -> None:
        """Add the next guess; its tokens are pending if there is more to come."""
        run: list[int] = []
        with errors_end_the_draft():
            run = self._next_run(draft.state, logits)
        text_tokens = len(draft.wish.token_ids)
        most_tokens = min(draft.wish.most_tokens, self._context_length - text_tokens)
        draft.token_ids = (draft.token_ids + run)[:most_tokens]
        if len(draft.token_ids) < most_tokens:
            draft.pending = run

    def _next_run(self, state: State | None, logits: NDArray[np.float32]) -> list[int]:
        """The likeliest token, and what the grammar forces behind it; [] where the draft ends."""
        if state is not None and state.status == "must_end":
            return []
        token = self._pick(state, logits)
        if token is None or state is None:
            return [] if token is None else [token]
        if state.advance([token]) != 1:
            return []
        forced = state.forced()
        return [token, *forced[: state.advance(forced)]]

    def _pick(self, state: State | None, logits: NDArray[np.float32]) -> int | None:
        """The likeliest token; None where it is unsure, or the end."""
        logits = logits[: self._shared_tokens]
        allowed = None if state is None else self._allowed(state)
        offered = logits if allowed is None else logits[allowed]
        if not len(offered):
            return None
        best = int(offered.argmax())
        token = best if allowed is None else int(allowed[best])
        probability = 1.0 / float(np.exp(offered - offered[best]).sum())
        return None if probability < MIN_PROBABILITY or token in self._end_token_ids else token

    def _allowed(self, state: State) -> NDArray[np.intp] | None:
        return allowed_tokens(self._mask, self._shared_tokens) if state.mask(self._mask) else None

    def _give_up(self, draft: _Drafting) -> None:
        """Draft no more for this slot: starting anew at each step would cost more than it could save."""
        self._given_up.add(draft.wish.key)
        self._cache.discard(self._followers.pop(draft.wish.key).sequence)

    def _give_up_all(self) -> None:
        self._given_up |= self._followers.keys()
        self._followers.clear()
        self._cache.discard_all()
