from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from gallama.constraints import AnswerSpec, LLGuidanceBackend, admit_constraints
from gallama.conversation import Constraint
from gallama.engines.llama_cpp import speculation
from gallama.engines.llama_cpp.speculation import (
    MODEL_DRAFT,
    Draft,
    Drafter,
    Kind,
    NgramDrafter,
    Trust,
    Wish,
    cut_to_grammar,
)
from gallama.engines.step_cost import StepCost
from gallama.errors import ConstraintFailed
from gallama.generation import State, Vocabulary

END = 9999
CITY_SCHEMA = {
    "type": "object",
    "properties": {"name_of_the_city": {"enum": ["Paris", "London"]}, "visitors": {"type": "integer"}},
    "required": ["name_of_the_city", "visitors"],
    "additionalProperties": False,
}
CITY = b'{"name_of_the_city":"Paris","visitors":12}'


def guessed(drafter: Drafter, wishes: Sequence[Wish]) -> list[list[int]]:
    """The tokens of a drafter's drafts."""
    return [draft.token_ids for draft in drafter.draft(wishes)]


def guess(text: Sequence[int], most_tokens: int = 16, state: State | None = None) -> list[int]:
    """What a drafter that has never seen the text guesses next."""
    (draft,) = guessed(NgramDrafter([END]), [Wish("a", list(text), most_tokens, state)])
    return draft


def looked_up(text: list[int], most_tokens: int) -> list[int]:
    """The same by searching the text for its last tokens, as slowly as that is."""
    for length, trusted in ((16, 64), (8, 32), (4, 12), (2, 6)):
        for place in range(len(text) - 1, length - 1, -1):
            if text[place - length : place] == text[-length:]:
                count = min(most_tokens, trusted)
                return [text[place + step % (len(text) - place)] for step in range(count)]
    return []


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


def test_a_copy_is_guessed_as_far_as_wished() -> None:
    source = list(range(100, 200))
    assert guess([*source, 1, 2, *source[10:26]], 64) == source[26:90]


def test_the_latest_of_several_places_is_followed() -> None:
    assert guess([1, 2, 3, 4, 50, 51, 1, 2, 3, 4, 60, 61, 1, 2, 3, 4], 2) == [60, 61]


def test_a_longer_match_goes_before_a_later_one() -> None:
    assert guess([1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 1, 2, 3, 4], 1) == [50]


def test_the_fewer_tokens_are_alike_the_fewer_are_guessed() -> None:
    source = list(range(100, 150))
    lengths = [len(guess([*source, *source[:alike]], 40)) for alike in (1, 2, 3, 4, 8, 16)]
    assert lengths == [0, 6, 6, 12, 32, 40]


def test_a_loop_is_guessed_to_go_on() -> None:
    assert guess([7, 8, 9] * 4, 7) == [7, 8, 9, 7, 8, 9, 7]
    assert guess([5] * 6, 4) == [5, 5, 5, 5]


@pytest.mark.parametrize("text", [[], [1], [1, 2], list(range(500))])
def test_a_text_without_repetition_is_not_guessed(text: list[int]) -> None:
    assert guess(text) == []


def test_a_guess_stops_before_an_end_token() -> None:
    assert guess([1, 2, 3, 4, 50, 51, END, 60, 1, 2, 3, 4]) == [50, 51]


def test_a_growing_text_is_guessed_like_one_seen_at_once() -> None:
    rng = random.Random(0)
    for _ in range(20):
        text: list[int] = []
        drafter, drafts = NgramDrafter([END]), 0
        while len(text) < 300:
            text += [rng.randrange(10) for _ in range(rng.choice((1, 1, 1, 2, 30)))]
            (draft,) = guessed(drafter, [Wish("a", text, 8)])
            drafts += bool(draft)
            assert draft == guess(text, 8) == looked_up(text, 8)
        assert drafts > 10


SOURCE = list(range(100, 160))
ELSEWHERE = [*SOURCE[13:15], 55, 56, 57]


def departed(tokens: Sequence[int], *, then: Sequence[int]) -> Draft:
    """What is guessed where a copy of SOURCE's first 12 tokens has gone on with others, and these after them.

    SOURCE[13:15] stands in another place, too, where something else follows.
    """
    drafter, text = NgramDrafter([END]), [*SOURCE, *ELSEWHERE, *SOURCE[:12]]
    wish = Wish("a", text, 16)
    assert guessed(drafter, [wish]) == [SOURCE[12:28]]
    for token in (*tokens, *then):
        text.append(token)
        (draft,) = drafter.draft([wish])
    return draft


@pytest.mark.parametrize(
    ("tokens", "goes_on"), [([7], 13), ([7, 8, 9], 13), ([], 13), ([7], 20), ([], 24), ([*range(70, 80)], 9)]
)
def test_a_copy_that_left_its_source_is_found_there_again(tokens: list[int], goes_on: int) -> None:
    draft = departed(tokens, then=SOURCE[goes_on : goes_on + 2])
    assert draft.token_ids == SOURCE[goes_on + 2 : goes_on + 18]
    assert draft.kind == Kind(6)


def test_a_copy_that_left_its_source_for_long_is_over() -> None:
    draft = departed([7, 5] * 10, then=SOURCE[13:15])
    assert draft.token_ids == [55, 56, 57, *SOURCE[:3]]
    assert draft.kind == Kind(2)


def test_a_draft_tells_how_much_is_alike_and_whether_in_the_prompt() -> None:
    text = [*SOURCE, 7, *SOURCE[5:10]]
    for prompt_length, is_from_prompt in ((len(SOURCE), True), (5, False)):
        wish = Wish("a", text, 8, prompt_length=prompt_length)
        (draft,) = NgramDrafter([END]).draft([wish])
        assert draft == Draft(SOURCE[10:18], Kind(5, is_from_prompt))


def test_texts_side_by_side_do_not_mix() -> None:
    drafter = NgramDrafter([END])
    wishes = [Wish("a", [1, 2, 3, 4, 50, 1, 2, 3, 4], 1), Wish("b", [1, 2, 3, 4, 60, 1, 2, 3, 4], 1)]
    assert guessed(drafter, wishes) == [[50], [60]]
    assert guessed(drafter, wishes[::-1]) == [[60], [50]]


def test_a_forgotten_slot_begins_anew() -> None:
    drafter = NgramDrafter([END])
    guessed(drafter, [Wish("a", [1, 2, 3, 4, 50, 1, 2, 3, 4], 1)])
    drafter.forget("a")
    drafter.forget("never seen")
    assert guessed(drafter, [Wish("a", [1, 2, 3, 4, 60, 1, 2, 3, 4], 1)]) == [[60]]


def test_the_memory_of_an_index_does_not_grow_with_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "_PLACES", 64)
    rng = random.Random(0)
    text = [rng.randrange(50) for _ in range(2000)]
    index = speculation._NgramIndex(text)
    index.catch_up()
    assert {len(table) for table in index._tables.values()} == {64}
    for _ in range(300):  # what was overwritten is not found, and nothing wrong is
        text.append(rng.randrange(50))
        index.catch_up()
        if draft := index.continuation(1)[0]:
            assert any(text[place - 2 : place] == text[-2:] for place in range(2, len(text)))
            assert draft[0] in text


def test_a_long_text_is_taken_in_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "_INDEXED_PER_STEP", 10)
    drafter = NgramDrafter([END])
    wish = Wish("a", [*range(100, 130), *range(120, 124)], 2)
    drafts = [guessed(drafter, [wish])[0] for _ in range(4)]
    assert drafts == [[], [], [124, 125], [124, 125]]


def test_a_draft_is_cut_where_the_grammar_refuses_it(
    city: Callable[[bytes], State], byte_vocabulary: Vocabulary
) -> None:
    state = city(b'{"name_of_the_city":"Paris","visitors":1')
    draft = byte_vocabulary.encode(b"23 million")
    assert cut_to_grammar(state, draft, 16) == byte_vocabulary.encode(b"23")


def test_what_the_grammar_forces_completes_a_draft_and_replaces_a_wrong_one(
    city: Callable[[bytes], State], byte_vocabulary: Vocabulary
) -> None:
    state = city(b'{"name_of_the_city":"')
    whole = byte_vocabulary.encode(b'Paris","visitors":')
    for draft in (b"P", b"Pa", b"Pxx", b'Paris","age":'):
        assert cut_to_grammar(state, byte_vocabulary.encode(draft), 32) == whole
    assert cut_to_grammar(state, byte_vocabulary.encode(b"P"), 5) == byte_vocabulary.encode(b"Paris")


def test_the_state_itself_is_left_where_it_is(
    city: Callable[[bytes], State], byte_vocabulary: Vocabulary
) -> None:
    state = city(b'{"name_of_the_city":"')
    cut_to_grammar(state, byte_vocabulary.encode(b"Paris"), 8)
    assert state.accepts(byte_vocabulary.encode(b"London")) == len(b"London")


def test_every_draft_is_one_that_the_grammar_takes(
    city: Callable[[bytes], State], byte_vocabulary: Vocabulary
) -> None:
    rng = random.Random(0)
    for _ in range(200):
        cut = rng.randrange(len(CITY))
        state, draft = city(CITY[:cut]), byte_vocabulary.encode(CITY[cut:])
        wrong = rng.randrange(len(draft))
        draft[wrong] = rng.randrange(len(byte_vocabulary.tokens))
        taken = cut_to_grammar(state, draft, 12)
        assert len(taken) <= 12
        assert state.accepts(taken) == len(taken) >= min(wrong, 12)


def test_nothing_comes_behind_a_finished_answer(
    city: Callable[[bytes], State], byte_vocabulary: Vocabulary
) -> None:
    assert cut_to_grammar(city(CITY), byte_vocabulary.encode(b"}"), 8) == []


def test_a_grammar_that_breaks_on_a_guess_ends_it(city: Callable[[bytes], State]) -> None:
    class Fragile:
        """Takes two tokens, and breaks on the third."""

        status = "running"

        def __init__(self, taken: int = 0) -> None:
            self.taken = taken

        def clone(self) -> Fragile:
            return Fragile(self.taken)

        def forced(self) -> list[int]:
            return []

        def advance(self, token_ids: Sequence[int]) -> int:
            if self.taken == 2:
                raise ConstraintFailed("It broke.")
            self.taken += len(token_ids)
            return len(token_ids)

    state: State = Fragile()  # type: ignore[assignment]
    assert cut_to_grammar(state, [1, 2, 3, 4], 8) == [1, 2]


def test_an_ngram_draft_follows_the_grammar(
    city: Callable[[bytes], State], byte_vocabulary: Vocabulary
) -> None:
    before = byte_vocabulary.encode(b'I saw "Paris! in the list of "Paris')
    text = before + byte_vocabulary.encode(b'{"name_of_the_city":"P')
    draft = guess(text, 8, city(b'{"name_of_the_city":"P'))
    assert draft == byte_vocabulary.encode(b'aris","v')


def costs(seconds: dict[int, float]) -> StepCost:
    cost = StepCost()
    for tokens, each in seconds.items():
        cost.record(tokens, each)
    return cost


# A GPU reads the whole model for one token, and twenty more cost nothing.
GPU = {1: 0.010, 20: 0.0105}
# A CPU as measured: the second token costs nearly as much as the first.
CPU = {1: 0.0075, 2: 0.0136, 3: 0.0193, 4: 0.0213, 5: 0.027, 6: 0.029, 8: 0.035, 12: 0.05, 16: 0.069}


COPY = {alike: Kind(alike, is_from_prompt=True) for alike in (2, 4, 8, 16)}


def settle(trust: Trust, kind: Kind, seconds: dict[int, float], *, right: float) -> list[int]:
    """The lengths of 60 drafts, of whose tokens a share is right, one after the other."""
    rng, cost, lengths = random.Random(0), costs(seconds), []
    for _ in range(60):
        length = trust.best_length(16, kind, 1, cost)
        accepted = next((place for place in range(length) if rng.random() > right), length)
        trust.record(kind, length, accepted)
        lengths.append(length)
    return lengths


def test_long_drafts_pay_where_they_cost_next_to_nothing() -> None:
    assert settle(Trust(), COPY[16], GPU, right=1.0)[0] == 16
    assert min(settle(Trust(), COPY[4], GPU, right=0.6)[20:]) >= 2


def test_on_a_cpu_only_what_is_nearly_sure_pays() -> None:
    assert settle(Trust(), COPY[2], CPU, right=0.6) == [0] * 60
    assert settle(Trust(), COPY[4], CPU, right=0.6)[10:] == [0] * 50
    assert settle(Trust(), COPY[16], CPU, right=1.0)[-1] == 16


def test_drafting_ends_by_itself_where_it_loses() -> None:
    lengths = settle(Trust(), COPY[16], CPU, right=0.5)
    assert lengths[0] > 0
    assert sum(length > 0 for length in lengths[10:]) <= 5, "now and then it is tried again"


def test_a_place_that_is_easy_to_guess_is_tried_again() -> None:
    trust = Trust()
    settle(trust, COPY[16], CPU, right=0.0)
    assert settle(trust, COPY[16], CPU, right=1.0)[-1] == 16


def test_what_an_answer_repeats_of_itself_is_trusted_less_than_what_it_copies() -> None:
    for alike in (2, 4, 8, 16):
        assert Trust().probability(Kind(alike)) < Trust().probability(COPY[alike])


def test_what_was_right_so_far_makes_the_rest_surer() -> None:
    repeating, cost = Trust(), costs(CPU)
    for _ in range(50):
        repeating.record(Kind(16), 16, 16)
    assert repeating.probability(Kind(15)) == Trust().probability(Kind(15))
    assert repeating.best_length(16, Kind(15), 1, cost) > Trust().best_length(16, Kind(15), 1, cost)


def watch(trust: Trust, kind: Kind, *, right: bool, computed: bool = False) -> None:
    """Let the text go on behind a guess of one token."""
    trust.watch([1, 2], Draft([3], kind))
    if computed:
        assert trust.best_length(1, kind, 1, costs(GPU)) == 1
    trust.watch([1, 2, 3 if right else 4], Draft([]))


def test_a_guess_that_was_not_computed_is_held_against_the_text() -> None:
    trust = Trust()
    for _ in range(10):
        watch(trust, COPY[4], right=True)
        watch(trust, COPY[8], right=False)
    assert trust.probability(COPY[4]) > Trust().probability(COPY[4])
    assert trust.probability(COPY[8]) < 0.5


def test_a_guess_that_was_computed_is_not_counted_twice() -> None:
    trust = Trust()
    watch(trust, COPY[16], right=False, computed=True)
    assert trust.probability(COPY[16]) == Trust().probability(COPY[16])


def test_many_answers_at_once_leave_little_to_gain_on_a_cpu() -> None:
    lengths = [Trust().best_length(16, COPY[16], at_once, costs(CPU)) for at_once in (1, 8, 16)]
    assert lengths[0] > 2 * lengths[1] > lengths[2] == 0


def test_what_guessing_takes_counts() -> None:
    cost = costs(GPU)
    lengths = [Trust().best_length(8, MODEL_DRAFT, 1, cost, seconds) for seconds in (0.0, 0.001, 0.005, 0.05)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 8
    assert lengths[-1] == 0


def test_nothing_is_drafted_while_costs_are_unknown() -> None:
    assert Trust().best_length(16, COPY[16], 1, StepCost()) == 0


def test_each_kind_of_guess_has_its_own_record() -> None:
    trust = Trust()
    for _ in range(20):
        trust.record(COPY[2], 3, 0)
    assert trust.probability(COPY[2]) < 0.2
    assert trust.probability(COPY[16]) == Trust().probability(COPY[16])
