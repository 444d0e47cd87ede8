from gallama.conversation import Span
from gallama.generation import GeneratedChunk, TokenLogprob, Vocabulary
from gallama.worker.raw_answer import RawAnswer, run_of


def answer(*chunks: GeneratedChunk) -> RawAnswer:
    raw = RawAnswer()
    for chunk in chunks:
        raw.add(run_of(chunk, "tools"))
    return raw


SAMPLED = GeneratedChunk(text="ab", sampled_tokens=1)
MARKER = GeneratedChunk(control_token="[TOOL_CALLS]", sampled_tokens=1)
FORCED = GeneratedChunk(text="cdé", forced_tokens=3)


def test_the_tokens_of_a_beginning_are_those_of_its_text_and_its_control_tokens(
    byte_vocabulary: Vocabulary,
) -> None:
    kept = answer(SAMPLED, MARKER, FORCED).until(len("ab[TOOL_CALLS]cdé") - 1)
    assert kept.text == "ab[TOOL_CALLS]cd"
    marker = byte_vocabulary.control_tokens["[TOOL_CALLS]"]
    assert kept.token_ids(byte_vocabulary) == [ord("a"), ord("b"), marker, ord("c"), ord("d")]


def test_a_control_token_is_kept_whole_or_not_at_all() -> None:
    raw = answer(SAMPLED, MARKER, FORCED)
    assert [raw.until(length).text for length in (0, 1, 2, 5)] == ["", "a", "ab", "ab"]
    assert raw.until(len("ab[TOOL_CALLS]")).text == "ab[TOOL_CALLS]"


def test_a_beginning_can_be_read_again() -> None:
    kept = answer(SAMPLED, MARKER, FORCED).until(3)
    assert [run.to_chunk() for run in kept.runs] == [GeneratedChunk(text="ab")]


def test_a_token_with_a_log_probability_is_kept_with_it_or_not_at_all() -> None:
    first, rest = (TokenLogprob(token, -1.0) for token in (0xC3, 1))
    token = GeneratedChunk(text="ab", sampled_tokens=1, logprobs=(TokenLogprob(0, -1.0),))
    begun = GeneratedChunk(sampled_tokens=1, logprobs=(first,))
    ended = GeneratedChunk(text="éf", sampled_tokens=1, logprobs=(rest,))
    raw = answer(token, begun, ended)
    assert [raw.until(length).text for length in range(5)] == ["", "", "ab", "ab", "abéf"]
    assert [run.logprobs for run in raw.until(3).runs] == [token.logprobs]
    assert [run.logprobs for run in raw.until(4).runs] == [token.logprobs, (first,), (rest,)]


def test_a_token_that_only_begins_a_character_counts_in_its_span() -> None:
    begun, ended = GeneratedChunk(sampled_tokens=1), GeneratedChunk(text="é", sampled_tokens=1)
    assert answer(begun, ended).spans() == (Span(text="é", tokens=2, by="sampled", constraint="tools"),)


def test_runs_that_came_about_in_one_way_are_one_span() -> None:
    raw = answer(SAMPLED, SAMPLED, MARKER, FORCED, FORCED)
    assert raw.spans() == (
        Span(text="abab[TOOL_CALLS]", tokens=3, by="sampled", constraint="tools"),
        Span(text="cdécdé", tokens=6, by="forced", constraint="tools"),
    )


def test_the_length_is_that_of_the_text() -> None:
    raw = answer(SAMPLED, MARKER, FORCED)
    kept = raw.until(len("ab[TOOL_CALLS]c"))
    assert (raw.length, kept.length) == (len(raw.text), len(kept.text))
