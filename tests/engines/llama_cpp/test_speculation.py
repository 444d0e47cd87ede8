from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from gallama.constraints import AnswerSpec, LLGuidanceBackend, admit_constraints
from gallama.conversation import Constraint
from gallama.engines.llama_cpp import speculation
from gallama.engines.llama_cpp.speculation import DraftLength, NgramDrafter, Wish, cut_to_grammar
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


def guess(text: Sequence[int], most_tokens: int = 16, state: State | None = None) -> list[int]:
    """What a drafter that has never seen the text guesses next."""
    (draft,) = NgramDrafter([END]).draft([Wish("a", list(text), most_tokens, state)])
    return draft


def looked_up(text: list[int], most_tokens: int) -> list[int]:
    """The same by searching the text for its last tokens, as slowly as that is."""
    for length, trusted in ((16, most_tokens), (8, 16), (4, 8), (2, 3)):
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
    lengths = [len(guess([*source, *source[:alike]], 32)) for alike in (1, 2, 3, 4, 8, 16)]
    assert lengths == [0, 3, 3, 8, 16, 32]


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
            text += [rng.randrange(4) for _ in range(rng.choice((1, 1, 1, 2, 30)))]
            (draft,) = drafter.draft([Wish("a", text, 8)])
            drafts += bool(draft)
            assert draft == guess(text, 8) == looked_up(text, 8)
        assert drafts > 10


def test_texts_side_by_side_do_not_mix() -> None:
    drafter = NgramDrafter([END])
    wishes = [Wish("a", [1, 2, 3, 4, 50, 1, 2, 3, 4], 1), Wish("b", [1, 2, 3, 4, 60, 1, 2, 3, 4], 1)]
    assert drafter.draft(wishes) == [[50], [60]]
    assert drafter.draft(wishes[::-1]) == [[60], [50]]


def test_a_forgotten_slot_begins_anew() -> None:
    drafter = NgramDrafter([END])
    drafter.draft([Wish("a", [1, 2, 3, 4, 50, 1, 2, 3, 4], 1)])
    drafter.forget("a")
    drafter.forget("never seen")
    assert drafter.draft([Wish("a", [1, 2, 3, 4, 60, 1, 2, 3, 4], 1)]) == [[60]]


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
        if draft := index.continuation(1):
            assert any(text[place - 2 : place] == text[-2:] for place in range(2, len(text)))
            assert draft[0] in text


def test_a_long_text_is_taken_in_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "_INDEXED_PER_STEP", 10)
    drafter = NgramDrafter([END])
    wish = Wish("a", [*range(100, 130), *range(120, 124)], 2)
    drafts = [drafter.draft([wish])[0] for _ in range(4)]
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


def record(length: DraftLength, drafted: int, accepted: int, *, cost: float = 0.1) -> None:
    length.record(drafted, accepted, saving_per_accepted=1.0, cost_per_drafted=cost)


def test_drafts_grow_while_they_are_right_and_shrink_when_they_are_wrong() -> None:
    length = DraftLength(16)
    lengths = [length.most_tokens()]
    for _ in range(8):
        record(length, lengths[-1], lengths[-1])
        lengths.append(length.most_tokens())
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (4, 16)
    for _ in range(30):  # one of two
        record(length, 2, 1)
    assert 1 <= length.most_tokens() <= 4


def test_a_limit_below_the_first_length_is_kept() -> None:
    length = DraftLength(1)
    assert length.most_tokens() == 1
    record(length, 1, 1)
    assert length.most_tokens() == 1


def test_drafting_stops_where_it_loses() -> None:
    length = DraftLength(16)
    while not length.is_off:
        record(length, length.most_tokens(), 0)
    assert length.most_tokens() == 0


def test_what_is_worth_drafting_depends_on_its_cost() -> None:
    cheap, dear, hopeless = DraftLength(16), DraftLength(16), DraftLength(16)
    for _ in range(50):
        record(cheap, 4, 3, cost=0.05)
        record(dear, 4, 3, cost=0.6)
        record(hopeless, 4, 3, cost=0.9)
    assert cheap.most_tokens() > dear.most_tokens() > hopeless.most_tokens() == 0


def test_nothing_is_concluded_while_costs_are_unknown() -> None:
    length = DraftLength(16)
    for _ in range(20):
        length.record(4, 0, saving_per_accepted=0.0, cost_per_drafted=0.0)
    assert length.most_tokens() == 4


def test_after_a_pause_one_short_draft_is_tried() -> None:
    length = switched_off()
    pause = [length.most_tokens() for _ in range(64)]
    assert pause == [0] * 64
    assert length.most_tokens() == 2
    record(length, 2, 1)
    assert [length.most_tokens() for _ in range(65)] == [0] * 64 + [2]


def test_the_trial_waits_for_a_guess() -> None:
    length = switched_off()
    for _ in range(65):
        length.most_tokens()
    for _ in range(5):
        record(length, 0, 0)
        assert length.most_tokens() == 2


def test_a_trial_that_is_right_switches_drafting_on_again() -> None:
    length = switched_off()
    for _ in range(65):
        length.most_tokens()
    record(length, 2, 2)
    assert not length.is_off
    assert length.most_tokens() >= 4


def switched_off() -> DraftLength:
    length = DraftLength(16)
    while not length.is_off:
        record(length, 4, 0)
    return length
