"""Embeddings by infinity-emb, with a real model in an environment of its own, beside a model that chats."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import requests
from numpy.typing import NDArray
from openai import APIError, AsyncOpenAI, BadRequestError, OpenAI

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
CHAT_MODEL = "smollm2-135m"
ADDED_MODEL = "added"
SECONDS = 60

SENTENCES = [
    "A cat is sleeping on the sofa.",
    "The kitten naps on the couch.",
    "Shares fell sharply on Monday.",
    "Stock markets went down at the start of the week.",
    "  Ein Käfer krabbelt über 甲虫.  ",
    "word " * 200,
]
# What the model's own library makes of them.
REFERENCE = """
import json, sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
print(json.dumps(model.encode(json.loads(sys.argv[2]), normalize_embeddings=True).tolist()))
"""

Vectors = NDArray[np.float32]


@pytest.fixture(scope="module")
def expected(embedding_python: str, minilm_folder: Path) -> Vectors:
    done = subprocess.run(
        [embedding_python, "-c", REFERENCE, str(minilm_folder), json.dumps(SENTENCES)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    return np.array(json.loads(done.stdout), dtype=np.float32)


@pytest.fixture(scope="module")
def gateway(
    embedding_python: str, minilm_folder: Path, serving_gateway: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    model = f"model_id={minilm_folder} model_name={MODEL} model_type=embedding python={embedding_python}"
    with serving_gateway(tmp_path_factory.mktemp("embedding"), "-id", model) as started:
        yield started


@pytest.fixture(scope="module")
def client(gateway: Any) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=SECONDS) as client:
        yield client


@contextlib.asynccontextmanager
async def async_client(gateway: Any) -> Any:
    url = f"{gateway.url}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=SECONDS) as client:
        yield client


def embed(client: OpenAI, given: Any, **options: Any) -> Vectors:
    answer = client.embeddings.create(model=MODEL, input=given, **options)
    assert [part.index for part in answer.data] == list(range(len(answer.data)))
    return np.array([part.embedding for part in answer.data], dtype=np.float32)


def post(gateway: Any, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{gateway.url}{path}", json={"model": MODEL, **body}, timeout=SECONDS, trust_env=False)


def added(gateway: Any, spec: dict[str, Any]) -> Any:
    """What has become of a model that was to be loaded."""
    task = httpx.post(f"{gateway.url}/add_model", json=spec, timeout=SECONDS, trust_env=False).json()
    deadline = time.monotonic() + SECONDS
    while task["status"] in ("queued", "loading"):
        assert time.monotonic() < deadline, task
        time.sleep(0.05)
        url = f"{gateway.url}/task_status/{task['task_id']}"
        task = httpx.get(url, trust_env=False).json()
    return task


def requests_of(gateway: Any) -> dict[str, int]:
    model = httpx.get(f"{gateway.url}/ready", trust_env=False).json()["models"][MODEL]
    return {state: model[state] for state in ("busy", "waiting")}


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_answered(client: OpenAI) -> bool:
    try:
        embed(client, "a")
    except APIError:
        return False
    return True


def worker_of(gateway: Any, python: str) -> int:
    """The process that embeds: it has a Python of its own."""
    (process_id,) = (
        each for each in gateway.worker_process_ids() if psutil.Process(each).cmdline()[0] == python
    )
    return int(process_id)


def test_vectors_are_those_of_the_models_own_library(client: OpenAI, expected: Vectors) -> None:
    vectors = embed(client, SENTENCES)
    assert vectors.shape == (len(SENTENCES), 384)
    assert np.abs(vectors - expected).max() < 1e-4
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


async def test_every_client_gets_the_same_vector(gateway: Any, client: OpenAI, expected: Vectors) -> None:
    text = SENTENCES[0]
    async with async_client(gateway) as other:
        answer = await other.embeddings.create(model=MODEL, input=text, encoding_format="float")
    assert (
        answer.data[0].embedding == post(gateway, "/v1/embeddings", input=text).json()["data"][0]["embedding"]
    )
    assert np.abs(np.array(answer.data[0].embedding) - embed(client, text)[0]).max() < 1e-7
    assert np.abs(embed(client, text)[0] - expected[0]).max() < 1e-4


def test_the_example_of_the_first_readme(client: OpenAI) -> None:
    response = client.embeddings.create(
        input="Your text string for embedding goes here", model="Alibaba-NLP/gte-large-en-v1.5"
    )
    assert len(response.data[0].embedding) == 384
    assert response.model == MODEL, "the only model that embeds answers, and says so"


def test_the_example_of_the_older_readme(gateway: Any) -> None:
    url = f"{gateway.url}/v1/embeddings"
    payload = {
        "model": "intfloat/e5-large-v2",  # You can also use `universal-sentence-encoder/4`
        "input": "hello world!",
    }
    response = requests.post(url, json=payload)
    answer = response.json()
    assert answer.keys() == {"object", "model", "data", "usage"}
    (part,) = answer["data"]
    assert (answer["object"], part["object"], part["index"]) == ("list", "embedding", 0)
    assert len(part["embedding"]) == 384
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 5


def test_similar_sentences_are_nearer_than_different_ones(client: OpenAI) -> None:
    nearness = (vectors := embed(client, SENTENCES[:4])) @ vectors.T
    alike = [nearness[0, 1], nearness[2, 3]]
    different = [nearness[i, j] for i in (0, 1) for j in (2, 3)]
    assert min(alike) > max(different) + 0.2


def test_floats_and_base64_are_the_same_numbers(gateway: Any) -> None:
    as_floats = post(gateway, "/v1/embeddings", input=SENTENCES[0]).json()["data"][0]["embedding"]
    answer = post(gateway, "/v1/embeddings", input=SENTENCES[0], encoding_format="base64").json()
    raw = base64.b64decode(answer["data"][0]["embedding"], validate=True)
    assert as_floats == pytest.approx(list(struct.unpack("<384f", raw)), abs=1e-6)


def test_token_ids_give_the_vector_of_their_text(gateway: Any, client: OpenAI) -> None:
    tokens = post(gateway, "/v1/tokenize", prompt=SENTENCES[0]).json()["tokens"]
    assert np.allclose(embed(client, tokens), embed(client, SENTENCES[0]), rtol=0, atol=1e-6)
    assert np.abs(embed(client, [tokens, tokens]) - embed(client, SENTENCES[0])).max() < 1e-5


def test_usage_counts_special_tokens(gateway: Any, client: OpenAI) -> None:
    count = post(gateway, "/v1/tokenize", prompt=SENTENCES[0]).json()["count"]
    usage = client.embeddings.create(model=MODEL, input=[SENTENCES[0]] * 3).usage
    assert (usage.prompt_tokens, usage.total_tokens) == (3 * count, 3 * count)


async def test_64_requests_at_the_same_time_take_fewer_forward_passes(gateway: Any) -> None:
    passes = gateway.engine_steps(MODEL)
    async with async_client(gateway) as client:
        asked = (client.embeddings.create(model=MODEL, input=f"This is sentence {i}.") for i in range(64))
        answers = await asyncio.gather(*asked)
    assert 0 < gateway.engine_steps(MODEL) - passes < 64
    vectors = np.array([answer.data[0].embedding for answer in answers])
    assert len(np.unique(vectors.round(4), axis=0)) == 64, "each has its own answer"


def test_a_text_that_is_too_long_is_refused_by_its_place(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        embed(client, ["short", "word " * 300])
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "input"
    assert "`input[1]` has 302 tokens; the model takes 256." in caught.value.message


def test_other_dimensions_than_the_models_are_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        embed(client, "a", dimensions=128)
    assert caught.value.param == "dimensions"
    assert embed(client, "a", dimensions=384).shape == (1, 384)


def test_a_model_that_embeds_does_not_rank(gateway: Any) -> None:
    answer = post(gateway, "/v1/rerank", query="a", documents=["b"])
    assert answer.status_code == 400
    assert "does not rank" in answer.json()["error"]["message"]


def test_a_model_that_chats_answers_under_the_same_url(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(model=CHAT_MODEL, messages=messages, max_tokens=4)
    assert answer.choices[0].message.content
    with pytest.raises(BadRequestError, match="/v1/embeddings"):
        client.chat.completions.create(model=MODEL, messages=messages)
    with pytest.raises(BadRequestError, match="/v1/chat/completions"):
        client.embeddings.create(model=CHAT_MODEL, input="a")


def test_a_model_is_added_as_soon_as_its_environment_is_there(
    gateway: Any, client: OpenAI, embedding_python: str, minilm_folder: Path
) -> None:
    spec = {"model_id": str(minilm_folder), "model_name": ADDED_MODEL, "backend": "embedding"}
    task = added(gateway, spec)
    assert task["status"] == "failed"
    assert "`gallama setup embedding`" in str(task)

    environments = gateway.log_file.parent / "environments"
    environments.mkdir()
    (environments / "embedding").symlink_to(Path(embedding_python).parents[1])
    task = added(gateway, spec)
    assert task["status"] == "completed", task
    answer = client.embeddings.create(model=ADDED_MODEL, input=SENTENCES[0])
    assert np.allclose([answer.data[0].embedding], embed(client, SENTENCES[0]), rtol=0, atol=1e-6)
    removed = httpx.post(
        f"{gateway.url}/remove_model", json={"model_name": ADDED_MODEL}, timeout=SECONDS, trust_env=False
    )
    assert removed.status_code == 200, removed.text


async def test_requests_whose_clients_leave_are_given_up(gateway: Any, client: OpenAI) -> None:
    passes = gateway.engine_steps(MODEL)
    async with async_client(gateway) as leaving:
        many = ["word " * 200] * 200
        asked = [asyncio.create_task(leaving.embeddings.create(model=MODEL, input=many)) for _ in range(8)]
        await asyncio.to_thread(wait_until, lambda: requests_of(gateway)["busy"] == 8)
        for request in asked:
            request.cancel()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    await asyncio.to_thread(embed, client, "short")
    assert gateway.engine_steps(MODEL) - passes < 25, "all of them would take 50 or more"
    wait_until(lambda: requests_of(gateway) == {"busy": 0, "waiting": 0})


def test_a_worker_that_is_killed_is_followed_by_another(
    gateway: Any, client: OpenAI, embedding_python: str
) -> None:
    before = embed(client, SENTENCES[0])
    killed = worker_of(gateway, embedding_python)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: is_answered(client))
    after = embed(client, SENTENCES[0])
    assert np.allclose(before, after, rtol=0, atol=1e-6)
    assert worker_of(gateway, embedding_python) != killed
