"""What a grammar forces is cut into tokens as the model's tokenizer does it, wherever it stands in a text."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from gallama.constraints import AnswerSpec, LLGuidanceBackend, admit_constraints
from gallama.conversation import Constraint, ConstraintKind
from gallama.generation import Engine

CITY = {
    "type": "object",
    "properties": {
        "name_of_the_city": {"enum": ["Paris", "London", "Tokyo"]},
        "is_capital": {"type": "boolean"},
        "nick name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "population": {"type": "integer"},
    },
    "required": ["name_of_the_city", "is_capital", "nick name", "tags", "population"],
}
STRINGS = ["", " a b", "O'Hara", "42", "été", 'a "quote"', "Anna Maria", "{}", "東京"]
PLAN = r"<plan>\n  <goal>[a-z ]+</goal>\n  <pace>(slow|quick)</pace>\n</plan>"


def a_city(rng: random.Random) -> str:
    city = {
        "name_of_the_city": rng.choice(CITY["properties"]["name_of_the_city"]["enum"]),  # type: ignore[index]
        "is_capital": rng.random() < 0.5,
        "nick name": rng.choice(STRINGS),
        "tags": rng.choices(STRINGS, k=rng.randrange(4)),
        "population": rng.randrange(10**7),
    }
    return json.dumps(city, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize(
    ("kind", "source", "texts"),
    [
        ("json_schema", CITY, [a_city(random.Random(seed)) for seed in range(30)]),
        ("choice", ["the quick brown fox", "the quick red fox"], ["the quick red fox"]),
        (
            "regex",
            r"Answer: (yes|no)\. Sure: [0-9]+%\.",
            ["Answer: yes. Sure: 45%.", "Answer: no. Sure: 7%."],
        ),
        ("regex", PLAN, ["<plan>\n  <goal>go to rome</goal>\n  <pace>quick</pace>\n</plan>"]),
    ],
    ids=["schema", "choice", "sentence", "block"],
)
def test_forced_runs_are_the_tokenizers_own(
    smollm2: Engine, kind: ConstraintKind, source: Any, texts: list[str]
) -> None:
    body = admit_constraints([Constraint(kind=kind, source=source)], None)
    compiled = LLGuidanceBackend(smollm2.vocabulary).compile(AnswerSpec(body=body))
    for text in texts:
        state, token_ids, place, forced_tokens = (
            compiled.start(),
            smollm2.vocabulary.encode(text.encode()),
            0,
            0,
        )
        while place < len(token_ids):
            forced = state.forced()
            assert forced == token_ids[place : place + len(forced)], text
            run = forced or token_ids[place : place + 1]
            assert state.advance(run) == len(run)
            place += len(run)
            forced_tokens += len(forced)
        assert state.status in ("may_end", "must_end")
        assert forced_tokens > 0
