"""Search by meaning: which of some sentences says most nearly what a question asks.

Needs a gateway with a model that embeds:

    gallama serve -id "model_id=/models/all-MiniLM-L6-v2 model_type=embedding model_name=minilm"
"""

import os

from openai import OpenAI

MODEL = os.environ.get("GALLAMA_EMBEDDING_MODEL", "minilm")
URL = os.environ.get("GALLAMA_URL", "http://127.0.0.1:8000/v1")

QUESTION = "How do I get my money back?"
SENTENCES = [
    "Our shop is open from nine to five.",
    "Refunds are paid within two weeks.",
    "The llama is a domesticated animal of South America.",
]

client = OpenAI(base_url=URL, api_key=os.environ.get("OPENAI_API_KEY", "none"))
response = client.embeddings.create(model=MODEL, input=[QUESTION, *SENTENCES])
question, *sentences = [entry.embedding for entry in response.data]


def similarity(one: list[float], other: list[float]) -> float:
    """The cosine of the angle between two vectors of length 1: from -1 to 1, the larger the more alike."""
    return sum(a * b for a, b in zip(one, other, strict=True))


ranking = sorted(
    zip(SENTENCES, (similarity(question, vector) for vector in sentences), strict=True),
    key=lambda ranked: -ranked[1],
)
print(f"{QUESTION} ({len(question)} dimensions, {response.usage.prompt_tokens} tokens)")
for sentence, score in ranking:
    print(f"  {score:5.2f}  {sentence}")
