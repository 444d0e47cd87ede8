"""The README's own snippets, as they stand but for the address, one after the other."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest

README = Path(__file__).parents[2] / "README.md"
CALL, THINKING, VECTORS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def variables(gateway_url: str) -> Iterator[dict[str, Any]]:
    """What the first snippet leaves, for the others."""
    assert "http://127.0.0.1:8000" in CALL
    variables: dict[str, Any] = {}
    exec(CALL.replace("http://127.0.0.1:8000", gateway_url), variables)
    yield variables
    variables["client"].close()


def test_the_call_is_valid(variables: dict[str, Any]) -> None:
    call = variables["completion"].choices[0].message.tool_calls[0].function
    assert call.name == "get_current_weather"
    assert "location" in json.loads(call.arguments)


def test_the_thinking_has_the_templates_shape(
    variables: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    exec(THINKING, variables)
    message = variables["completion"].choices[0].message
    plan = ElementTree.fromstring(message.reasoning_content)
    assert [child.tag for child in plan] == ["goal", "steps", "confidence"]
    assert plan.findtext("confidence") in ("low", "medium", "high")
    assert message.content.strip()
    assert capsys.readouterr().out == f"{message.reasoning_content}\n{message.content}\n"


@pytest.fixture
def embedder(gateway_url: str) -> Iterator[None]:
    """A small model under the name that the README's has."""
    name = "gte-large-en-v1.5"
    spec = {"model_id": "smollm2-135m", "model_name": name, "model_type": "embedding"}
    task_id = httpx.post(f"{gateway_url}/add_model", json=spec).json()["task_id"]
    deadline = time.monotonic() + 60
    while httpx.get(f"{gateway_url}/task_status/{task_id}").json()["status"] != "completed":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield
    httpx.post(f"{gateway_url}/remove_model", json={"model_name": name}, timeout=60).raise_for_status()


@pytest.mark.usefixtures("embedder")
def test_the_same_url_embeds_and_completes(variables: dict[str, Any]) -> None:
    exec(VECTORS, variables)
    vector = variables["response"].data[0].embedding
    assert sum(component * component for component in vector) == pytest.approx(1, abs=1e-5)
    date = variables["completion"].choices[0].text
    assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", date)
