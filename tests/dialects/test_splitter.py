"""The splitter where a model does not keep to the envelope, and what it may hold back."""

from __future__ import annotations

import time

import pytest

from gallama.dialects import (
    DIALECTS,
    ArgumentsPiece,
    CallStarted,
    Piece,
    Splitter,
    TextPiece,
)

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def hermes(**options: object) -> Splitter:
    return Splitter(DIALECTS["hermes"], **{"tools_offered": True, **options})  # type: ignore[arg-type]


def whole(splitter: Splitter, text: str) -> list[Piece]:
    return splitter.feed(text) + splitter.finish()


def test_everything_is_text_when_no_tools_were_offered() -> None:
    assert hermes(tools_offered=False).feed(CALL) == [TextPiece(CALL)]


def test_text_is_given_out_at_once() -> None:
    splitter = hermes()

    assert splitter.feed("Hello <") == [TextPiece("Hello ")]
    assert splitter.feed("b") == [TextPiece("<b")]


def test_arguments_are_given_out_as_they_come_and_unchanged() -> None:
    splitter = hermes()

    assert splitter.feed('<tool_call>\n{"name": "f", "arguments": {') == [
        CallStarted(0, "f"),
        ArgumentsPiece(0, "{"),
    ]
    assert splitter.feed('"a" :  "\\u0041\\') == [ArgumentsPiece(0, '"a" :  "\\u0041\\')]
    assert splitter.feed('"}') == [ArgumentsPiece(0, '"}')]
    assert splitter.feed('"}}') == [ArgumentsPiece(0, '"}')]


def test_start_of_a_trigger_at_the_end_was_text() -> None:
    splitter = hermes()

    assert splitter.feed("a <tool") == [TextPiece("a ")]
    assert splitter.finish() == [TextPiece("<tool")]


@pytest.mark.parametrize("cut_off", ["<tool_call>", '<tool_call>\n{"name": "get_we', CALL[:34]])
def test_call_that_was_cut_before_its_arguments_is_left_out(cut_off: str) -> None:
    assert whole(hermes(), "Sure. " + cut_off) == [TextPiece("Sure. ")]


@pytest.mark.parametrize(
    "output",
    [
        "<tool_call> is how a call begins",
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "' + "f" * 5000,
        "<tool_call><tool_cal",
    ],
)
def test_what_has_not_the_form_of_a_call_is_text(output: str) -> None:
    assert "".join(p.text for p in whole(hermes(), output) if isinstance(p, TextPiece)) == output


def test_call_after_a_trigger_that_was_none_is_found() -> None:
    assert whole(hermes(), "<tool_call>" + CALL) == [
        TextPiece("<tool_call>"),
        CallStarted(0, "f"),
        ArgumentsPiece(0, '{"a": 1}'),
    ]


def test_text_after_a_call_is_text_and_a_later_call_the_next() -> None:
    assert whole(hermes(), f"{CALL}\nand {CALL}") == [
        CallStarted(0, "f"),
        ArgumentsPiece(0, '{"a": 1}'),
        TextPiece("\nand "),
        CallStarted(1, "f"),
        ArgumentsPiece(1, '{"a": 1}'),
    ]


def test_marker_spelled_out_is_text_where_it_is_a_control_token() -> None:
    splitter = hermes(control_tokens=("<tool_call>", "</tool_call>"))

    assert whole(splitter, CALL) == [TextPiece(CALL)]


def test_marker_spelled_out_in_arguments_is_part_of_them() -> None:
    splitter = hermes(control_tokens=("<tool_call>", "</tool_call>"))
    pieces = splitter.feed_control_token("<tool_call>")
    pieces += splitter.feed('\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n')
    pieces += splitter.feed_control_token("</tool_call>") + splitter.finish()

    assert pieces == [CallStarted(0, "f"), ArgumentsPiece(0, '{"a": "</tool_call>"}')]


def test_control_token_that_is_no_marker_carries_no_text() -> None:
    splitter = hermes()

    assert splitter.feed_control_token("<|im_end|>") == []
    assert splitter.feed("x") == [TextPiece("x")]


def test_family_without_text_before_calls_calls_only_at_the_start() -> None:
    call = '{"name": "f", "parameters": {}}'
    splitter = Splitter(DIALECTS["llama3"], tools_offered=True)

    assert whole(splitter, " " + call) == [TextPiece(" " + call)]


def test_family_without_parallel_calls_ends_after_one() -> None:
    call = '{"name": "f", "parameters": {}}'
    splitter = Splitter(DIALECTS["llama3"], tools_offered=True)

    assert whole(splitter, call + call) == [CallStarted(0, "f"), ArgumentsPiece(0, "{}"), TextPiece(call)]


@pytest.mark.parametrize(
    "unit", ["word ", "<tool_call>", "<tool", CALL, '<tool_call>\n{"name": "'], ids=lambda unit: unit[:24]
)
@pytest.mark.parametrize("chunk_length", [3, 1_000_000])
def test_long_texts_take_linear_time(unit: str, chunk_length: int) -> None:
    def seconds(length: int) -> float:
        text = (unit * (length // len(unit) + 1))[:length]
        splitter = hermes()
        started = time.process_time()
        for start in range(0, length, chunk_length):
            splitter.feed(text[start : start + chunk_length])
        return time.process_time() - started

    # Forty times the text: a quadratic splitter would take 1,600 times as long.
    assert min(seconds(400_000) for _ in range(2)) < 400 * min(seconds(10_000) for _ in range(5))


def test_long_arguments_take_linear_time() -> None:
    splitter = hermes()
    splitter.feed('<tool_call>\n{"name": "f", "arguments": {"a": "')

    started = time.process_time()
    for _ in range(100_000):
        splitter.feed("text")
    assert time.process_time() - started < 10
