"""Answers of a given form: a pattern for the whole answer, one for its beginning, or a list to choose from.

The fields are gallama's own, so the client passes them in `extra_body`.
Needs a running gateway, as `scripts/run` starts one.
"""

import os
import re

from openai import OpenAI

MODEL = os.environ.get("GALLAMA_MODEL", "smollm2-135m")
URL = os.environ.get("GALLAMA_URL", "http://127.0.0.1:8000/v1")

DATE = r"(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
VERDICT = r"(Yes|No)\. "
MOODS = ["happy", "sad", "angry"]

client = OpenAI(base_url=URL, api_key=os.environ.get("OPENAI_API_KEY", "none"))


def ask(question: str, constraint: dict[str, object]) -> str:
    completion = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=60,
        extra_body=constraint,
    )
    answer = completion.choices[0].message.content
    assert answer is not None
    print(f"{question}\n  {answer}")
    return answer


date = ask("On which day did people first walk on the Moon?", {"regex_pattern": DATE})
assert re.fullmatch(DATE, date)

opinion = ask("Is smoking bad for health?", {"regex_prefix_pattern": VERDICT})
assert re.match(VERDICT, opinion)

mood = ask("I won the race! How do I feel?", {"choice": MOODS})
assert mood in MOODS
