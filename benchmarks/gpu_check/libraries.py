"""The two libraries without gallama: their own generators, driven as their examples do, or broken."""

from __future__ import annotations

import gc
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.speed import LibraryLoop, Load

DRAFT_TOKENS = 4
"""What a draft model guesses in one go, for the library and for us."""


class ExLlamaV3Loop:
    """See `LibraryLoop`."""

    def __init__(self, folder: Path, *, draft: bool, slots: int, cache_tokens: int) -> None:
        self.slots = slots
        self._library = library = import_module("exllamav3")
        configs = [library.Config.from_directory(str(folder)) for _ in range(2 if draft else 1)]
        models = [library.Model.from_config(config) for config in configs]
        caches = [library.Cache(model, max_num_tokens=cache_tokens) for model in models]
        # The draft model, which is a copy of the model, must be loaded first.
        for model in reversed(models):
            model.load(progressbar=False, max_output_size=slots * (1 + DRAFT_TOKENS))
        self._models = models
        self._tokenizer = library.Tokenizer.from_config(configs[0])
        drafting: dict[str, Any] = (
            {"draft_model": models[1], "draft_cache": caches[1], "num_draft_tokens": DRAFT_TOKENS}
            if draft
            else {}
        )
        self._generator = library.Generator(
            model=models[0], cache=caches[0], tokenizer=self._tokenizer, max_batch_size=slots, **drafting
        )

    def write(self, load: Load) -> int:
        samplers = import_module("exllamav3.generator.sampler")
        for prompt in load.prompts:
            job = self._library.Job(
                input_ids=self._tokenizer.encode(prompt),
                max_new_tokens=load.tokens,
                sampler=samplers.CategoricalSampler(load.temperature),
                stop_conditions=[self._tokenizer.eos_token_id],
            )
            self._generator.enqueue(job)
        return _run(self._generator)

    def close(self) -> None:
        self._generator.close()
        for model in self._models:
            model.unload()
        del self._generator, self._models
        free_memory()


class ExLlamaV2Loop:
    """See `LibraryLoop`."""

    def __init__(self, folder: Path, *, draft: bool, slots: int, cache_tokens: int) -> None:
        library = import_module("exllamav2")
        self._generators = import_module("exllamav2.generator")
        self._draft_tokens = DRAFT_TOKENS if draft else 0
        self._models, caches = [], []
        for _ in range(2 if draft else 1):
            config = library.ExLlamaV2Config(str(folder))
            config.arch_compat_overrides(quiet=True)
            config.max_seq_len = min(config.max_seq_len, cache_tokens)
            model = library.ExLlamaV2(config)
            cache = library.ExLlamaV2Cache(model, max_seq_len=cache_tokens, lazy=True)
            model.load_autosplit(cache)
            self._models.append(model)
            caches.append(cache)
        self._tokenizer = library.ExLlamaV2Tokenizer(self._models[0].config)
        drafting: dict[str, Any] = (
            {"draft_model": self._models[1], "draft_cache": caches[1], "num_draft_tokens": DRAFT_TOKENS}
            if draft
            else {}
        )
        is_paged = computes_side_by_side("v2")
        self.slots = slots if is_paged else 1
        self._generator = self._generators.ExLlamaV2DynamicGenerator(
            model=self._models[0],
            cache=caches[0],
            tokenizer=self._tokenizer,
            max_batch_size=self.slots,
            max_chunk_size=self._models[0].config.max_input_len,
            paged=is_paged,
            **drafting,
        )

    def write(self, load: Load) -> int:
        for prompt in load.prompts:
            settings = self._generators.ExLlamaV2Sampler.Settings(
                temperature=load.temperature or 1.0,
                top_k=0 if load.temperature else 1,
                top_p=0.0,
                token_repetition_penalty=1.0,
            )
            job = self._generators.ExLlamaV2DynamicJob(
                input_ids=self._tokenizer.encode(prompt),
                # It ends so many tokens early.
                max_new_tokens=load.tokens + self._draft_tokens,
                gen_settings=settings,
                stop_conditions=[self._tokenizer.eos_token_id],
            )
            self._generator.enqueue(job)
        return _run(self._generator)

    def close(self) -> None:
        del self._generator
        for model in self._models:
            model.unload()
        del self._models
        free_memory()


LOOPS: dict[str, Callable[..., LibraryLoop]] = {"v2": ExLlamaV2Loop, "v3": ExLlamaV3Loop}


def _run(generator: Any) -> int:
    """Compute all jobs; the tokens that they made."""
    tokens = 0
    while generator.num_remaining_jobs():
        for result in generator.iterate():
            if result["stage"] == "error":
                raise result["error"]
            if result["eos"]:
                tokens += result["new_tokens"]
    return tokens


def computes_side_by_side(engine: str) -> bool:
    """Whether the library computes several texts at once here: without flash-attn ExLlamaV2 does not."""
    if engine != "v2":
        return True
    return bool(import_module("exllamav2.attn").has_flash_attn_with_paged)


def break_a_step(engine: str) -> None:
    """Make the library's next forward pass raise, in the middle of a step, once."""
    if engine == "v3":
        break_next_call(import_module("exllamav3.model.model").Model, "forward")
    else:
        break_next_call(import_module("exllamav2.model").ExLlamaV2, "forward_chunk")


def break_next_call(owner: type, name: str) -> None:
    whole = getattr(owner, name)

    def broken(*_: object, **__: object) -> None:
        setattr(owner, name, whole)
        raise RuntimeError("the check breaks this step")

    setattr(owner, name, broken)


def free_memory() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
