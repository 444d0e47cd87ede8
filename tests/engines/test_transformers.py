"""The transformers engine over models of two small layers with random weights."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BambaForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from gallama.config import ModelSpec
from gallama.constraints import AnswerSpec, LLGuidanceBackend, admit_constraints
from gallama.conversation import Constraint, ConstraintKind
from gallama.engines.logits import log_probabilities
from gallama.engines.transformers import TransformersEngine, load
from gallama.engines.transformers.computation import CausalModel
from gallama.engines.transformers.options import TransformersOptions
from gallama.engines.transformers.packing import Piece
from gallama.engines.transformers.scheduler import MOST_SCORED_TOKENS
from gallama.errors import GallamaError, InvalidConfig, ModelLoadFailed, NotEnoughMemory, WorkerUnavailable
from gallama.generation import GeneratedChunk, GenerationRequest, SamplingSettings, State
from tests.engines.tiny_llama import CONTEXT_LENGTH, save_tiny_llama, save_tiny_model, tiny_tokenizer

GREEDY = SamplingSettings(temperature=0)
# Ends only where a limit is: the end tokens are 0 and 2.
ENDLESS = SamplingSettings(temperature=0, logit_bias={0: -100, 2: -100})
TEXT = "the old bridge across the river was built of stone and every morning farmers led their carts over it"
WORDS = TEXT.split()
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mistral, which looks back only so far": (MistralForCausalLM, MistralConfig, {"sliding_window": 16}),
    "gemma 2, which needs attention of its own": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"sliding_window": 16, "head_dim": 16},
    ),
    "gpt 2, which has a vector for each position": (GPT2LMHeadModel, GPT2Config, {"n_inner": 128}),
    "mpt, which weighs tokens by their distance": (MptForCausalLM, MptConfig, {"max_seq_len": 1024}),
    "qwen 3 next, half of whose layers sum up": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
}


def spec_for(path: Path, **settings: Any) -> ModelSpec:
    return ModelSpec.model_validate({"model_id": str(path), "backend": "transformers", **settings})


@asynccontextmanager
async def loaded(folder: Path, **settings: Any) -> AsyncIterator[TransformersEngine]:
    engine = load(spec_for(folder, **settings), folder)
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[TransformersEngine]:
    engine = load(spec_for(path), path)
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def own_model(path: Path) -> Any:
    """The same model, to be asked through transformers itself."""
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


@pytest.fixture(scope="module")
def backend(engine: TransformersEngine) -> LLGuidanceBackend:
    return LLGuidanceBackend(engine.vocabulary)


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    """The model's folder, to be spoiled."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


class Observed:
    """A grammar that knows which tokens were taken."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.taken: list[int] = []

    def advance(self, token_ids: Sequence[int]) -> int:
        self.taken += token_ids
        return self._state.advance(token_ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def start_state(backend: LLGuidanceBackend, kind: ConstraintKind, source: object) -> State:
    body = admit_constraints([Constraint(kind=kind, source=source)], None)
    return backend.compile(AnswerSpec(body=body)).start()


def prompts(count: int, *, longest: int) -> list[str]:
    """Texts of many lengths, none of which begins as another does."""
    rng = random.Random(1)
    return [f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for number in range(count)]


async def chunks_of(
    engine: TransformersEngine, prompt: str | Sequence[int], **fields: Any
) -> list[GeneratedChunk]:
    fields.setdefault("max_tokens", 30)
    fields.setdefault("sampling", GREEDY)
    token_ids = engine.tokenize(prompt) if isinstance(prompt, str) else prompt
    request = GenerationRequest(prompt_token_ids=token_ids, **fields)
    async with aclosing(engine.generate(request)) as chunks:
        return [chunk async for chunk in chunks]


async def text_of(engine: TransformersEngine, prompt: str | Sequence[int], **fields: Any) -> str:
    return "".join(chunk.text for chunk in await chunks_of(engine, prompt, **fields))


def own_text(
    model: Any, engine: TransformersEngine, prompt: str, *, max_tokens: int = 30, **settings: Any
) -> str:
    """What transformers' own `generate` says."""
    token_ids = engine.tokenize(prompt)
    settings.setdefault("do_sample", False)
    with torch.inference_mode():
        answer = model.generate(
            torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
            max_new_tokens=max_tokens,
            suppress_tokens=list(range(len(engine.vocabulary.tokens), model.config.vocab_size)),
            **settings,
        )[0, len(token_ids) :].tolist()
    tokens = engine.vocabulary.tokens
    return b"".join(tokens[token] for token in answer).decode(errors="replace")


class OnlyAllowed(LogitsProcessor):  # type: ignore[misc]
    """A grammar as transformers' own `generate` would hold it."""

    def __init__(self, state: State, size: int, prompt_length: int, end: int) -> None:
        self._state, self._size, self._seen, self._end = state, size, prompt_length, end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._state.advance(input_ids[0, self._seen :].tolist())
        self._seen = input_ids.shape[1]
        allowed = torch.full_like(scores, -torch.inf)
        if self._state.status == "must_end":
            allowed[0, self._end] = 0
            return allowed
        mask = np.zeros((self._size + 31) // 32, dtype=np.int32)
        assert self._state.mask(mask)
        places = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little", count=self._size))
        allowed[0, places] = scores[0, places]
        return allowed


async def test_a_greedy_answer_is_that_of_transformers_itself(
    engine: TransformersEngine, own_model: Any
) -> None:
    for prompt in prompts(4, longest=30):
        assert await text_of(engine, prompt) == own_text(own_model, engine, prompt)


async def test_a_greedy_answer_under_a_grammar_is_that_of_transformers_itself(
    engine: TransformersEngine, own_model: Any, backend: LLGuidanceBackend
) -> None:
    for pattern in ("[a-z]{4,9}( [a-z]{2,5}){3}", "(yes|no|perhaps), [0-9]{8}"):
        size, prompt = len(engine.vocabulary.tokens), "Say it:"
        processor = OnlyAllowed(
            start_state(backend, "regex", pattern), size, len(engine.tokenize(prompt)), end=2
        )
        expected = own_text(own_model, engine, prompt, max_tokens=60, logits_processor=[processor])
        # With log probabilities every token is chosen, none is taken because it is forced.
        state = start_state(backend, "regex", pattern)
        assert await text_of(engine, prompt, max_tokens=60, state=state, logprobs=0) == expected
        assert re.fullmatch(pattern, expected)


async def test_in_company_an_answer_is_the_same_as_alone(engine: TransformersEngine) -> None:
    asked = prompts(24, longest=60)
    alone = [await text_of(engine, prompt) for prompt in asked]
    together = await asyncio.gather(*(text_of(engine, prompt) for prompt in reversed(asked)))
    assert list(reversed(together)) == alone


async def test_texts_in_company_share_forward_passes(engine: TransformersEngine) -> None:
    before = engine.status()
    await asyncio.gather(*(text_of(engine, prompt, sampling=ENDLESS) for prompt in prompts(8, longest=9)))
    after = engine.status()
    assert after.sampled_tokens - before.sampled_tokens == 8 * 30
    assert after.steps - before.steps < 100


@pytest.mark.parametrize("family", list(FAMILIES))
async def test_other_families_answer_in_company_as_transformers_does(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, *FAMILIES[family][:2], **FAMILIES[family][2])
    async with loaded(folder, backend_extra_args={"n_batch": 32}) as engine:
        own_model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        asked = prompts(6, longest=50)
        answers = await asyncio.gather(*(text_of(engine, prompt) for prompt in asked))
        assert answers == [own_text(own_model, engine, prompt) for prompt in asked]


async def test_a_model_is_told_the_positions_that_it_does_not_count_itself(tmp_path: Path) -> None:
    heads = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}
    folder = save_tiny_model(tmp_path, BambaForCausalLM, BambaConfig, attn_layer_indices=[1], **heads)
    async with loaded(folder) as engine:
        own_model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        expected = own_text(own_model, engine, TEXT, max_tokens=8)
        assert await text_of(engine, TEXT, max_tokens=8) == expected


async def test_a_prompt_that_is_read_in_pieces_is_answered_the_same(
    engine: TransformersEngine, path: Path
) -> None:
    async with loaded(path, backend_extra_args={"n_batch": 32}) as in_pieces:
        prompt = prompts(1, longest=300)[0] * 3
        assert len(engine.tokenize(prompt)) > 3 * 32
        assert await text_of(in_pieces, prompt) == await text_of(engine, prompt)


async def test_noise_obeys_every_schema(engine: TransformersEngine, backend: LLGuidanceBackend) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "city": {"enum": ["Zürich", "東京", "Paris"]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        },
        "required": ["name", "age", "city", "tags"],
        "additionalProperties": False,
    }

    async def ask(seed: int) -> Any:
        settings = SamplingSettings(temperature=1.5, seed=seed)
        state = start_state(backend, "json_schema", schema)
        return json.loads(await text_of(engine, "JSON:", max_tokens=300, sampling=settings, state=state))

    for value in await asyncio.gather(*map(ask, range(20))):
        assert set(value) == {"name", "age", "city", "tags"}
        assert 0 <= value["age"] <= 150
        assert value["city"] in ("Zürich", "東京", "Paris")
        assert 2 <= len(value["tags"]) <= 3


async def test_forced_runs_cost_no_steps(engine: TransformersEngine, backend: LLGuidanceBackend) -> None:
    long = "the old bridge across the river was built of stone " * 4
    state = Observed(start_state(backend, "choice", [long + "yes", long + "no"]))
    before = engine.status()
    chunks = await chunks_of(engine, "Which?", max_tokens=500, state=state)
    after = engine.status()
    assert "".join(chunk.text for chunk in chunks).startswith(long)
    assert sum(chunk.forced_tokens for chunk in chunks) > 20
    assert after.steps - before.steps <= sum(chunk.sampled_tokens for chunk in chunks) + 2
    assert sum(chunk.sampled_tokens + chunk.forced_tokens for chunk in chunks) == len(state.taken)


async def test_padding_behind_the_vocabulary_is_never_sampled(engine: TransformersEngine) -> None:
    settings = SamplingSettings(temperature=2, seed=3, logit_bias={0: -100, 2: -100})
    chunks = await chunks_of(engine, "Noise:", max_tokens=400, sampling=settings)
    assert sum(chunk.sampled_tokens for chunk in chunks) == 400


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(temperature=1, top_k=1),
        SamplingSettings(temperature=1, top_p=1e-6),
        SamplingSettings(temperature=1, min_p=1.0),
        SamplingSettings(temperature=1e-4),
        SamplingSettings(temperature=1e-300),
    ],
    ids=["top_k", "top_p", "min_p", "temperature", "least_temperature"],
)
async def test_every_way_to_sample_has_its_greedy_end(
    engine: TransformersEngine, settings: SamplingSettings
) -> None:
    for prompt in prompts(3, longest=20):
        assert await text_of(engine, prompt, sampling=settings) == await text_of(engine, prompt)


async def test_a_repetition_penalty_is_that_of_transformers_itself(
    engine: TransformersEngine, own_model: Any
) -> None:
    settings = SamplingSettings(temperature=0, repetition_penalty=1.7)
    for prompt in prompts(3, longest=20):
        expected = own_text(own_model, engine, prompt, repetition_penalty=1.7)
        assert await text_of(engine, prompt, sampling=settings) == expected


async def test_a_bias_decides(engine: TransformersEngine) -> None:
    (token,) = engine.vocabulary.encode(b"Z")
    always = SamplingSettings(temperature=1, logit_bias={token: 1000})
    assert await text_of(engine, "Say:", max_tokens=5, sampling=always) == "ZZZZZ"


@pytest.mark.parametrize(("frequency", "presence"), [(500.0, 0.0), (0.0, 500.0)])
async def test_penalties_on_the_answer_keep_it_from_repeating(
    engine: TransformersEngine, frequency: float, presence: float
) -> None:
    settings = SamplingSettings(
        temperature=0,
        logit_bias={engine.vocabulary.encode(letter)[0]: 1000.0 for letter in (b"X", b"Y", b"Z")},
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    assert sorted(await text_of(engine, "XX YY ZZ", max_tokens=3, sampling=settings)) == ["X", "Y", "Z"]


async def test_a_seed_brings_the_same_answer_in_any_company(engine: TransformersEngine) -> None:
    def settings(seed: int) -> SamplingSettings:
        return SamplingSettings(temperature=1.5, seed=seed)

    prompt = TEXT
    alone = await text_of(engine, prompt, sampling=settings(5))
    company = [text_of(engine, other, sampling=settings(9)) for other in prompts(7, longest=40)]
    answers = await asyncio.gather(*company, text_of(engine, prompt, sampling=settings(5)))
    assert answers[-1] == alone
    assert await text_of(engine, prompt, sampling=settings(6)) != alone


async def test_log_probabilities_are_those_of_the_model(engine: TransformersEngine, own_model: Any) -> None:
    prompt = engine.tokenize("the old bridge")
    chunks = await chunks_of(engine, prompt, max_tokens=1, logprobs=4)
    with torch.inference_mode():
        row = own_model(torch.tensor([prompt])).logits[0, -1, : len(engine.vocabulary.tokens)]
    (found,) = (entry for chunk in chunks for entry in chunk.logprobs)
    expected = log_probabilities(row.numpy(), found.token_id, 4)
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-3)
    assert [token for token, _ in found.top] == [token for token, _ in expected.top]


async def test_the_tokens_of_a_prompt_are_scored_where_that_is_asked_for(
    engine: TransformersEngine, own_model: Any
) -> None:
    prompt = engine.tokenize(TEXT * 3)
    await chunks_of(engine, prompt)
    chunks = await chunks_of(engine, prompt, max_tokens=0, logprobs=1, prompt_logprobs=True)
    with torch.inference_mode():
        rows = own_model(torch.tensor([prompt])).logits[0, :, : len(engine.vocabulary.tokens)]
    first, *others = chunks[0].prompt_logprobs
    assert first is None
    assert chunks[0].cached_prompt_tokens == 0
    expected = [
        log_probabilities(row.numpy(), token, 1).logprob for row, token in zip(rows, prompt[1:], strict=False)
    ]
    assert [entry.logprob for entry in others if entry] == pytest.approx(expected, abs=1e-2)
    assert chunks[-1].end == "length"
    assert not any(chunk.sampled_tokens for chunk in chunks)


async def test_a_long_prompt_is_scored_in_bounded_memory_where_it_is_read_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["qwen 3 next, half of whose layers sum up"]
    folder = save_tiny_model(tmp_path, *family[:2], **family[2])
    async with loaded(folder) as engine:
        own_model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        rows: list[int] = []
        compute = engine._model.compute

        def count_rows(pieces: Sequence[Piece]) -> list[torch.Tensor]:
            rows.append(sum(piece.rows for piece in pieces))
            return compute(pieces)

        monkeypatch.setattr(engine._model, "compute", count_rows)
        prompt = engine.tokenize(TEXT * 3)
        (first, *_) = await chunks_of(engine, prompt, max_tokens=0, logprobs=0, prompt_logprobs=True)
    with torch.inference_mode():
        logits = own_model(torch.tensor([prompt])).logits[0, :, : len(engine.vocabulary.tokens)]
    expected = [
        log_probabilities(row.numpy(), token, 0).logprob
        for row, token in zip(logits, prompt[1:], strict=False)
    ]
    found = [entry.logprob for entry in first.prompt_logprobs[1:] if entry]
    assert found == pytest.approx(expected, abs=1e-2)
    assert max(rows) <= MOST_SCORED_TOKENS < len(prompt)


async def test_what_texts_have_in_common_is_computed_once(engine: TransformersEngine, own_model: Any) -> None:
    beginning = "A beginning that nothing else has: " + TEXT
    await text_of(engine, beginning + " one")
    again = await chunks_of(engine, beginning + " two")
    assert again[0].cached_prompt_tokens > len(engine.tokenize(beginning)) - 4
    assert "".join(chunk.text for chunk in again) == own_text(own_model, engine, beginning + " two")


async def test_a_text_that_a_longer_one_goes_on_with_is_not_kept_twice(engine: TransformersEngine) -> None:
    prompt = "Kept only once: " + TEXT
    await chunks_of(engine, prompt, max_tokens=10, sampling=ENDLESS)
    before = engine.status().cached_tokens
    await chunks_of(engine, prompt, max_tokens=1, sampling=ENDLESS)
    assert engine.status().cached_tokens == before


async def test_the_same_prompt_asked_often_at_once_is_read_once(engine: TransformersEngine) -> None:
    prompt = "Asked often at once: " + TEXT * 3
    answers = await asyncio.gather(*(chunks_of(engine, prompt) for _ in range(6)))
    cached = sorted(chunks[0].cached_prompt_tokens for chunks in answers)
    assert cached[1:] == [len(engine.tokenize(prompt)) - 1] * 5
    assert len({"".join(chunk.text for chunk in chunks) for chunks in answers}) == 1


async def test_more_than_the_cache_holds_is_answered_all_the_same(
    engine: TransformersEngine, path: Path
) -> None:
    async with loaded(path, max_seq_len=256, cache_size=256) as small:
        asked = prompts(8, longest=30)
        answers = await asyncio.gather(
            *(text_of(small, prompt, max_tokens=100, sampling=ENDLESS) for prompt in asked)
        )
        assert small.status().cached_tokens <= 256
    assert answers == [await text_of(engine, prompt, max_tokens=100, sampling=ENDLESS) for prompt in asked]


async def test_what_is_kept_never_grows_beyond_the_cache(engine: TransformersEngine) -> None:
    for prompt in prompts(60, longest=120):
        await text_of(engine, prompt, max_tokens=2)
        assert engine.status().cached_tokens <= CONTEXT_LENGTH


async def test_control_tokens_are_seen_by_who_asks_for_them(engine: TransformersEngine) -> None:
    token = engine.vocabulary.control_tokens["<|im_start|>"]
    settings = SamplingSettings(temperature=0, logit_bias={token: 1000})
    seen = await chunks_of(
        engine, "x", max_tokens=2, sampling=settings, visible_control_tokens=frozenset({token})
    )
    assert [chunk.control_token for chunk in seen if chunk.control_token] == ["<|im_start|>"] * 2
    assert await text_of(engine, "x", max_tokens=2, sampling=settings) == ""


async def test_an_end_token_of_the_spec_ends_an_answer(path: Path) -> None:
    async with loaded(path, eos_token_list=["<tool_call>"]) as engine:
        (token,) = engine.tokenize("<tool_call>")
        assert token in engine.vocabulary.end_token_ids
        settings = SamplingSettings(temperature=0, logit_bias={token: 1000})
        (*_, last) = await chunks_of(engine, "x", sampling=settings)
        assert last.end == "stop"


async def test_an_end_token_that_writes_text_cuts_no_constrained_answer(path: Path) -> None:
    async with loaded(path, eos_token_list=["he"]) as engine:
        (token,) = engine.tokenize("he")
        backend = LLGuidanceBackend(engine.vocabulary)
        always = SamplingSettings(temperature=0, logit_bias={token: 1000})
        state = start_state(backend, "regex", "the [a-z]{4} then [a-z]{10}")
        assert re.fullmatch(
            "the [a-z]{4} then [a-z]{10}", await text_of(engine, "x", sampling=always, state=state)
        )
        (*_, last) = await chunks_of(engine, "x", sampling=always)
        assert (last.end, last.text) == ("stop", "")


def test_an_end_token_whose_text_nothing_else_writes_is_refused(path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="',' ends an answer, and no other tokens write its text"):
        load_with(path, eos_token_list=[","])


def break_steps(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Sequence[Piece]], bool]
) -> None:
    """Let steps run out of memory in the middle, when half of them is in the caches."""
    compute = engine._model.compute

    def compute_or_break(pieces: Sequence[Piece]) -> list[torch.Tensor]:
        rows = compute(pieces)
        if breaks(pieces):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows

    monkeypatch.setattr(engine._model, "compute", compute_or_break)


async def test_texts_that_are_too_much_together_are_answered_one_after_the_other(
    path: Path, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts(8, longest=40)
    expected = [await text_of(engine, prompt, sampling=ENDLESS) for prompt in asked]
    async with loaded(path) as small:
        break_steps(small, monkeypatch, lambda pieces: len(pieces) > 2)
        answers = await asyncio.gather(*(text_of(small, prompt, sampling=ENDLESS) for prompt in asked))
        assert answers == expected


async def test_memory_that_runs_out_for_one_text_ends_that_one_alone(
    path: Path,
    engine: TransformersEngine,
    backend: LLGuidanceBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def constrained() -> State:
        return start_state(backend, "regex", "[a-z]{3} and [a-z]{20}")

    asked = prompts(6, longest=20)
    expected = [await text_of(engine, prompt, state=constrained()) for prompt in asked]
    async with loaded(path) as small:
        break_steps(small, monkeypatch, lambda pieces: any(len(piece.token_ids) > 150 for piece in pieces))
        good = [text_of(small, prompt, state=constrained()) for prompt in asked]
        *answers, error = await asyncio.gather(*good, text_of(small, TEXT * 10), return_exceptions=True)
        assert answers == expected
        assert isinstance(error, NotEnoughMemory)
        assert small.status().busy_slots == 0


async def test_a_model_that_computes_nothing_any_more_is_told_to_all(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with loaded(path) as engine:
        break_steps(engine, monkeypatch, lambda _: True)
        answers = [text_of(engine, prompt) for prompt in prompts(3, longest=20)]
        results = await asyncio.gather(*answers, engine.probe(), return_exceptions=True)
        assert [type(result) for result in results] == [NotEnoughMemory] * 3 + [GallamaError]


async def test_what_broke_is_not_taken_over_by_later_texts(
    path: Path, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "The end: " + TEXT
    async with loaded(path) as small:
        with monkeypatch.context() as broken:
            break_steps(small, broken, lambda pieces: len(pieces[0].token_ids) == 1)
            with pytest.raises(NotEnoughMemory):
                await text_of(small, prompt)
        again = await chunks_of(small, prompt)
        assert again[0].cached_prompt_tokens == 0
        assert "".join(chunk.text for chunk in again) == await text_of(engine, prompt)


async def test_a_step_that_breaks_is_told_and_the_next_answer_comes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with loaded(path) as engine:
        before = await text_of(engine, "Again:")
        with monkeypatch.context() as broken:
            broken.setattr(engine._model, "compute", lambda _: [][0])
            with pytest.raises(GallamaError, match="could not be generated"):
                await text_of(engine, "Again:")
            with pytest.raises(GallamaError, match="cannot be computed"):
                await engine.probe()
        await engine.probe()
        assert await text_of(engine, "Again:") == before


async def test_a_model_that_computes_no_numbers_is_found_out(path: Path) -> None:
    async with loaded(path) as engine:
        with torch.no_grad():
            engine._model._model.lm_head.weight.fill_(torch.nan)
        with pytest.raises(GallamaError, match="no numbers"):
            await text_of(engine, "Hello")
        with pytest.raises(GallamaError, match="no numbers"):
            await engine.probe()


def test_a_model_that_leaves_no_memory_to_compute_with_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CausalModel, "check", run_out)
    with pytest.raises(NotEnoughMemory, match="too little memory"):
        load_with(path)


def test_a_model_that_computes_no_numbers_from_the_start_is_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"].fill_(torch.nan)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadFailed, match=r"computes no numbers in torch\.float32"):
        load_with(copy)


async def test_a_probe_is_a_step_and_no_answer(engine: TransformersEngine) -> None:
    before = engine.status()
    await engine.probe()
    after = engine.status()
    assert (after.steps - before.steps, after.sampled_tokens) == (1, before.sampled_tokens)


async def test_closing_gives_the_model_back_and_ends_what_is_under_way(path: Path) -> None:
    engine = load(spec_for(path), path)
    weights = weakref.ref(engine._model._model)
    answer = asyncio.create_task(text_of(engine, "On and on", max_tokens=900, sampling=ENDLESS))
    while not engine.status().sampled_tokens:  # noqa: ASYNC110  it has no event
        await asyncio.sleep(0.01)
    await engine.close()
    with pytest.raises(WorkerUnavailable):
        await answer
    with pytest.raises(WorkerUnavailable):
        await text_of(engine, "Hello")
    gc.collect()
    assert weights() is None


def test_the_part_that_is_loaded_grows(path: Path) -> None:
    told: list[float] = []
    engine = load(spec_for(path), path, told.append)
    asyncio.run(engine.close())
    assert told == sorted(told)
    assert len(told) > 10
    assert 0.5 < told[-1] < 1


def load_with(path: Path, **settings: Any) -> None:
    engine = load(spec_for(path, **settings), path)
    asyncio.run(engine.close())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_gpu_layers": 3}, "The transformers backend takes: device_map, dtype"),
        ({"dtype": "int4"}, "backend_extra_args.dtype"),
        ({"dtype": "float32", "torch_dtype": "float32"}, "are the same"),
        ({"attn_implementation": "someone/kernels"}, "backend_extra_args.attn_implementation"),
        ({"config_params": {"colour": "red"}}, "config_params` names colour"),
    ],
)
def test_arguments_that_cannot_be_are_refused(path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=re.escape(message)):
        load_with(path, backend_extra_args=arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_quant": "Q8"}, "`cache_quant` is Q8"),
        ({"max_seq_len": 4096}, "the model has 1024 positions"),
        ({"eos_token_list": ["two tokens"]}, "which is not one token"),
        ({"gpus": "0", "backend_extra_args": {"device_map": "cuda:0"}}, "leave one out"),
    ],
)
def test_settings_that_cannot_be_are_refused(path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=re.escape(message)):
        load_with(path, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(path: Path) -> None:
    with pytest.raises(InvalidConfig, match="PyTorch sees none"):
        load_with(path, gpus="10")


async def test_arguments_are_honoured(path: Path) -> None:
    arguments = {
        "torch_dtype": "torch.bfloat16",
        "attn_implementation": "eager",
        "config_params": {"max_position_embeddings": 2048},
        "device_map": "cpu",
        "n_threads": 1,
    }
    async with loaded(path, backend_extra_args=arguments) as engine:
        model = engine._model._model
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager"
        assert engine.context_length == 2048
        assert await text_of(engine, "Hello")


def save_long_rope(folder: Path) -> Path:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    return save_tiny_model(
        folder,
        Phi3ForCausalLM,
        Phi3Config,
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )


async def test_a_model_with_long_rope_ends_where_its_positions_would_change(tmp_path: Path) -> None:
    folder = save_long_rope(tmp_path)
    async with loaded(folder) as engine:
        own_model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert engine.context_length == 64
        prompt = "x" * 30
        assert await text_of(engine, prompt) == own_text(own_model, engine, prompt)


def test_more_than_long_rope_allows_is_refused(tmp_path: Path) -> None:
    folder = save_long_rope(tmp_path)
    with pytest.raises(InvalidConfig, match="at most 64 tokens, beyond which LongRoPE"):
        load_with(folder, max_seq_len=128)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"it has no config\.json"):
        load_with(tmp_path)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ModelLoadFailed, match=r"pytorch_model\.bin: such files can run code"):
        load_with(copy)


def test_a_folder_without_weights_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelLoadFailed, match=r"no \.safetensors file"):
        load_with(copy)


def test_a_model_that_is_not_whole_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelLoadFailed, match="is not whole: it has no weights for"):
        load_with(copy)


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, vocab_size=300)
    with pytest.raises(ModelLoadFailed, match="they do not belong together"):
        load_with(tmp_path)


def test_code_in_the_folder_is_not_run(copy: Path, tmp_path: Path) -> None:
    trace = tmp_path / "was_run"
    (copy / "code.py").write_text(f"open({str(trace)!r}, 'w')\n")
    config = json.loads((copy / "config.json").read_text())
    brought = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": brought}))
    with pytest.raises(ModelLoadFailed, match="trust_remote_code"):
        load_with(copy)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("model_class", "config_class", "message"),
    [
        (BertModel, BertConfig, "model_type=embedding"),
        (T5ForConditionalGeneration, T5Config, "has an encoder"),
    ],
)
def test_a_model_that_does_not_go_on_with_texts_is_refused(
    tmp_path: Path, model_class: Any, config_class: Any, message: str
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    config = config_class(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=500
    )
    model_class(config).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadFailed, match=message):
        load_with(tmp_path)


def test_a_model_that_keeps_a_text_where_the_next_one_finds_it_is_refused(tmp_path: Path) -> None:
    save_tiny_model(
        tmp_path,
        RecurrentGemmaForCausalLM,
        RecurrentGemmaConfig,
        num_hidden_layers=3,
        lru_width=64,
        attention_window_size=16,
    )
    with pytest.raises(ModelLoadFailed, match="would change each other"):
        load_with(tmp_path, max_seq_len=512)


def test_a_model_that_keeps_nothing_of_a_text_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, MambaForCausalLM, MambaConfig, state_size=8)
    with pytest.raises(ModelLoadFailed, match="cache"):
        load_with(tmp_path, max_seq_len=512)


def test_the_document_has_every_setting() -> None:
    document = (Path(__file__).parents[2] / "docs/transformers.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", document, re.MULTILINE)) == set(TransformersOptions.model_fields)
