"""The examples of LLM-API's documentation: its config files, and what its clients send and read.

Of the configs only what names a place or hardware is changed, by the variables that LLM-API has for it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engines.tiny_llama import save_tiny_llama

SEED = Path(__file__).parents[1] / "data" / "seed_llm_api"
LLAMA_CONFIG = (SEED / "llama.yaml").read_text()
LLAMA_BODY = (SEED / "llama.json").read_text()
HUGGINGFACE_CONFIG = (SEED / "huggingface.yaml").read_text()
HUGGINGFACE_BODY = (SEED / "huggingface.json").read_text()
GREEDY = {
    "prompt": "One, two, three, four,",
    "params": {"temperature": 0, "repeat_penalty": 1.0, "max_tokens": 8},
}


def texts_of(stream: str) -> list[str]:
    """The data of each event, as the clients of LLM-API read it."""
    texts = []
    for event in stream.split("\n\n"):
        data = [line.removeprefix("data:").removeprefix(" ") for line in event.splitlines()]
        if data:
            texts.append("\n".join(data))
    return texts


@pytest.fixture(scope="module")
def llama(
    tmp_path_factory: pytest.TempPathFactory, serving_gateway: Any, smollm2_path: Path
) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("llama")
    file = folder / "models" / "user" / "repo_id" / "ggml-model-q4_0.bin"
    file.parent.mkdir(parents=True)
    file.symlink_to(smollm2_path)
    variables = {"MODELS_DIR": str(folder / "models"), "MODEL_PARAMS": '{"n_threads": 2}'}
    with _client(folder, serving_gateway, LLAMA_CONFIG, variables) as client:
        yield client


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory, serving_gateway: Any) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("huggingface")
    save_tiny_llama(folder / "models" / "user" / "repo_id")
    variables = {
        "MODELS_DIR": str(folder / "models"),
        "SETUP_PARAMS": '{"config_params": null}',
        "MODEL_PARAMS": '{"device_map": "cpu", "torch_dtype": "torch.float32"}',
    }
    with _client(folder, serving_gateway, HUGGINGFACE_CONFIG, variables) as client:
        yield client


@contextlib.contextmanager
def _client(folder: Path, serving: Any, config: str, variables: dict[str, str]) -> Iterator[httpx.Client]:
    file = folder / "config.yaml"
    file.write_text(config)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(f"LLM_API_{name}", value)
        with (
            serving(folder, "--llm-api-config", str(file), settings=None) as gateway,
            httpx.Client(base_url=gateway.url, timeout=60) as client,
        ):
            yield client


def test_the_example_for_llama_runs(llama: httpx.Client) -> None:
    answer = llama.post("/generate", content=LLAMA_BODY, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    assert isinstance(answer.json(), str)


def test_a_model_of_llama_goes_on_with_a_text(llama: httpx.Client) -> None:
    assert llama.get("/check").json() == "Ok"
    text = llama.post("/generate", json=GREEDY).json()
    assert text.startswith(" five, six,")
    assert "".join(texts_of(llama.post("/agenerate", json=GREEDY).text)) == text


def test_a_constraint_of_our_own_holds_for_an_old_client(llama: httpx.Client) -> None:
    params = {"n_predict": 20, "temp": 0.2, "stop": [], "regex_pattern": " (Berlin|Paris)"}
    text = llama.post("/generate", json={"prompt": "The capital of France is", "params": params}).json()
    assert text == " Paris"


def test_the_same_file_makes_vectors(llama: httpx.Client) -> None:
    text = "What is the capital of France?"
    vector = llama.post("/embeddings", json={"text": text}).json()
    assert math.isclose(math.hypot(*vector), 1, abs_tol=1e-5)
    body = {"input": text, "model": "ggml-model-q4_0-embeddings"}
    assert llama.post("/v1/embeddings", json=body).json()["data"][0]["embedding"] == vector


def test_the_example_for_transformers_runs(huggingface: httpx.Client) -> None:
    answer = huggingface.post(
        "/generate", content=HUGGINGFACE_BODY, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 200, answer.text
    assert isinstance(answer.json(), str)


def test_transformers_takes_the_likeliest_token_unless_it_is_to_sample(huggingface: httpx.Client) -> None:
    body = {"prompt": "The old bridge", "params": {"max_new_tokens": 10}}
    text = huggingface.post("/generate", json=body).json()
    named = {"prompt": "The old bridge", "params": {"max_new_tokens": 10, "do_sample": False}}
    assert huggingface.post("/generate", json=named).json() == text
    assert "".join(texts_of(huggingface.post("/agenerate", json=body).text)) == text


def test_a_length_of_transformers_counts_the_prompt(huggingface: httpx.Client) -> None:
    prompt = "The old bridge across the river"
    tokens = huggingface.post("/v1/tokenize", json={"model": "repo_id", "prompt": prompt}).json()["count"]
    answers = [
        huggingface.post("/generate", json={"prompt": prompt, "params": params}).json()
        for params in ({"max_length": tokens + 5}, {"max_new_tokens": 5})
    ]
    assert answers[0] == answers[1]
