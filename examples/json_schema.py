"""Answers that are objects of a pydantic model: its types, choices and limits hold by construction.

Needs a running gateway, as `scripts/run` starts one.
"""

import os
from typing import Annotated, Literal

from openai import OpenAI
from pydantic import BaseModel, Field

MODEL = os.environ.get("GALLAMA_MODEL", "smollm2-135m")
URL = os.environ.get("GALLAMA_URL", "http://127.0.0.1:8000/v1")

ShortText = Annotated[str, Field(min_length=1, max_length=30)]


class Language(BaseModel):
    name: ShortText
    level: Literal["beginner", "fluent", "native"]


class Person(BaseModel):
    name: ShortText
    age: Annotated[int, Field(ge=0, le=150)]
    is_student: bool
    languages: Annotated[list[Language], Field(min_length=1, max_length=3)]


TEXT = "Ana Quispe, 34, is a guide in Cusco. She grew up with Quechua and speaks fluent Spanish."

client = OpenAI(base_url=URL, api_key=os.environ.get("OPENAI_API_KEY", "none"))
completion = client.chat.completions.parse(
    model=MODEL,
    messages=[{"role": "user", "content": f"Extract the person as JSON: {TEXT}"}],
    response_format=Person,
)
person = completion.choices[0].message.parsed
assert person is not None, completion

print(f"{person.name}, {person.age}, {'a student' if person.is_student else 'no student'}")
for language in person.languages:
    print(f"  {language.name}: {language.level}")
