"""Completions: the model goes on with a text as it stands, freely and by a pattern.

Needs a running gateway, as `scripts/run` starts one.
"""

import os
import re

from openai import OpenAI

MODEL = os.environ.get("GALLAMA_MODEL", "smollm2-135m")
URL = os.environ.get("GALLAMA_URL", "http://127.0.0.1:8000/v1")
PRICE = r"\d{1,3}\.\d\d"

client = OpenAI(base_url=URL, api_key=os.environ.get("OPENAI_API_KEY", "none"))

story = client.completions.create(
    model=MODEL, prompt="Once upon a time there was a Llama that", max_tokens=40, temperature=0
)
print(f"Story: Once upon a time there was a Llama that{story.choices[0].text}")

menu = client.completions.create(
    model=MODEL,
    prompt=["Soup of the day, in dollars: ", "Grilled fish with rice, in dollars: "],
    max_tokens=10,
    extra_body={"regex_pattern": PRICE},
)
for choice in menu.choices:
    print(f"Price: {choice.text}")
    assert re.fullmatch(PRICE, choice.text)
