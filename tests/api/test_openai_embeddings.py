"""POST /v1/embeddings, by real gateways whose workers make vectors of a text's hash."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import random
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import CreateEmbeddingResponse

from gallama.api import server_sent_events
from gallama.api.openai_embeddings import MAX_INPUTS, EmbeddingsBody, PiecewiseResponse, to_json
from gallama.api.request_bodies import MAX_TOKENS
from gallama.api.rerank import MAX_DOCUMENTS, RerankBody
from gallama.embedding import Embeddings

MODEL = "intfloat/e5-large-v2"
DIMENSIONS = 96
SECONDS = 5.0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, serving_gateway: Any) -> Iterator[Any]:
    """Of its embedding models two are loaded when a test asks for them."""
    embedding = {"model_type": "embedding", "max_seq_len": 64}
    models = {
        MODEL: embedding
        | {"script": {"dimensions": DIMENSIONS, "shorter_dimensions": "any", "seconds_per_pass": 0.002}},
        "fixed": embedding | {"script": {"shorter_dimensions": [2, 4]}},
        "stuck": embedding | {"script": {"hang_after_texts": 0}},
        "chat": {},
    }
    with serving_gateway(
        tmp_path_factory.mktemp("embedding"), models, load=[MODEL, "chat"], flags=["--strict"]
    ) as started:
        deadline = time.monotonic() + 30
        with started.client() as client:
            while client.get("/ready").status_code != 200:
                assert time.monotonic() < deadline, started.log()
                time.sleep(0.05)
        yield started


def post(gateway: Any, body: dict[str, Any], **options: Any) -> httpx.Response:
    with gateway.client() as client:
        answer: httpx.Response = client.post("/v1/embeddings", json={"model": MODEL, **body}, **options)
    return answer


def vectors_of(gateway: Any, given: object, **fields: Any) -> list[list[float]]:
    answer = post(gateway, {"input": given, **fields})
    assert answer.status_code == 200, answer.text
    return [part["embedding"] for part in answer.json()["data"]]


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text[:500]
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert len(answer.content) < 2000
    return error


def length(vector: list[float]) -> float:
    return math.sqrt(sum(number * number for number in vector))


def unpacked(text: str) -> list[float]:
    raw = base64.b64decode(text, validate=True)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


class TestAnswers:
    def test_openais_client_gets_vectors_in_the_form_that_it_asks_for(self, shared: Any) -> None:
        with OpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0) as client:
            asked_as_base64 = client.embeddings.create(model=MODEL, input=["one", "two"])
            as_numbers = client.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float")
        assert [part.index for part in as_numbers.data] == [0, 1]
        assert [len(part.embedding) for part in as_numbers.data] == [DIMENSIONS, DIMENSIONS]
        assert [part.embedding for part in asked_as_base64.data] == [
            part.embedding for part in as_numbers.data
        ]

    async def test_openais_async_client_is_answered(self, shared: Any) -> None:
        async with AsyncOpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0) as client:
            answer = await client.embeddings.create(model=MODEL, input="one", dimensions=DIMENSIONS)
        assert answer.model == MODEL
        assert length(answer.data[0].embedding) == pytest.approx(1, abs=1e-5)

    def test_an_answer_has_openais_shape_and_nothing_else(self, shared: Any) -> None:
        answer = post(shared, {"input": ["one", "two"]})
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"]
        read = CreateEmbeddingResponse.model_validate_json(answer.content, strict=True)
        assert read.model_dump() == answer.json()

    def test_vectors_stand_in_the_order_of_their_inputs(self, shared: Any) -> None:
        texts = [f"text {number}" for number in range(10)]
        one_by_one = [vectors_of(shared, text)[0] for text in texts]
        assert vectors_of(shared, texts) == one_by_one
        assert vectors_of(shared, texts[::-1]) == one_by_one[::-1]

    def test_a_text_and_its_tokens_are_the_same_in_each_form(self, shared: Any) -> None:
        with shared.client() as client:
            tokens = client.post("/v1/tokenize", json={"model": MODEL, "prompt": "hi"}).json()["tokens"]
        expected = vectors_of(shared, "hi")
        for given in (["hi"], tokens, [tokens]):
            assert vectors_of(shared, given) == expected
        assert vectors_of(shared, [[104], tokens])[1:] == expected

    def test_usage_counts_the_tokens_of_all_inputs(self, shared: Any) -> None:
        # A byte is a token here, and each text has two special ones.
        assert post(shared, {"input": ["abc", "ab"]}).json()["usage"] == {
            "prompt_tokens": 9,
            "total_tokens": 9,
        }

    @pytest.mark.parametrize("encoding_format", ["float", "base64"])
    def test_many_vectors_are_written_as_few_are(self, shared: Any, encoding_format: str) -> None:
        texts = [f"text {number}" for number in range(1000)]
        found: list[Any] = vectors_of(shared, texts, encoding_format=encoding_format)
        if encoding_format == "base64":
            found = [unpacked(text) for text in found]
        assert len(found) == 1000
        assert found[::250] == vectors_of(shared, texts[::250])

    def test_null_means_absent(self, shared: Any) -> None:
        fields = {"encoding_format": None, "dimensions": None, "user": None}
        assert vectors_of(shared, "one", **fields) == vectors_of(shared, "one", user="somebody")

    def test_sixty_four_requests_at_once_share_forward_passes(self, shared: Any) -> None:
        before = passes(shared)
        with ThreadPoolExecutor(64) as threads:
            found = list(threads.map(lambda number: vectors_of(shared, f"text {number}"), range(64)))
        assert len({tuple(vectors[0]) for vectors in found}) == 64
        time.sleep(0.6)  # what is told of workers is of the last half second
        assert 0 < passes(shared) - before < 64

    def test_requests_are_counted(self, shared: Any) -> None:
        before = figure(shared, "gallama_prompt_tokens_total", model=MODEL)
        vectors_of(shared, "abcd")
        assert figure(shared, "gallama_prompt_tokens_total", model=MODEL) == before + 6


def figure(gateway: Any, name: str, **labels: str) -> float:
    """The sum of a figure over its other labels."""
    with gateway.client() as client:
        lines = client.get("/metrics").text.splitlines()
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith(f"{name}{{") and all(part in line for part in wanted)
    )


def passes(gateway: Any) -> float:
    return figure(gateway, "gallama_engine_steps_total", model=MODEL)


class TestDimensions:
    def test_vectors_are_cut_and_made_as_long_as_1_again(self, shared: Any) -> None:
        (whole,) = vectors_of(shared, "one")
        (cut,) = vectors_of(shared, "one", dimensions=10)
        assert cut == pytest.approx([number / length(whole[:10]) for number in whole[:10]], abs=1e-6)

    def test_only_what_the_model_allows_is_taken(self, shared: Any) -> None:
        assert [len(vectors_of(shared, "a", model="fixed", dimensions=n)[0]) for n in (2, 4, 8)] == [2, 4, 8]
        for model, dimensions in (("fixed", 3), ("fixed", 9), (MODEL, DIMENSIONS + 1)):
            error = refused(post(shared, {"model": model, "input": "a", "dimensions": dimensions}))
            assert error["param"] == "dimensions"


class TestModels:
    def test_a_model_that_makes_text_names_its_own_door(self, shared: Any) -> None:
        error = refused(post(shared, {"model": "chat", "input": "a"}))
        assert error["param"] == "model"
        assert "/v1/chat/completions" in error["message"]

    def test_a_model_that_embeds_names_its_own_door(self, shared: Any) -> None:
        error = refused(shared.post({"model": MODEL, "messages": [{"role": "user", "content": "a"}]}))
        assert error["param"] == "model"
        assert "/v1/embeddings" in error["message"]

    def test_an_unknown_name_is_a_404(self, shared: Any) -> None:
        error = refused(post(shared, {"model": "gpt-4", "input": "a"}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")

    def test_the_only_model_of_the_kind_answers_to_any_name(self, start_gateway: Any) -> None:
        gateway = start_gateway({"chat": {}, "e5": {"model_type": "embedding"}})
        answer = post(gateway, {"model": "text-embedding-3-small", "input": "a"})
        assert (answer.status_code, answer.json()["model"]) == (200, "e5")

    def test_a_key_for_other_models_opens_none_of_these(self, start_gateway: Any, tmp_path: Any) -> None:
        keys = [{"name": "guest", "key": "sk-guest-0123456789abcdef", "models": ["chat"]}]
        file = tmp_path / "keys.yaml"
        file.write_text(json.dumps(keys))
        file.chmod(0o600)
        gateway = start_gateway(
            {"chat": {}, "e5": {"model_type": "embedding"}},
            load=[],
            wait=False,
            server={"keys_file": str(file)},
        )
        headers = {"authorization": "Bearer sk-guest-0123456789abcdef"}
        for path, body in (
            ("/v1/embeddings", {"input": "a"}),
            ("/v1/rerank", {"query": "a", "documents": ["a"]}),
            ("/v1/tokenize", {"prompt": "a"}),
            ("/v1/detokenize", {"tokens": [1]}),
        ):
            with gateway.client() as client:
                answer = client.post(path, json={"model": "e5", **body}, headers=headers)
            assert refused(answer, 403)["param"] == "model", path


class TestRefusals:
    @pytest.fixture(autouse=True)
    def the_next_request_works_and_nothing_broke(self, shared: Any) -> Iterator[None]:
        began = time.monotonic()
        yield
        assert time.monotonic() - began < SECONDS
        assert len(vectors_of(shared, "next")) == 1
        assert "Exception in ASGI application" not in shared.log()

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({}, "input"),
            ({"input": None}, "input"),
            ({"input": ""}, "input"),
            ({"input": []}, "input"),
            ({"input": 7}, "input"),
            ({"input": {"text": "a"}}, "input"),
            ({"input": [""]}, "input[0]"),
            ({"input": ["a", ""]}, "input[1]"),
            ({"input": ["a", 1]}, "input[1]"),
            ({"input": ["a", None]}, "input[1]"),
            ({"input": ["a", ["b"]]}, "input[1]"),
            ({"input": [None]}, "input[0]"),
            ({"input": [1, "a"]}, "input[1]"),
            ({"input": [True]}, "input[0]"),
            ({"input": [1, False]}, "input[1]"),
            ({"input": [1, 1.0]}, "input[1]"),
            ({"input": [1, -1]}, "input[1]"),
            ({"input": [2**31]}, "input[0]"),
            ({"input": [[]]}, "input[0]"),
            ({"input": [[1], []]}, "input[1]"),
            ({"input": [[1], 1]}, "input[1]"),
            ({"input": [[1], [1, True]]}, "input[1][1]"),
            ({"input": [[[1]]]}, "input[0][0]"),
            ({"input": [300]}, "input"),
            ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
            ({"input": [[1]] * (MAX_INPUTS + 1)}, "input"),
            ({"input": [1] * (MAX_TOKENS + 1)}, "input"),
            ({"input": [1] * 65}, "input"),
            ({"input": "x" * 63}, "input"),
            ({"input": ["a", "x" * 10_000_000]}, "input"),
            ({"input": "a", "model": ""}, "model"),
            ({"input": "a", "model": 7}, "model"),
            ({"input": "a", "model": None}, "model"),
            ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
            ({"input": "a", "dimensions": 0}, "dimensions"),
            ({"input": "a", "dimensions": -1}, "dimensions"),
            ({"input": "a", "dimensions": True}, "dimensions"),
            ({"input": "a", "dimensions": 1.5}, "dimensions"),
            ({"input": "a", "dimensions": 2**40}, "dimensions"),
            ({"input": "a", "user": 1}, "user"),
            ({"input": "a", "truncate": True}, "truncate"),
            ({"input": "a", "texts": None}, "texts"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_a_wrong_value_is_named(self, shared: Any, fields: dict[str, Any], param: str) -> None:
        assert refused(post(shared, fields))["param"] == param

    def test_a_text_that_is_too_long_is_not_cut(self, shared: Any) -> None:
        error = refused(post(shared, {"input": "x" * 63}))
        assert error["code"] == "context_length_exceeded"
        assert "65 tokens" in error["message"]
        assert "64" in error["message"]

    @pytest.mark.parametrize(
        "raw",
        [
            b'{"model": "x", "input": ' + b"[" * 100_000,
            b'{"model": "x", "input": ' + b"[" * 200 + b"]" * 200 + b"}",
            b'{"model": "x", "input": [NaN]}',
            b'{"model": "x", "input": [1e400]}',
            b'{"model": "x", "input": [18446744073709551616]}',
            b'{"model": "x", "input": "\\ud800"}',
            b'{"model": "x", "input": "a", "input": "b"}',
            b'{"model": "x", "input": "\xff"}',
        ],
        ids=lambda raw: ascii(raw[:40]),
    )
    def test_what_is_not_strict_json_is_refused(self, shared: Any, raw: bytes) -> None:
        with shared.client() as client:
            headers = {"content-type": "application/json"}
            refused(client.post("/v1/embeddings", content=raw, headers=headers))

    def test_a_million_wrong_parts_cost_no_more_than_one(self, shared: Any) -> None:
        raw = json.dumps({"model": MODEL, "input": ["a", *[1] * 2_000_000]}).encode()
        with shared.client() as client:
            headers = {"content-type": "application/json"}
            answer = client.post("/v1/embeddings", content=raw, headers=headers)
        assert refused(answer)["param"] == "input[1]"


class TestLeaving:
    @pytest.fixture
    def stuck(self, shared: Any) -> Any:
        """Once its model is loaded, and is asked for nothing."""
        with shared.client() as client:
            client.post("/v1/tokenize", json={"model": "stuck", "prompt": "a"}).raise_for_status()
        shared.wait_for("stuck", busy=0, waiting=0)
        return shared

    def test_a_client_that_leaves_frees_its_slot(self, stuck: Any) -> None:
        with asking(stuck, {"model": "stuck", "input": "a"}):
            stuck.wait_for("stuck", busy=1)
        stuck.wait_for("stuck", busy=0)

    def test_a_deadline_is_held(self, stuck: Any) -> None:
        body = {"model": "stuck", "input": "a"}
        error = refused(post(stuck, body, headers={"x-request-timeout-seconds": "0.2"}), 504)
        assert error["code"] == "deadline_exceeded"
        stuck.wait_for("stuck", busy=0)


@contextlib.contextmanager
def asking(gateway: Any, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request under way, on a connection that is closed in the end."""
    place = urlsplit(gateway.url)
    raw = json.dumps(body).encode()
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: {place.hostname}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        connection.sendall(head.encode() + raw)
        yield connection


class TestWriting:
    def test_both_forms_say_each_float_exactly(self) -> None:
        rng = random.Random(0)
        rows = [
            struct.pack("<24f", *(rng.uniform(-1, 1) * 10 ** rng.randint(-30, 5) for _ in range(24)))
            for _ in range(20)
        ]
        embeddings = Embeddings(vectors=tuple(rows), prompt_tokens=7)
        numbers = json.loads(b"".join(to_json(embeddings, 'a"b', "float")))
        texts = json.loads(b"".join(to_json(embeddings, 'a"b', "base64")))
        assert numbers["model"] == texts["model"] == 'a"b'
        for row, as_numbers, as_text in zip(rows, numbers["data"], texts["data"], strict=True):
            assert as_numbers["embedding"] == unpacked(as_text["embedding"])
            assert struct.pack("<24f", *as_numbers["embedding"]) == row


class TestReading:
    """Of an answer that is made while it is read, by a client that never hangs up."""

    async def test_a_client_that_reads_no_more_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server_sent_events, "UNREAD_SECONDS", 0.05)
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 3:
                await asyncio.Event().wait()

        await asyncio.wait_for(PiecewiseResponse(iter([b"a"] * 9))({"type": "http"}, stay, send), 5)
        assert len(sent) == 3

    async def test_a_client_that_reads_slowly_gets_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server_sent_events, "UNREAD_SECONDS", 0.5)
        sent: list[Any] = []

        async def send(message: Any) -> None:
            await asyncio.sleep(0.06)
            sent.append(message)

        await PiecewiseResponse(iter([b"a"] * 9))({"type": "http"}, stay, send)
        assert b"".join(message.get("body", b"") for message in sent) == b"a" * 9
        assert sent[-1]["more_body"] is False


async def stay() -> Any:
    await asyncio.Event().wait()


def test_the_document_names_the_fields_and_the_limits_that_hold() -> None:
    document = (Path(__file__).parents[2] / "docs/embeddings_api.md").read_text()
    fields = {*EmbeddingsBody.model_fields, *RerankBody.model_fields}
    assert [name for name in sorted(fields) if f"`{name}`" not in document] == []
    assert f"up to {MAX_INPUTS:,} texts. Token ids" in document
    assert f"up to {MAX_DOCUMENTS:,} texts, each" in document
