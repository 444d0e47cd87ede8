"""POST /v1/rerank, by a real gateway whose worker counts the words that query and document share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gallama.api.rerank import MAX_DOCUMENTS

DOCUMENTS = ["no", "the capital of France", "the river", "capital"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, serving_gateway: Any) -> Iterator[Any]:
    embedding = {"model_type": "embedding", "max_seq_len": 64}
    models = {
        "ranker": embedding | {"script": {"ranks": True}},
        "vectors": embedding,
        "chat": {},
    }
    folder = tmp_path_factory.mktemp("ranking")
    # Each is loaded by the first request for it.
    with serving_gateway(folder, models, load=[], flags=["--strict"]) as started:
        yield started


def post(gateway: Any, body: dict[str, Any], path: str = "/v1/rerank") -> httpx.Response:
    defaults = {"model": "ranker", "query": "the capital", "documents": DOCUMENTS}
    with gateway.client() as client:
        answer: httpx.Response = client.post(path, json=defaults | body)
    return answer


def ranking(answer: httpx.Response) -> list[tuple[int, float]]:
    assert answer.status_code == 200, answer.text
    return [(result["index"], result["relevance_score"]) for result in answer.json()["results"]]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_the_best_document_comes_first_and_of_equals_the_first(shared: Any, path: str) -> None:
    assert ranking(post(shared, {}, path)) == [(1, 1.0), (2, 0.5), (3, 0.5), (0, 0.0)]


def test_an_answer_has_the_shape_that_clients_expect(shared: Any) -> None:
    answer = post(shared, {}).json()
    assert answer.pop("id").startswith("rerank-")
    assert answer.pop("results")[0] == {"index": 1, "relevance_score": 1.0}
    # A byte is a token here; the query counts with each document, and each pair has two special ones.
    tokens = sum(map(len, DOCUMENTS)) + 4 * (len("the capital") + 2)
    assert answer == {
        "object": "list",
        "model": "ranker",
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def test_documents_come_back_where_they_are_asked_for(shared: Any) -> None:
    documents = ["no", {"text": "the capital"}]
    answer = post(shared, {"documents": documents, "return_documents": True})
    assert answer.json()["results"] == [
        {"index": 1, "relevance_score": 1.0, "document": {"text": "the capital"}},
        {"index": 0, "relevance_score": 0.0, "document": {"text": "no"}},
    ]


@pytest.mark.parametrize(("top_n", "count"), [(1, 1), (4, 4), (1000, 4), (None, 4)])
def test_only_the_best_are_told_where_that_is_asked_for(shared: Any, top_n: int | None, count: int) -> None:
    best = ranking(post(shared, {"top_n": top_n}))
    assert best == [(1, 1.0), (2, 0.5), (3, 0.5), (0, 0.0)][:count]


@pytest.mark.parametrize(("model", "words"), [("vectors", "does not rank"), ("chat", "/v1/chat/completions")])
def test_a_model_that_cannot_rank_says_so(shared: Any, model: str, words: str) -> None:
    answer = post(shared, {"model": model})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "model"
    assert words in answer.json()["error"]["message"]


def test_a_model_that_only_ranks_names_its_own_door(shared: Any) -> None:
    with shared.client() as client:
        answer = client.post("/v1/embeddings", json={"model": "ranker", "input": "a"})
    assert answer.status_code == 400
    assert "/v1/rerank" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param", "status"),
    [
        ({"query": ""}, "query", 400),
        ({"query": None}, "query", 400),
        ({"query": ["a"]}, "query", 400),
        ({"query": "x" * 100}, "documents", 400),
        ({"query": "x" * 10_000_000}, "query", 413),
        ({"documents": []}, "documents", 400),
        ({"documents": "a"}, "documents", 400),
        ({"documents": [""]}, "documents[0]", 400),
        ({"documents": ["a", 1]}, "documents[1]", 400),
        ({"documents": ["a", {"text": ""}]}, "documents[1].text", 400),
        ({"documents": ["a", {"text": "b", "title": "c"}]}, "documents[1].title", 400),
        ({"documents": ["a", "x" * 64]}, "documents", 400),
        ({"documents": ["a"] * (MAX_DOCUMENTS + 1)}, "documents", 400),
        ({"top_n": 0}, "top_n", 400),
        ({"top_n": True}, "top_n", 400),
        ({"return_documents": 1}, "return_documents", 400),
        ({"model": "nobody"}, "model", 404),
        ({"max_chunks_per_doc": 3}, "max_chunks_per_doc", 400),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_value_is_named(shared: Any, fields: dict[str, Any], param: str, status: int) -> None:
    answer = post(shared, fields)
    assert answer.status_code == status, answer.text[:500]
    assert answer.json()["error"]["param"] == param
    assert len(answer.content) < 2000
