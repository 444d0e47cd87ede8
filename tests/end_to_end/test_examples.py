"""Each example does what it promises, on the embedded model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import jsonschema
import pytest

from tests.engines.gguf_of_bert import write_gguf_of_bert

EXAMPLES = Path(__file__).parents[2] / "examples"
RunExample = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_example(gateway_url: str) -> RunExample:
    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(EXAMPLES / name), *arguments],
            env=os.environ | {"GALLAMA_URL": f"{gateway_url}/v1", "GALLAMA_MODEL": "smollm2-135m"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def output_of(run_example: RunExample) -> Callable[..., str]:
    def run(name: str, *arguments: str) -> str:
        done = run_example(name, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_every_example_is_tested_here() -> None:
    source = Path(__file__).read_text()
    untested = [path.name for path in EXAMPLES.glob("*.py") if f'("{path.name}"' not in source]
    assert untested == []


def test_the_chat_remembers_and_reads_only_what_is_new(output_of: Any) -> None:
    output = output_of("chat.py")
    assert [line[:6] for line in output.splitlines() if line.startswith("You:")] == ["You:  "] * 2
    assert len(re.findall(r"^Model: \S", output, re.MULTILINE)) == 2
    (_, _), (read, cached) = re.findall(r"\((\d+) tokens read, (\d+) of them from the cache\)", output)
    assert 0 < int(cached) < int(read)


def test_the_stream_comes_in_pieces_that_add_up(output_of: Any) -> None:
    text, call = output_of("streaming.py").split("\nCall:")
    (counts,) = re.findall(r"\((\d+) tokens in (\d+) pieces\)", text)
    assert int(counts[0]) > 1
    assert int(counts[1]) > 1
    name, arguments = call.strip().split(" ", 1)
    assert name == "send_postcard"
    assert arguments.count("|") > 3
    assert json.loads(arguments.replace("|", "")).keys() == {"friend", "message"}


def test_the_loop_calls_runs_and_answers(output_of: Any) -> None:
    output = output_of("function_calling.py")
    calls = re.findall(r"^Call:   get_current_weather\((.*)\)\nResult: (.*)$", output, re.MULTILINE)
    assert calls
    for arguments, result in calls:
        assert json.loads(arguments)["unit"] in ("celsius", "fahrenheit")
        assert json.loads(result)["location"] == json.loads(arguments)["location"]
    assert re.search(r"^Answer: \S", output, re.MULTILINE)


def test_the_object_fits_the_pydantic_model(output_of: Any) -> None:
    person, *languages = output_of("json_schema.py").splitlines()
    assert re.fullmatch(r".{1,30}, \d{1,3}, (a|no) student", person)
    assert 1 <= len(languages) <= 3
    for language in languages:
        assert re.fullmatch(r"  .{1,30}: (beginner|fluent|native)", language)


def test_the_answers_match_their_patterns(output_of: Any) -> None:
    answers = re.findall(r"^  (.*)$", output_of("regex.py"), re.MULTILINE)
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", answers[0])
    assert answers[1].startswith(("Yes. ", "No. "))
    assert answers[-1] in ("happy", "sad", "angry")


def test_the_thinking_has_the_templates_shape_and_an_answer_follows(output_of: Any) -> None:
    whole, streamed = output_of("thinking.py").split("\nStreamed: ")
    steps = re.findall(r"^Step: +(?=\S)", whole, re.MULTILINE)
    assert 2 <= len(steps) <= 4
    assert re.search(r"^Problem: +\S", whole)
    assert re.search(r"^Difficulty: (easy|medium|hard)$", whole, re.MULTILINE)
    assert re.search(r"^Answer: +\S", whole, re.MULTILINE)
    block, answer = streamed.split("\nAnswer: ", 1)
    assert [part.tag for part in ElementTree.fromstring(block)] == ["problem", "steps", "difficulty"]
    assert answer.strip()


def test_the_first_tool_call_is_guaranteed(output_of: Any, gateway_url: str) -> None:
    output = output_of("first_tool_call.py", gateway_url, "--wait-for-process", str(os.getpid()))
    shown = dict(re.findall(r"^(\w+): +(.*)$", output, re.MULTILINE))
    assert shown["Tool"] == "book_table"
    schema = {
        "properties": {
            "restaurant": {"type": "string", "maxLength": 40},
            "guests": {"type": "integer", "minimum": 1, "maximum": 12},
            "time": {"pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$"},
            "seats": {"enum": ["inside", "terrace"]},
        },
        "required": ["restaurant", "guests", "time", "seats"],
        "additionalProperties": False,
    }
    jsonschema.validate(json.loads(shown["Arguments"]), schema)
    guarantee = json.loads(shown["Guarantee"])
    assert (guarantee["kind"], guarantee["valid"], guarantee["complete"]) == ("tools", True, True)


def test_a_model_is_loaded_asked_and_unloaded(output_of: Any) -> None:
    output = output_of("manage_models.py")
    loaded = re.findall(r"^Loaded:  (\S+), instance \d+, \d+ MB$", output, re.MULTILINE)
    assert loaded == ["smollm2-135m", "second"]
    assert re.search(r"^Answer:  \S", output, re.MULTILINE)
    assert re.search(r"^Removed: second, which gave back [1-9]\d+ MB$", output, re.MULTILINE)


def test_texts_are_completed_freely_and_by_a_pattern(output_of: Any) -> None:
    output = output_of("completion.py")
    assert re.search(r"^Story: Once upon a time there was a Llama that.{20,}", output, re.DOTALL)
    assert len(re.findall(r"^Price: \d{1,3}\.\d\d$", output, re.MULTILINE)) == 2


@pytest.fixture
def minilm(gateway_url: str, minilm_folder: Path, tmp_path: Path) -> Iterator[str]:
    """The name of a model that embeds, loaded beside the others for as long as the test takes."""
    file = write_gguf_of_bert(minilm_folder, tmp_path / "minilm.gguf")
    spec = {"model_id": str(file), "model_type": "embedding"}
    task_id = httpx.post(f"{gateway_url}/add_model", json=spec).json()["task_id"]
    deadline = time.monotonic() + 60
    while httpx.get(f"{gateway_url}/task_status/{task_id}").json()["status"] != "completed":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield "minilm"
    httpx.post(f"{gateway_url}/remove_model", json={"model_name": "minilm"}, timeout=60).raise_for_status()


def test_the_sentence_that_answers_is_found_by_its_meaning(
    output_of: Any, minilm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GALLAMA_EMBEDDING_MODEL", minilm)
    first, *ranked = output_of("search_by_meaning.py").splitlines()
    assert "(384 dimensions, " in first
    assert len(ranked) == 3
    assert ranked[0].endswith("Refunds are paid within two weeks.")


@pytest.fixture
def ended_process_id() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_nobody_waits_for_a_gateway_that_has_ended(run_example: Any, ended_process_id: int) -> None:
    nowhere = "http://127.0.0.1:1"
    done = run_example("first_tool_call.py", nowhere, "--wait-for-process", str(ended_process_id))
    assert done.returncode == 1
    assert done.stderr == "The gateway has ended before it was ready; its last words above say why.\n"


def test_another_server_on_the_same_port_is_not_taken_for_the_gateway(
    run_example: Any, ended_process_id: int, gateway_url: str
) -> None:
    done = run_example("first_tool_call.py", gateway_url, "--wait-for-process", str(ended_process_id))
    assert done.returncode == 1
    assert "another server answers" in done.stderr
