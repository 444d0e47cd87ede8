"""The README's own snippet, as it stands but for the address."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_snippet_makes_a_valid_call(gateway_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert "http://127.0.0.1:8000" in code
    variables: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:8000", gateway_url), variables)
    call = variables["completion"].choices[0].message.tool_calls[0].function
    assert call.name == "get_current_weather"
    assert "location" in json.loads(call.arguments)
    assert capsys.readouterr().out.strip() == call.arguments
    variables["client"].close()
