"""What this engine uses of exllamav3 beyond its documented interface, as it is in version 1.6.5.

Whoever moves to another version reads that one's `generator/generator.py`, `generator/job.py` and
`generator/sampler/custom.py` against this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from exllamav3 import Generator

from gallama.engines.exllamav3.drafts import NO_DRAFT, Draft, common_prefix, lay_out
from gallama.engines.generators.text import Text


class TextFilter:
    """One text in one of the library's jobs: asked for masks, and told each token as soon as it is chosen.

    The library calls what its `Filter` class has, and looks at no type. A text without a grammar has one too,
    for the tokens: what results tell of them comes late, held back until characters are whole.

    In a step, masks are asked for on threads of the library, while the model computes; all else comes from
    the generator's thread, which waits for them.
    """

    trigger_token = None

    def __init__(self, text: Text, all_tokens: torch.Tensor) -> None:
        """
        Args:
            all_tokens: the mask that allows all tokens that there are; shape (1, words), int32.
        """
        self._text = text
        self._all_tokens = all_tokens

    @property
    def is_active(self) -> bool:
        """Whether masks are wanted; without any, the library checks all guesses of a step at once."""
        return self._text.is_constrained

    @is_active.setter
    def is_active(self, _: bool) -> None:
        """Set by the library, for every filter, when its job starts."""

    def attach(self, job: Any) -> None:
        """Called when the job starts, for nothing here."""

    def reset(self) -> None:
        """As `attach`: the text is where it is."""

    def use_background_worker(self) -> bool:
        return True

    def get_next_logit_mask(self) -> torch.Tensor:
        """Shape (1, words); copied before the next call."""
        mask = self._text.mask()
        return self._all_tokens if mask is None else torch.from_numpy(mask)[None]

    def feed(self, token_id: int) -> bool:
        """Take a token, be it one that ends the text; whether the job is over."""
        self._text.take(token_id)
        return self._text.outcome is not None


@dataclass(frozen=True, slots=True)
class _Guess:
    """What was guessed for a job in this step."""

    tokens: int
    accepted_before: int
    """Of the job's count, which has forced tokens in it, too."""


class TextGenerator(Generator):  # type: ignore[misc]
    """The library's generator, which checks forced runs like drafts.

    It lays out the drafts itself: the library drops those by n-grams for all as soon as one text has none.
    """

    def __init__(
        self, *arguments: Any, texts: Mapping[Any, Text], vocabulary_size: int, **named: Any
    ) -> None:
        """
        Args:
            texts: the texts of the jobs that were enqueued.
            vocabulary_size: tokens that the model knows; a draft model may have padding beyond.
        """
        super().__init__(*arguments, **named)
        self._texts = texts
        self._vocabulary_size = vocabulary_size
        self._guesses: dict[Any, _Guess] = {}
        self._read_by_draft_model: dict[Any, int] = {}
        """Up to where the draft model's cache is that of a job's text; all of it, where nothing is noted."""
        follows_otherwise = self.draft_recurrent or self.mtp_draft or self.dflash_draft
        self._draft_model_has_cache = self.draft_model is not None and not follows_otherwise

    def has_room(self) -> bool:
        """Whether all jobs that were enqueued can start now, with the pages that they claim."""
        pages = sum(job.current_new_pages_required() for job in self.pending_jobs)
        is_room: bool = pages <= self.pagetable.num_unreferenced_pages()
        return is_room and self.num_remaining_jobs() <= self.max_batch_size

    def read_beside_writers(self, tokens: int) -> None:
        """Set how much of a prompt is read in a step while others write; whole pages."""
        self.shared_chunk_size = tokens

    def wait_for_masks(self) -> None:
        """After a step that broke: masks may still be computed, of texts that go on."""
        self.filter_pool.shutdown(wait=True)

    def take_checked_guesses(self) -> list[tuple[Any, int, int]]:
        """Of the step before: a job, the tokens guessed for it, and how many were right."""
        guesses, self._guesses = self._guesses, {}
        return [
            (job, guess.tokens, min(guess.tokens, job.accepted_draft_tokens - guess.accepted_before))
            for job, guess in guesses.items()
        ]

    def iterate_ngram_gen(self, results: list[Any]) -> None:
        """Called first where drafts are by n-grams; they are made in the hook below."""

    def iterate_hybrid_gen(self, draft_tokens: torch.Tensor | None, H: int) -> torch.Tensor | None:
        """Called after the drafts of a step are made, and before they are checked.

        Args:
            draft_tokens: of the draft model; shape (jobs or more, width), int64, on the CPU.
            H: how wide the result may be.
        """
        jobs = [job for job in self.active_jobs if job.is_prefill_done()]
        width = 0 if draft_tokens is None else draft_tokens.shape[-1]
        guesses: list[list[int]] = [[] for _ in jobs]
        if draft_tokens is not None:
            guesses = draft_tokens[: len(jobs)].clamp(max=self._vocabulary_size - 1).tolist()
        drafts = [self._draft(job, guess, H) for job, guess in zip(jobs, guesses, strict=True)]
        rows = lay_out(drafts, width=width, most=H)
        if self._draft_model_has_cache:
            self._note_read(jobs, guesses, rows)
        if not rows:
            return None
        self._note_guesses(jobs, drafts, len(rows[0]))
        self._draft_conf_round = None
        return torch.tensor(rows, dtype=torch.long)

    def iterate_draftmodel_gen(self, results: list[Any], window: int) -> torch.Tensor | None:
        """Called to draft with a model that reads texts by itself. First it catches up with them."""
        for job, start in self._read_by_draft_model.items():
            if job in self.active_jobs:
                self._read_again(job.sequences[0], start)
        self._read_by_draft_model.clear()
        drafts: torch.Tensor | None = super().iterate_draftmodel_gen(results, window)
        return drafts

    def _draft(self, job: Any, guess: list[int], most: int) -> Draft:
        run = self._texts[job].forced_run(most)
        # The state of a recurrent draft model goes on from its own guesses.
        if run and not (self.draft_recurrent and common_prefix(run, guess) < min(len(run), len(guess))):
            return Draft(run, are_forced=True)
        if self.ngram_match_min:
            guess = job.get_ngram_draft(min(self.num_draft_tokens, most))[0].tolist()
        return Draft(guess) if guess else NO_DRAFT

    def _note_guesses(self, jobs: Sequence[Any], drafts: Sequence[Draft], width: int) -> None:
        for job, draft in zip(jobs, drafts, strict=True):
            self._guesses[job] = _Guess(min(draft.guessed, width), job.accepted_draft_tokens)

    def _note_read(
        self, jobs: Sequence[Any], guesses: Sequence[list[int]], rows: Sequence[list[int]]
    ) -> None:
        """Note up to where the draft model will have read each text, should all of its row be taken."""
        before, self._read_by_draft_model = self._read_by_draft_model, {}
        for place, job in enumerate(jobs):
            read: int = job.sequences[0].kv_position
            if guesses[place]:  # it has read the last token, too
                read += 1 + common_prefix(guesses[place], rows[place])
            self._read_by_draft_model[job] = min(read, before.get(job, read))

    def _read_again(self, sequence: Any, start: int) -> None:
        """Let the draft model read what was taken in place of its guesses, chunk by chunk."""
        for begin in range(start, sequence.kv_position, self.max_chunk_size):
            end = min(begin + self.max_chunk_size, sequence.kv_position)
            self.draft_model.prefill(
                sequence.sequence_ids.torch_slice(begin, end),
                {
                    "attn_mode": "flash_attn",
                    "block_table": sequence.block_index_tensor,
                    "cache": self.draft_cache,
                    "cache_seqlens": torch.tensor([begin], dtype=torch.int32),
                },
            )


def penalize_answer_only(step: Any, prompt_length: int) -> Any:
    """Let an `SS_PresFreqP` count the tokens of the answer only; it counts as many of the last as it is told.

    The step keeps its class, by which the library knows that its kernels can do what comes behind it.
    """
    penalize = step.run

    def run(state: Any) -> None:
        step.sustain_range = state.past_ids.shape[-1] - prompt_length
        penalize(state)

    step.run = run
    return step


def cached_prompt_tokens(job: Any, page_tokens: int) -> int:
    """The tokens that a job did not compute again; known once its prompt was read."""
    tokens: int = job.cached_pages * page_tokens + job.cached_tokens
    return tokens
