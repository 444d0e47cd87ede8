"""The benchmarks: that they start, ask for what can be asked, and read and show what came of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chart, engine, load, memory, run_all, speculative
from gallama.api.openai_chat_request import ChatCompletionBody, to_chat_request
from gallama.api.request_bodies import parse_body
from gallama.constraints import admit_constraints

ROOT = Path(__file__).parents[1]
PERSON = {
    "name": "Ana",
    "age": 30,
    "occupation": "doctor",
    "address": {"street_name": "Elm", "city": "Rome", "postal_code": "00100", "country_code": "US"},
    "is_employed": True,
    "skills": ["rust", "cooking"],
}
ANSWER = load.Answer(
    seconds=2, first_piece_seconds=0.5, last_piece_seconds=1.5, first_piece="a b", completion_tokens=12
)


def line(delta: dict[str, Any]) -> str:
    return "data: " + json.dumps({"choices": [{"delta": delta}]})


def test_every_benchmark_tells_what_it_does() -> None:
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    programs = [name for name in names if name not in ("load", "servers")]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{name}", "--help"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in programs
    ]
    for name, process in zip(programs, started, strict=True):
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, ""), name
        assert output.startswith("usage:"), name
    assert set(run_all.BENCHMARKS) <= set(programs)


def all_bodies() -> dict[str, load.Body]:
    bodies = {f"engine {kind}": make("m", 1) for kind, make in load.REQUESTS.items()}
    bodies |= {
        f"speculative {task} {i}": body
        for task, asked in speculative.BODIES.items()
        for i, body in enumerate(asked)
    }
    return bodies | {f"memory {i}": body for i, (body, _) in enumerate(memory.mixed_requests(12, 0))}


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in all_bodies().items()])
def test_what_the_benchmarks_ask_for_is_admitted(body: load.Body) -> None:
    request = to_chat_request(
        parse_body(json.dumps(body).encode(), ChatCompletionBody), request_id="r", model="m"
    )
    admit_constraints(request.constraints, request.on_unsupported)


def test_the_memory_mix_streams_waits_chooses_and_leaves() -> None:
    mix = list(memory.mixed_requests(24, 0))
    assert {bool(body.get("stream")) for body, _ in mix} == {True, False}
    assert {body.get("n", 1) for body, _ in mix} == {1, 2}
    assert {leaves for _, leaves in mix} == {True, False}
    assert any("tools" in body and leaves for body, leaves in mix)


def test_an_answer_is_read_from_its_stream() -> None:
    usage = {"completion_tokens": 7, "completion_tokens_details": {"accepted_prediction_tokens": 3}}
    lines = [
        (0.1, line({"role": "assistant", "content": ""})),
        (0.2, line({"thinking": "<a>"})),
        (0.3, ""),
        (0.4, line({"content": "Hello"})),
        (0.5, line({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]})),
        (0.6, line({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]})),
        (0.7, "data: " + json.dumps({"choices": [], "usage": usage})),
        (0.8, "data: [DONE]"),
    ]
    assert load.read_answer(0.9, lines) == load.Answer(
        seconds=0.9,
        first_piece_seconds=0.2,
        last_piece_seconds=0.6,
        first_piece="<a>",
        completion_tokens=7,
        guessed_right=3,
        content="Hello",
        thinking="<a>",
        arguments="{}",
    )


def test_an_error_in_a_stream_is_no_answer() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        load.read_answer(0.1, [(0.1, 'data: {"error": {"message": "out of memory"}}')])


@pytest.mark.parametrize(
    ("kind", "valid", "invalid"),
    [
        ("json", {"content": json.dumps(PERSON)}, {"content": json.dumps(PERSON | {"age": 121})}),
        (
            "tool",
            {"arguments": '{"location": "Boston", "unit": "celsius"}'},
            {"arguments": '{"location": "Boston"}'},
        ),
        ("thinking", {"thinking": "<plan>1</plan>"}, {"thinking": "<plan>1"}),
        ("free", {"content": "A llama."}, {"content": ""}),
    ],
)
def test_answers_that_lack_their_form_are_seen(
    kind: str, valid: dict[str, str], invalid: dict[str, str]
) -> None:
    assert load.is_valid(kind, replace(ANSWER, **valid))  # type: ignore[arg-type]
    assert not load.is_valid(kind, replace(ANSWER, **invalid))  # type: ignore[arg-type]


def test_a_prefix_is_asked_about_anew_in_each_round() -> None:
    rounds = engine.numbers("prefix", 4)
    assert [next(rounds), next(rounds)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_speed_of_an_answer_leaves_its_first_piece_out() -> None:
    count_words: Callable[[str], int] = lambda text: len(text.split())  # noqa: E731
    assert engine.Turns(answers=[ANSWER]).tokens_per_second(count_words) == 10


def test_the_table_and_the_chart_show_what_was_found_and_missed(tmp_path: Path) -> None:
    row = {"kind": "json", "at_once": 1, "ratio_to_peer": 0.5, "ratio_to_without": 0.7, "target": 0.45}
    speed = {"at_once": 1, "json_over_free": 1.3, "target": 1.15}
    (tmp_path / "engine.json").write_text(json.dumps({"work": [row], "json_over_free": [speed]}))
    table = chart.write_chart(tmp_path)
    assert table.splitlines()[2:] == [
        "| json, 1 at once / llama-server | 0.5 | ≤ 0.45, missed |",
        "| json, 1 at once / without jump-forward | 0.7 |  |",
        "| json over free text, 1 at once | 1.3 | ≥ 1.15 |",
    ]
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_engine_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.engine", "--quick", "--kinds", "json", "--at-once", "1"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "figures")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "figures").read_text())["work"]
    assert row["ours_invalid"] == row["without_invalid"] == 0
    assert row["ratio_to_without"] > 0
