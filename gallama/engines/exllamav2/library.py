"""What is used of exllamav2 0.3.2 that it promises to nobody, all of it here.

    receive_logits        asks for a text's next token, once for each that it gets; drafts that turn out wrong
                          are never asked for. It may be called on a thread of the library's own
    iterate_*_gen         propose the drafts of a step: a tensor with a row for each text that writes
    get_paged_params      makes what a pass is told of its rows, which mask goes to PyTorch's attention, too
    pages                 are taken for a whole job when it starts, and asked for here beforehand

What is raised in the middle of `iterate` leaves a page table on which the next step may never end, so after
that the generator must be made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from exllamav2.attn_params import Params
from exllamav2.ext import none_tensor
from exllamav2.generator import ExLlamaV2DynamicGenerator, ExLlamaV2DynamicJob
from numpy.typing import NDArray

# Beyond so many rows the library computes with weights that it has unpacked before, and without CUDA graphs.
_MOST_ROWS = 32


class Leg(ExLlamaV2DynamicJob):  # type: ignore[misc]
    """A job of the library whose tokens somebody else chooses."""

    def __init__(
        self,
        token_ids: Sequence[int],
        *,
        most_tokens: int,
        choose: Callable[[Leg, NDArray[np.float32]], tuple[int, bool]],
        forced_run: Callable[[int], list[int]],
        earlier: Leg | None = None,
    ) -> None:
        """
        Args:
            token_ids: of the prompt and the answer so far.
            most_tokens: to add to them; the library ends earlier by the length of a draft.
            choose: gives the next token for a row of logits, shape (padded vocabulary,), which the next step
                overwrites; and whether it is the last. Must not raise.
            forced_run: as `Text.forced_run`.
            earlier: of the same text, which has grown since; what was learned for n-grams goes on.
        """
        super().__init__(
            input_ids=torch.tensor([token_ids], dtype=torch.long), max_new_tokens=most_tokens, max_skips=0
        )
        self._choose_token = choose
        self.forced_run = forced_run
        if earlier is not None:
            self.ngrams: Any = earlier.ngrams
            self.ngram_position: int = earlier.ngram_position
        self._accepted_before = 0
        self._forced_drafts = 0
        self.guessed = 0
        """Tokens that were guessed ahead for it in the last step."""

    def receive_logits(self, logits: torch.Tensor) -> tuple[torch.Tensor, Any, Any, Any, bool]:
        token, is_last = self._choose_token(self, logits[0, 0].numpy())
        return torch.tensor([[token]]), none_tensor, none_tensor, none_tensor, is_last

    @property
    def is_over(self) -> bool:
        ended: bool = self.is_finished
        return ended

    @property
    def is_writing(self) -> bool:
        """Whether it takes part in a step with its next token, its prompt having been read."""
        return self.sequences[0].allocated_pages is not None and bool(self.is_prefill_done())

    @property
    def length(self) -> int:
        tokens: int = len(self.sequences[0].sequence_ids)
        return tokens

    @property
    def unread(self) -> int:
        """Tokens that must be read before it can write, less what is known to be cached."""
        return 0 if self.is_over else self.length - 1 - self._position

    @property
    def computed(self) -> int:
        """Tokens that are in the cache by its own computing."""
        return self._position - self.read_from_cache

    @property
    def read_from_cache(self) -> int:
        return int(self.cached_pages * self.generator.page_size + self.cached_tokens)

    @property
    def _position(self) -> int:
        position: int = self.sequences[0].kv_position
        return position

    @property
    def accepted(self) -> int:
        """How many of the guesses of the last step were right."""
        accepted: int = self.accepted_draft_tokens - self._accepted_before - self._forced_drafts
        return max(0, min(accepted, self.guessed))

    def begin_step(self) -> None:
        self._accepted_before, self._forced_drafts, self.guessed = self.accepted_draft_tokens, 0, 0

    def note_drafts(self, *, forced: int, guessed: int) -> None:
        self._forced_drafts, self.guessed = forced, guessed


class _CausalParams(Params):  # type: ignore[misc]
    """What a pass without pages is told.

    Without flash-attn the library takes this mask for PyTorch's attention, and there is none: each token of a
    prompt or a draft would see those behind it.
    """

    def get_block_diag_mask(self, device: Any) -> torch.Tensor | None:
        mask: torch.Tensor | None = self.get_attn_mask(device)
        return mask


class LegGenerator(ExLlamaV2DynamicGenerator):  # type: ignore[misc]
    """The library's generator, with runs that grammars force as the first of all drafts."""

    def __init__(
        self,
        *,
        model: Any,
        cache: Any,
        slots: int,
        chunk: int,
        drafts: int,
        paged: bool,
        threads: int,
        token_ids: int,
        draft_model: Any = None,
        draft_cache: Any = None,
        guesses_ngrams: bool = False,
    ) -> None:
        """
        Args:
            drafts: tokens that a text may have in a step beside the one that it is sure of.
            threads: that choose tokens where three texts or more are computed.
            token_ids: how many there are; the models may have more.
            guesses_ngrams: without a draft model.
        """
        super().__init__(
            model=model,
            cache=cache,
            tokenizer=_NoText(),
            max_batch_size=slots,
            max_chunk_size=chunk,
            max_q_size=drafts + 1,
            draft_model=draft_model,
            draft_cache=draft_cache,
            num_draft_tokens=drafts,
            # So that it asks for drafts in any case.
            use_ngram_draft=draft_model is None,
            max_sampling_threads=max(2, threads),
            paged=paged,
            filter_background_eval=False,
        )
        self.num_draft_tokens: int = drafts
        self._guesses_ngrams = guesses_ngrams
        self._token_ids = token_ids

    def has_room(self, leg: Leg) -> bool:
        """Whether a leg could start now, with all that are to start before it."""
        if leg.generator is None:
            leg.prepare_for_queue(self, 0)
        ahead = sum(job.current_new_pages_required() for job in self.pending_jobs)
        return bool(leg.current_new_pages_required() + ahead <= len(self.unreferenced_pages))

    def width(self, legs: int) -> int:
        """How many tokens ahead so many legs go in a step: fewer, the more they are."""
        return int(min(self.num_draft_tokens, max(0, _MOST_ROWS // legs - 1))) if legs else 0

    def kept_tokens(self) -> int:
        """Tokens in the cache, of texts under way and of those before."""
        return sum(int(page.kv_position) for page in self.all_pages)

    def end_threads(self) -> None:
        """Wait for what its threads are at, and end them."""
        self.sampling_pool.shutdown(wait=True)

    def iterate(self) -> list[Any]:
        for leg in self.active_jobs:
            leg.begin_step()
        results: list[Any] = super().iterate()
        return results

    def get_paged_params(self, *args: Any, **kwargs: Any) -> Any:
        params = super().get_paged_params(*args, **kwargs)
        if self.paged:
            return params
        return _CausalParams(
            params.batch_size,
            params.seq_len,
            params.past_len,
            alt_rope_embed=params.alt_rope_embed_dict,
            rope_offsets=params.rope_offsets,
        )

    def iterate_ngram_gen(self, results: list[Any]) -> torch.Tensor | None:
        legs = [leg for leg in self.active_jobs if leg.is_writing]
        width = self.width(len(legs))
        # The library looks up the last tokens of a text, and takes it that there are so many.
        can_guess = width and all(leg.length >= self.max_ngram for leg in legs)
        if not (self._guesses_ngrams and can_guess):
            return self._draft_forced(legs, width)
        return self._put_forced(legs, super().iterate_ngram_gen(results)[:, :width])

    def iterate_draftmodel_gen(self, results: list[Any]) -> torch.Tensor | None:
        legs = [leg for leg in self.active_jobs if leg.is_writing]
        if not legs:
            return None
        width = self.width(len(legs))
        most = self.num_draft_tokens
        # With a width of 0, the draft model only reads what was written.
        self.num_draft_tokens = width
        try:
            super().iterate_draftmodel_gen(results)
        finally:
            self.num_draft_tokens = most
        if not width:
            return None
        # The draft model may have ids behind the last token.
        return self._put_forced(
            legs, self.draft_ids_pinned[: len(legs), :width].clamp_(max=self._token_ids - 1)
        )

    def _draft_forced(self, legs: Sequence[Leg], width: int) -> torch.Tensor | None:
        """Runs that are forced, and nothing else; None where there are none."""
        runs = [leg.forced_run(width) for leg in legs]
        longest = max(map(len, runs), default=0)
        if not longest:
            return None
        for leg, run in zip(legs, runs, strict=True):
            leg.note_drafts(forced=len(run), guessed=0)
        # Beyond a run stands any token; it is computed, and refused.
        return torch.tensor([run + [0] * (longest - len(run)) for run in runs], dtype=torch.long)

    def _put_forced(self, legs: Sequence[Leg], guesses: torch.Tensor) -> torch.Tensor:
        """Guesses, shape (legs, width), with the runs that are forced in their place."""
        width = guesses.shape[1]
        for leg, row in zip(legs, guesses, strict=True):
            run = leg.forced_run(width)
            forced = len(run)
            # What was guessed behind another text is worth nothing.
            is_in_step = row[:forced].tolist() == run
            row[:forced] = torch.tensor(run, dtype=torch.long)
            leg.note_drafts(forced=forced, guessed=width - forced if is_in_step else 0)
        return guesses


class _NoText:
    """In place of the library's tokenizer, which would make text of each token: that is done elsewhere."""

    def get_id_to_piece_list(self, include_special_tokens: bool = False) -> _EmptyPieces:
        return _EmptyPieces()


class _EmptyPieces:
    def __getitem__(self, token_id: int) -> str:
        return ""
