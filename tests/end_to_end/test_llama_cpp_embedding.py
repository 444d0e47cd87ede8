"""A GGUF model that embeds, behind a real gateway, beside one that writes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import numpy as np
import pytest
from gguf import PoolingType
from numpy.typing import NDArray
from openai import AsyncOpenAI, BadRequestError, OpenAI

from tests.engines.gguf_of_bert import RandomHead, write_gguf_of_bert

MODEL, RERANKER = "minilm", "ranks"


@pytest.fixture(scope="module")
def url(
    serving_gateway: Callable[..., AbstractContextManager[object]],
    tmp_path_factory: pytest.TempPathFactory,
    minilm_folder: Path,
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("embedding")
    file = write_gguf_of_bert(minilm_folder, folder / "minilm.gguf")
    embedder = f"model_id={file} model_name={MODEL} model_type=embedding"
    ranks = write_gguf_of_bert(
        minilm_folder, folder / "ranks.gguf", pooling=PoolingType.RANK, more_tensors=RandomHead().tensors
    )
    reranker = f"model_id={ranks} model_name={RERANKER} model_type=embedding"
    with serving_gateway(folder, "-id", embedder, "-id", reranker) as gateway:
        yield gateway.url  # type: ignore[attr-defined]
    file.unlink()
    ranks.unlink()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as openai_client:
        yield openai_client


def vectors_of(client: OpenAI, texts: list[str]) -> NDArray[np.float32]:
    """As OpenAI's client asks for them, which is in base64."""
    reply = client.embeddings.create(model=MODEL, input=texts)
    assert [item.index for item in reply.data] == list(range(len(texts)))
    return np.array([item.embedding for item in reply.data], dtype=np.float32)


def test_similar_texts_are_nearer(client: OpenAI) -> None:
    cat, kitten, stocks = vectors_of(
        client, ["A cat sits on the mat.", "The kitten is lying on a rug.", "Shares fell at noon."]
    )
    assert cat.shape == (384,)
    assert cat @ kitten > max(cat @ stocks, kitten @ stocks) + 0.2
    np.testing.assert_allclose([cat @ cat, stocks @ stocks], 1, atol=1e-5)


def test_numbers_are_the_same_as_in_base64(client: OpenAI) -> None:
    reply = client.embeddings.create(model=MODEL, input="Grüße", encoding_format="float")
    np.testing.assert_allclose([reply.data[0].embedding], vectors_of(client, ["Grüße"]), atol=1e-6)
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 2


def test_token_ids_stand_for_their_text(client: OpenAI, url: str) -> None:
    token_ids = httpx.post(
        f"{url}/v1/tokenize", json={"model": MODEL, "prompt": "a nice text"}, trust_env=False
    ).json()["tokens"]
    assert token_ids[0] == 101
    assert token_ids[-1] == 102
    reply = client.embeddings.create(model=MODEL, input=[token_ids], encoding_format="float")
    np.testing.assert_allclose([reply.data[0].embedding], vectors_of(client, ["a nice text"]), atol=1e-5)


def test_a_text_that_is_too_long_is_named(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match=r"input\[1\].* 602 tokens") as raised:
        client.embeddings.create(model=MODEL, input=["short", "word " * 600])
    assert raised.value.code == "context_length_exceeded"
    assert raised.value.param == "input"


def test_a_cross_encoder_ranks_each_document_by_its_own_score(url: str) -> None:
    """Its weights are drawn at random: what counts is that scores stay with their documents."""

    def ranked(documents: list[str]) -> list[tuple[str, float]]:
        body = {"model": RERANKER, "query": "cats", "documents": documents, "return_documents": True}
        answer = httpx.post(f"{url}/v1/rerank", json=body, timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text
        results = answer.json()["results"]
        assert [documents[each["index"]] for each in results] == [
            each["document"]["text"] for each in results
        ]
        return [(each["document"]["text"], each["relevance_score"]) for each in results]

    documents = ["A cat sleeps.", "Shares fell at noon.", "The kitten is lying on a rug."]
    together = ranked(documents)
    scores = [score for _, score in together]
    assert len(set(scores)) == 3
    assert scores == sorted(scores, reverse=True)
    alone = dict(ranked([document])[0] for document in documents)
    assert alone == pytest.approx(dict(together), abs=1e-5)
    assert {0 < score < 1 for score in scores} == {True}


async def test_requests_at_the_same_time_share_forward_passes(url: str) -> None:
    before = _steps(url)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        texts = [f"This is sentence number {number}." for number in range(64)]
        await asyncio.gather(*(client.embeddings.create(model=MODEL, input=text) for text in texts))
    assert 0 < _steps(url) - before < 64


def _steps(url: str) -> float:
    time.sleep(0.6)  # what is told of workers is of the last half second
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("gallama_") and "steps" in line.split("{")[0] and f'model="{MODEL}"' in line
    )


def test_the_model_beside_it_still_writes(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="smollm2-135m", messages=[{"role": "user", "content": "Say hello."}], max_tokens=4
    )
    assert reply.choices[0].message.content
