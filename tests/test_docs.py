"""The documents say what is true: what they name exists, and what they show runs."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from pydantic import BaseModel

from gallama.config.server_config import ServerSettings
from gallama.constraints import (
    admission,
    client_grammars,
    llguidance,
    regexes,
    schema_size,
    thinking_template,
)
from gallama.conversation import Guarantee
from gallama.engines.exllamav2.options import ExLlamaV2Options
from gallama.engines.exllamav3.options import ExLlamaV3Options
from gallama.engines.llama_cpp.options import LlamaCppOptions
from gallama.pool.launchers.local import STOP_SECONDS
from gallama.pool.pool import MAX_TRIES
from gallama.pool.supervisor import Backoff, CrashCounter
from gallama.pool.views import InstanceState

ROOT = Path(__file__).parents[1]
LIFE = (ROOT / "docs/life_of_a_request.md").read_text()
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(gallama(?:\.\w+)+)`", LIFE))))
def test_everything_named_in_the_life_of_a_request_exists(name: str) -> None:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return
    pytest.fail(f"there is no module {name}")


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:gallama|examples|scripts|docs)/[\w/.]*)`", README)))
)
def test_every_path_in_the_readme_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", README))))
def test_every_link_in_the_readme_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_the_readmes_code_is_python() -> None:
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(code, "README.md", "exec")


def test_every_decision_is_numbered_once() -> None:
    numbers = [path.name[:4] for path in sorted((ROOT / "docs/decisions").glob("*.md"))]
    assert numbers == [f"{number:04d}" for number in range(1, len(numbers) + 1)]


def test_no_document_names_a_place_of_one_machine() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    places = re.compile(r"/(?:work|root)/[a-z]|pypi\.org")
    texts = {path: (ROOT / path).read_text(errors="replace") for path in tracked if (ROOT / path).is_file()}
    own = {Path(__file__).relative_to(ROOT).as_posix()}
    assert [path for path, text in texts.items() if path not in own and places.search(text)] == []


def test_the_guarantees_document_names_the_limits_that_hold() -> None:
    document = (ROOT / "docs/guarantees.md").read_text()
    assert f"{schema_size.MAX_SCHEMA_BYTES // 1024} KiB, {schema_size.MAX_SCHEMA_DEPTH} levels" in document
    assert f"{schema_size.MAX_SUBSCHEMAS:,} subschemas, {schema_size.MAX_PATTERN_PROPERTIES}" in document
    assert f"| {schema_size.MAX_TEXT_CONDITIONS} at once |" in document
    assert (
        f"{client_grammars.MAX_GRAMMAR_BYTES:,} bytes, {client_grammars.MAX_GRAMMAR_RULES} rules" in document
    )
    assert f"{client_grammars.MAX_GRAMMAR_NESTING} groups" in document
    assert f"{thinking_template.MAX_NODES} elements and comments" in document
    assert f"{thinking_template.MAX_REPETITIONS} repetitions" in document
    assert f"{regexes.MAX_PATTERN_CHARACTERS:,} characters" in document
    assert f"{admission.MAX_OPTIONS:,}, with {admission.MAX_OPTIONS_CHARACTERS:,} characters" in document
    assert f"| tools | {admission.MAX_TOOLS} |" in document


def test_the_guarantees_document_names_every_field_and_every_unenforceable_keyword() -> None:
    document = (ROOT / "docs/guarantees.md").read_text()
    fields = [field.name for field in msgspec.structs.fields(Guarantee)]
    missing = [name for name in (*fields, *llguidance.UNENFORCEABLE) if f"`{name}`" not in document]
    assert missing == []


def test_the_settings_of_llama_cpp_are_explained_with_their_defaults() -> None:
    document = (ROOT / "docs/llama_cpp_settings.md").read_text()
    rows = dict(re.findall(r"^\| (`.+?`) \| (.+?) \|", document, re.MULTILINE))
    explained = {key: default for keys, default in rows.items() for key in re.findall(r"`(\w+)`", keys)}
    assert explained.keys() == LlamaCppOptions.model_fields.keys()
    for key, field in LlamaCppOptions.model_fields.items():
        if isinstance(field.default, int):  # else the model or the machine decides
            assert explained[key] == str(field.default).lower(), key


@pytest.mark.parametrize(
    ("document", "options"), [("exllamav2", ExLlamaV2Options), ("exllamav3", ExLlamaV3Options)]
)
def test_the_settings_of_exllama_are_explained_with_their_defaults(
    document: str, options: type[BaseModel]
) -> None:
    text = (ROOT / f"docs/{document}.md").read_text()
    explained = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE))
    assert options.model_fields.keys() <= explained.keys()
    for key, field in options.model_fields.items():
        if isinstance(field.default, int):  # else the model or the machine decides
            assert explained[key].split(",")[0] == str(field.default).lower(), key


def test_the_supervision_document_names_every_state_and_the_times_that_hold() -> None:
    document = (ROOT / "docs/supervision.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", document, re.MULTILINE) == list(get_args(InstanceState))
    for key in ("probe_interval_seconds", "hang_seconds", "drain_seconds"):
        assert f"`{key}` ({ServerSettings.model_fields[key].default})" in document
    words = " ".join(document.split())
    assert f"before the first restart | {Backoff.FIRST_SECONDS:g} |" in words
    assert f"twice as long, up to {Backoff.LONGEST_SECONDS:g} |" in words
    assert f"the delay begins anew | {Backoff.STABLE_SECONDS:g} |" in words
    assert CrashCounter.MOST_SHORT_RUNS == 5
    assert f"Five runs in a row of less than {CrashCounter.SHORT_RUN_SECONDS:g} seconds" in words
    assert f"left alone for {CrashCounter.PAUSE_SECONDS:g} seconds" in words
    assert f"may end by itself for {STOP_SECONDS:g} seconds" in words
    assert MAX_TRIES == 3
    assert "At most three workers are asked" in words
