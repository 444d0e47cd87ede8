"""The library's generator as `generators.thread.Generator`: texts become jobs, results become updates."""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from exllamav3 import Job

from gallama.engines.exllamav3.options import MOST_ROWS
from gallama.engines.exllamav3.private import TextFilter, TextGenerator, cached_prompt_tokens
from gallama.engines.exllamav3.sampling import ban, make_sampler
from gallama.engines.generators.settings import PAGE_TOKENS, whole_pages
from gallama.engines.generators.text import Text
from gallama.engines.step_cost import StepCost
from gallama.errors import ContextLengthExceeded, EngineFailed
from gallama.generation import SamplingSettings, TokenLogprob, Vocabulary

logger = logging.getLogger(__name__)

# A job claims its pages when it starts. So a text claims only as many as its next tokens need, and goes on in
# another job, which finds what was computed in the cache.
LEG_TOKENS = 512
# A recurrent model computes again what came after its last state that was kept. The library does as above by
# itself where it keeps one.
_RECURRENT_LEG_TOKENS = 2048

_SEED_BITS = 63
_ANSWER_BITS = 32
# Of what float32 rounds to nothing.
_LEAST_PROBABILITY = 1e-45


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What is loaded."""

    model: Any
    cache: Any
    tokenizer: Any
    """The library's own, which its generator asks for."""
    draft_model: Any | None = None
    draft_cache: Any | None = None

    @property
    def is_recurrent(self) -> bool:
        return bool(self.model.caps.get("recurrent_states"))


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorOptions:
    slots: int
    context_length: int
    ngram_match_min: int
    """0: nothing is guessed by n-grams."""
    draft_tokens: int
    widest_draft: int
    chunk_tokens: int
    """Of a prompt in one step; whole pages, and more than one."""
    step_seconds: float
    """How long a step may take because of a prompt while others write."""


class ExLlamaV3Generator:
    """See `generators.thread.Generator`."""

    def __init__(self, models: Models, vocabulary: Vocabulary, options: GeneratorOptions) -> None:
        self.slots = options.slots
        self.context_length = options.context_length
        self._models = models
        self._options = options
        self._end_token_ids = vocabulary.end_token_ids
        self._vocabulary_size = len(vocabulary.tokens)
        self._probe_token_id = vocabulary.probe_token_id
        unused = vocabulary.unused_token_ids()
        self._all_tokens = _mask_without(unused, self._vocabulary_size)
        self._ban_unused = ban(unused)
        self._cost = StepCost()
        self._texts: dict[Any, Text] = {}
        self._read: dict[Any, int] = {}
        """Tokens of its prompt that each job has computed."""
        self._writers = 0
        """Jobs that wrote in the step before."""
        self._without_room: Text | None = None
        self._generator = self._make_generator()

    def start(self, text: Text) -> bool:
        """
        Raises:
            ContextLengthExceeded: the text has no room for another token.
        """
        if text is self._without_room:
            return False
        if len(text.token_ids) >= self.context_length:
            raise ContextLengthExceeded(
                f"The text has {len(text.token_ids)} tokens; the model's context is {self.context_length}."
            )
        job = self._make_job(text)
        self._generator.enqueue(job)
        if not self._generator.has_room():
            self._generator.cancel(job)
            # Its prompt is not looked up again before there may be room.
            self._without_room = text
            return False
        self._texts[job] = text
        text.leg = job
        return True

    def cancel(self, text: Text) -> None:
        self._generator.cancel(text.leg)
        self._forget(text.leg)

    def step(self) -> None:
        start = time.perf_counter()
        try:
            results = self._generator.iterate()
        except BaseException:
            self._generator.wait_for_masks()
            raise
        self._learn_cost(results, time.perf_counter() - start)
        for job, guessed, accepted in self._generator.take_checked_guesses():
            self._texts[job].check_drafts(drafted=guessed, accepted=accepted)
        for result in results:
            self._use(result)

    def rebuild(self) -> None:
        self._texts.clear()
        self._read.clear()
        self._writers = 0
        self._without_room = None
        self._generator.close()
        _free_unused_memory()
        self._generator = self._make_generator()

    def probe(self) -> None:
        """
        Raises:
            EngineFailed: what was computed are no numbers.
        """
        token = torch.tensor([[self._probe_token_id]], dtype=torch.long)
        logits = self._models.model.forward(token, {"attn_mode": "flash_attn_nc"})
        # -inf is a token that it never says.
        if not bool(torch.isfinite(logits[..., : self._vocabulary_size].max())):
            raise EngineFailed("The model computes no numbers.")

    def cached_tokens(self) -> int:
        tokens: int = self._generator.get_cache_stats()["cached_tokens"]
        return tokens

    def close(self) -> None:
        self._texts.clear()
        self._generator.close()
        if self._models.draft_model is not None:
            self._models.draft_model.unload()
        self._models.model.unload()
        # The library's generator and page table refer to each other.
        del self._generator, self._models
        _free_unused_memory()

    def _make_generator(self) -> TextGenerator:
        models, options = self._models, self._options
        return TextGenerator(
            models.model,
            models.cache,
            models.tokenizer,
            max_batch_size=options.slots,
            max_chunk_size=options.chunk_tokens,
            shared_chunk_size=self._chunk(),
            prefill_cooldown=0,
            draft_model=models.draft_model,
            draft_cache=models.draft_cache,
            num_draft_tokens=options.draft_tokens or None,
            ngram_match_min=options.ngram_match_min,
            hybrid_draft_tokens=options.widest_draft,
            draft_max_rows=max(MOST_ROWS, options.slots),
            texts=self._texts,
            vocabulary_size=self._vocabulary_size,
        )

    def _make_job(self, text: Text) -> Any:
        request = text.job.request
        is_recurrent = self._models.is_recurrent
        # Pages are claimed for all of this, however little of the answer is left.
        divides = is_recurrent and text.room > _RECURRENT_LEG_TOKENS
        return Job(
            torch.tensor([text.token_ids], dtype=torch.long),
            max_new_tokens=text.room if is_recurrent else min(text.room, leg_tokens(len(text.token_ids))),
            max_rq_tokens=_RECURRENT_LEG_TOKENS if divides else None,
            sampler=make_sampler(
                request.sampling,
                prompt_length=text.prompt_length,
                banned=() if text.is_constrained else self._ban_unused,
            ),
            seed=leg_seed(request.sampling, len(text.token_ids) - text.prompt_length),
            filters=[TextFilter(text, self._all_tokens)],
            return_probs=request.logprobs is not None,
            return_top_tokens=request.logprobs or 0,
        )

    def _chunk(self) -> int:
        """Tokens of a prompt in a step while others write; whole pages.

        Fewer than a chunk has, or the library would compute a chunk of each prompt in one step.
        """
        in_time = self._cost.tokens_within(self._options.step_seconds) // PAGE_TOKENS * PAGE_TOKENS
        return min(max(in_time, PAGE_TOKENS), self._options.chunk_tokens - PAGE_TOKENS)

    def _learn_cost(self, results: list[dict[str, Any]], seconds: float) -> None:
        """Learn from a step with a prompt, if the one before was at its end when this one began."""
        read = sum(self._read_more(result) for result in results if result["stage"] == "prefill")
        writers = len({result["job"] for result in results if result["stage"] == "streaming"})
        if read and writers and self._writers:
            self._cost.record(read + writers, seconds)
            self._generator.read_beside_writers(self._chunk())
        self._writers = writers

    def _read_more(self, result: dict[str, Any]) -> int:
        """The tokens of a prompt that a step has computed."""
        job = result["job"]
        before = self._read.get(job, 0)
        self._read[job] = result["curr_progress"] - cached_prompt_tokens(job, PAGE_TOKENS)
        return max(0, self._read[job] - before)

    def _use(self, result: dict[str, Any]) -> None:
        """Tell a text what came of it, beside the tokens, which it has been told."""
        job = result["job"]
        text = self._texts[job]
        if result["stage"] == "started":
            self._without_room = None  # it may share the pages of the one that has started
        if result["stage"] == "streaming":
            text.begin(cached_prompt_tokens(job, PAGE_TOKENS))
            if "token_probs" in result:
                text.score(self._logprobs(result))
        if result["stage"] == "error":
            logger.error("an answer broke while its prompt was read", exc_info=result["error"])
            text.fail(result["error"])
        if result["eos"]:
            text.end_leg()
            self._forget(job)

    def _logprobs(self, result: dict[str, Any]) -> list[TokenLogprob]:
        """Of the result's tokens, without the one that ends the text."""
        token_ids = result["token_ids"][0].tolist()
        chosen = _logarithms(result["token_probs"])[0].tolist()
        tops: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
        if "top_k_tokens" in result:
            scores = _logarithms(result["top_k_probs"])[0].tolist()
            rows = zip(result["top_k_tokens"][0].tolist(), scores, strict=True)
            tops = [tuple(zip(tokens, row, strict=True)) for tokens, row in rows]
        return [
            TokenLogprob(token, logprob, top)
            for token, logprob, top in zip(token_ids, chosen, tops, strict=True)
            if token not in self._end_token_ids
        ]

    def _forget(self, job: Any) -> None:
        self._texts.pop(job, None)
        self._read.pop(job, None)
        self._without_room = None


def leg_tokens(written: int) -> int:
    """How many tokens a leg adds to so many: it ends where pages are full, but for the last token.

    That one is computed by the next leg in any case, which finds all others in whole pages.
    """
    return whole_pages(written - 1 + LEG_TOKENS) + 1 - written


def leg_seed(sampling: SamplingSettings, answered: int) -> int | None:
    """Where a leg's random numbers begin: elsewhere for each leg, but the same for the same seed.

    Args:
        answered: tokens of the answer before the leg.
    """
    if sampling.seed is None:
        return None
    return (sampling.seed % (1 << _SEED_BITS) << _ANSWER_BITS) + answered


def _mask_without(token_ids: list[int], vocabulary_size: int) -> torch.Tensor:
    """The packed mask that allows all other tokens; shape (1, words), int32."""
    allowed = np.zeros((vocabulary_size + 31) // 32 * 32, dtype=np.bool_)
    allowed[:vocabulary_size] = True
    allowed[token_ids] = False
    return torch.from_numpy(np.packbits(allowed, bitorder="little").view(np.int32))[None]


def _free_unused_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _logarithms(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.double().clamp_min(_LEAST_PROBABILITY).log()
