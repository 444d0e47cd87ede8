from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gallama.config import ModelSpec
from gallama.constraints import AnswerSpec, LLGuidanceBackend, admit_constraints
from gallama.conversation import Constraint
from gallama.engines.llama_cpp import bindings
from gallama.engines.llama_cpp.context import SequenceCache
from gallama.engines.llama_cpp.draft_model import ModelDrafter, load_drafter
from gallama.engines.llama_cpp.options import context_options, model_options, read_options
from gallama.engines.llama_cpp.speculation import Drafter, NgramDrafter, Wish
from gallama.errors import InvalidConfig
from gallama.generation import State, Vocabulary
from tests.engines.llama_cpp.memory_kv import MemoryKv

VOCABULARY_SIZE = 300
END = 299
UNSURE = 298
SURE = 12.0
CITY_SCHEMA = {
    "type": "object",
    "properties": {"name_of_the_city": {"enum": ["Paris", "London"]}, "visitors": {"type": "integer"}},
    "required": ["name_of_the_city", "visitors"],
    "additionalProperties": False,
}


def next_token(tokens: Sequence[int]) -> int:
    return (tokens[-1] * 7 + len(tokens)) % 290


def confident(tokens: Sequence[int]) -> NDArray[np.float32]:
    """A model that is sure of what comes next, but for behind one token."""
    logits = np.zeros(VOCABULARY_SIZE, dtype=np.float32)
    logits[next_token(tokens)] = 0.5 if tokens[-1] == UNSURE else SURE
    return logits


def always(token: int) -> Callable[[Sequence[int]], NDArray[np.float32]]:
    def model(_: Sequence[int]) -> NDArray[np.float32]:
        logits = np.zeros(VOCABULARY_SIZE, dtype=np.float32)
        logits[token] = SURE
        return logits

    return model


def continued(text: list[int], count: int) -> list[int]:
    """What the confident model says behind a text."""
    whole = list(text)
    for _ in range(count):
        whole.append(next_token(whole))
    return whole[len(text) :]


def guessed(drafter: Drafter, wishes: Sequence[Wish]) -> list[list[int]]:
    """The tokens of a drafter's drafts."""
    return [draft.token_ids for draft in drafter.draft(wishes)]


def make(
    *,
    cells: int = 100_000,
    sequences: int = 6,
    model: Callable[[Sequence[int]], NDArray[np.float32]] = confident,
    **changes: Any,
) -> tuple[ModelDrafter, MemoryKv]:
    kv = MemoryKv(cells, model=model)
    cache = SequenceCache(kv, sequences=sequences, can_forget_partly=True)
    settings: dict[str, Any] = {
        "vocabulary_size": VOCABULARY_SIZE,
        "shared_tokens": VOCABULARY_SIZE,
        "end_token_ids": {END},
        "batch_tokens": 512,
        "context_length": 10_000,
        "set_threads": lambda threads: None,
        "close": lambda: None,
    }
    return ModelDrafter(cache, **{**settings, **changes}), kv


def test_a_draft_is_what_the_model_says_next() -> None:
    drafter, _ = make()
    assert guessed(drafter, [Wish("a", [1, 2, 3], 5)]) == [continued([1, 2, 3], 5)]


def test_all_slots_are_computed_in_one_batch_for_each_place() -> None:
    drafter, kv = make()
    wishes = [Wish("a", [1, 2], 3), Wish("b", [5], 1), Wish("c", [9, 9, 9], 0), Wish("d", [7, 8], 3)]
    assert guessed(drafter, wishes) == [
        continued([1, 2], 3),
        continued([5], 1),
        [],
        continued([7, 8], 3),
    ]
    assert [len(batch) for batch in kv.batches] == [5, 2, 2]


def test_slots_side_by_side_have_the_drafts_that_each_would_have_alone() -> None:
    rng = random.Random(0)
    together, _ = make()
    alone = {key: make()[0] for key in "abcd"}
    texts = {key: [rng.randrange(290) for _ in range(rng.randrange(1, 60))] for key in "abcd"}
    for _ in range(60):
        keys = rng.sample("abcd", k=rng.randint(1, 4))
        wishes = [Wish(key, texts[key], rng.randrange(6)) for key in keys]
        drafts = guessed(together, wishes)
        assert drafts == [guessed(alone[wish.key], [wish])[0] for wish in wishes]  # type: ignore[index]
        for wish, draft in zip(wishes, drafts, strict=True):
            assert draft == continued(wish.token_ids, wish.most_tokens)
            accepted = rng.randint(0, len(draft))
            wish.token_ids += [*draft[:accepted], rng.randrange(290)]


def test_what_was_guessed_right_is_not_computed_again() -> None:
    drafter, kv = make()
    text = list(range(50))
    (draft,) = guessed(drafter, [Wish("a", text, 4)])
    assert kv.computed_tokens == 50 + 3
    text += [*draft, 5]
    (draft,) = guessed(drafter, [Wish("a", text, 4)])
    assert kv.computed_tokens == 50 + 3 + 2 + 3
    text += [draft[0], 6]
    assert guessed(drafter, [Wish("a", text, 4)]) == [continued(text, 4)]
    assert kv.computed_tokens == 50 + 3 + 2 + 3 + 1 + 3


def test_the_same_text_has_the_same_draft_again() -> None:
    drafter, _ = make()
    wish = Wish("a", [1, 2, 3], 4)
    assert guessed(drafter, [wish]) == guessed(drafter, [wish]) == [continued([1, 2, 3], 4)]


def test_a_draft_stops_where_the_model_is_unsure() -> None:
    drafter, _ = make(model=lambda tokens: always(UNSURE)(tokens) if len(tokens) < 5 else confident(tokens))
    assert guessed(drafter, [Wish("a", [1, 2, 3], 8)]) == [[UNSURE, UNSURE]]


def test_an_end_is_not_guessed() -> None:
    drafter, _ = make(model=lambda tokens: always(END)(tokens) if len(tokens) > 4 else confident(tokens))
    assert guessed(drafter, [Wish("a", [1, 2, 3], 8)]) == [continued([1, 2, 3], 2)]


def test_a_long_text_is_read_in_pieces_before_it_is_drafted_for() -> None:
    drafter, kv = make()
    long, short = [1] * 300, [1, 2]
    drafts = [guessed(drafter, [Wish("a", long, 2), Wish("b", short, 1)]) for _ in range(3)]
    assert drafts == [[[], [short_guess]] for short_guess in continued(short, 1) * 2] + [
        [continued(long, 2), continued(short, 1)]
    ]
    assert max(len(batch) for batch in kv.batches) <= 128 + 2


def test_no_batch_is_larger_than_it_may_be() -> None:
    drafter, kv = make(batch_tokens=32)
    wishes = [Wish(key, [1] * 20, 2) for key in "abcd"]
    while not all(guessed(drafter, wishes)):
        pass
    assert guessed(drafter, wishes) == [continued([1] * 20, 2)] * 4
    assert max(len(batch) for batch in kv.batches) <= 32


def test_a_text_that_does_not_fit_the_cache_has_no_draft_and_the_others_do() -> None:
    drafter, kv = make(cells=55)
    long, short = Wish("a", [1] * 50, 4), Wish("b", [2] * 10, 4)
    assert guessed(drafter, [long, short]) == [[], continued(short.token_ids, 4)]
    assert guessed(drafter, [long, short]) == [[], continued(short.token_ids, 4)]
    assert kv.used_cells < 20
    drafter.forget("a")
    drafter.forget("b")
    assert guessed(drafter, [long]) == [continued(long.token_ids, 4)]


def test_a_failed_computation_costs_only_drafts() -> None:
    drafter, kv = make()
    wish = Wish("a", [1, 2, 3], 4)
    guessed(drafter, [wish])
    kv.is_broken = True
    wish.token_ids += [4, 5]
    assert guessed(drafter, [wish]) == [[]]
    kv.is_broken = False
    assert guessed(drafter, [wish, Wish("b", [1, 2, 3], 2)]) == [[], continued([1, 2, 3], 2)]
    assert kv.filled_sequences == {0}


def test_there_is_no_draft_beyond_the_models_context() -> None:
    drafter, _ = make(context_length=6)
    assert [len(guessed(drafter, [Wish(length, [1] * length, 4)])[0]) for length in (1, 3, 5, 6, 9)] == [
        4,
        3,
        1,
        0,
        0,
    ]


def test_a_token_that_the_draft_model_does_not_know_ends_drafting() -> None:
    drafter, kv = make(shared_tokens=290)
    wish = Wish("a", [1, 2, 295], 4)
    assert guessed(drafter, [wish]) == [[]]
    assert kv.computed_tokens == 0


def test_tokens_that_only_the_draft_model_has_are_not_guessed() -> None:
    drafter, _ = make(shared_tokens=200, model=always(250))
    assert guessed(drafter, [Wish("a", [1], 4)]) == [[]]


def test_the_next_turn_finds_what_an_ended_slot_has_read() -> None:
    drafter, kv = make()
    text = list(range(60))
    guessed(drafter, [Wish("a", text, 1)])
    drafter.forget("a")
    drafter.forget("never seen")
    guessed(drafter, [Wish("b", [*text, 5, 6], 1)])
    assert kv.computed_tokens == 60 + 2


@pytest.fixture(scope="module")
def city(byte_vocabulary: Vocabulary) -> Callable[[bytes], State]:
    """A grammar of one JSON object, after some text that it has taken."""
    compiled = LLGuidanceBackend(byte_vocabulary).compile(
        AnswerSpec(body=admit_constraints([Constraint(kind="json_schema", source=CITY_SCHEMA)], None))
    )

    def after(text: bytes) -> State:
        state, token_ids = compiled.start(), byte_vocabulary.encode(text)
        assert state.advance(token_ids) == len(token_ids)
        return state

    return after


def test_a_draft_follows_the_grammar_and_forced_tokens_need_no_batch(
    city: Callable[[bytes], State], byte_vocabulary: Vocabulary
) -> None:
    drafter, kv = make(
        vocabulary_size=len(byte_vocabulary.tokens),
        shared_tokens=len(byte_vocabulary.tokens),
        model=always(ord("L")),
    )
    state = city(b'{"name_of_the_city":"')
    text = byte_vocabulary.encode(b'{"name_of_the_city":"')
    (draft,) = guessed(drafter, [Wish("a", text, 16, state)])
    assert draft == byte_vocabulary.encode(b'London","visitors":')[:16]
    assert len(kv.batches) == 1
    assert state.accepts(draft) == len(draft) == 16


def test_nothing_is_guessed_behind_a_finished_answer(city: Callable[[bytes], State]) -> None:
    drafter, _ = make(model=always(ord("1")))
    whole = b'{"name_of_the_city":"Paris","visitors":12}'
    assert guessed(drafter, [Wish("a", [1, 2], 4, city(whole))]) == [[]]


class Target:
    """The embedded model as a target, with what its engine knows of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        bindings.initialize()
        spec = self.spec()
        self.options = model_options(spec, read_options(spec))
        self.model = bindings.NativeModel(path, self.options)
        self.vocabulary = self.model.read_vocabulary(())

    def spec(self, **values: Any) -> ModelSpec:
        return ModelSpec.model_validate({"model_id": str(self.path), "model_name": "big", **values})

    def drafter(self, vocabulary: Vocabulary | None = None, **values: Any) -> Drafter | None:
        spec = self.spec(max_concurrent_requests=2, **values)
        return load_drafter(
            spec,
            target=self.model,
            vocabulary=vocabulary or self.vocabulary,
            target_options=self.options,
            context_options=context_options(spec, read_options(spec), 512),
            context_length=512,
        )


@pytest.fixture(scope="module")
def target(smollm2_path: Path) -> Iterator[Target]:
    target = Target(smollm2_path)
    yield target
    target.model.close()


def test_a_spec_without_speculation_has_no_drafter(target: Target) -> None:
    assert target.drafter() is None


def test_a_spec_chooses_its_drafter(target: Target) -> None:
    assert isinstance(target.drafter(speculative="ngram"), NgramDrafter)
    drafter = target.drafter(speculative="auto", draft_model_id=str(target.path), draft_cache_quant="Q8")
    assert isinstance(drafter, ModelDrafter)
    drafter.close()


def test_a_real_model_drafts_for_two_texts_at_once_as_for_each_alone(target: Target) -> None:
    texts = ["Count: one, two, three, four, five, six,", "a b c d e f g h i j k"]
    prompts = [target.model.tokenize(text.encode(), parse_control_tokens=False) for text in texts]
    drafter = target.drafter(draft_model_id=str(target.path))
    assert drafter is not None
    alone = [guessed(drafter, [Wish(number, prompt, 6)])[0] for number, prompt in enumerate(prompts)]
    for number in range(2):
        drafter.forget(number)
    together = guessed(drafter, [Wish(number + 2, prompt, 6) for number, prompt in enumerate(prompts)])
    drafter.close()
    assert together == alone
    said = [b"".join(target.vocabulary.tokens[token] for token in draft) for draft in alone]
    assert said[0].startswith(b" seven, eight")
    assert said[1].startswith(b" l m n")


def test_a_draft_model_with_another_vocabulary_is_refused(target: Target) -> None:
    tokens = (*target.vocabulary.tokens[:-1], b"?!?")
    other = replace(target.vocabulary, tokens=tokens, fingerprint="other")
    with pytest.raises(InvalidConfig, match=r"another vocabulary \(49152 tokens\).* '\?!\?' to the other"):
        target.drafter(other, draft_model_id=str(target.path))


@pytest.mark.parametrize("speculative", ["ngram", "auto"])
def test_a_model_that_cannot_take_tokens_back_is_not_drafted_for(
    target: Target, monkeypatch: pytest.MonkeyPatch, speculative: str
) -> None:
    monkeypatch.setattr(target.model, "can_forget_partly", False)
    with pytest.raises(InvalidConfig, match="the model 'big' cannot take tokens back"):
        target.drafter(speculative=speculative)


def test_gpus_that_are_not_there_are_refused_by_the_drafts_own_key(target: Target) -> None:
    if bindings.supports_gpus():
        pytest.skip("this build of llama.cpp has GPUs")
    with pytest.raises(InvalidConfig, match="`draft_gpus` asks for a GPU"):
        target.drafter(draft_model_id=str(target.path), draft_gpus="8")


def test_a_quantized_draft_cache_needs_flash_attention(target: Target) -> None:
    with pytest.raises(InvalidConfig, match="`draft_cache_quant` is Q4, which needs flash attention"):
        target.drafter(
            draft_model_id=str(target.path),
            draft_cache_quant="Q4",
            backend_extra_args={"flash_attn": False},
        )
