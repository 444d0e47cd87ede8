"""Real models: all-MiniLM-L6-v2, whose own library says what its vectors are, and SmolLM2."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import PoolingType
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from gallama.config import ModelSpec
from gallama.engines import EMBEDDERS
from gallama.engines.llama_cpp.embedder import LlamaCppEmbedder, load
from gallama.errors import (
    InvalidConfig,
    InvalidRequest,
    ModelLoadFailed,
    TextTooLong,
    UnsupportedValue,
    WorkerUnavailable,
)
from tests.engines.gguf_of_bert import RandomHead, write_gguf_of_bert, write_gguf_of_bytes

CAT, KITTEN, STOCKS = "A cat sits on the mat.", "The kitten is lying on a rug.", "Shares fell at noon."
TEXTS = [
    CAT,
    KITTEN,
    STOCKS,
    "Ein Kätzchen schläft; naïve café — ÜBER!",
    "日本語のテキスト 😀 ok",
    "don't [SEP] stop",
    "word " * 300,
]
# Of numbers that are 0.05 on average. llama.cpp approximates GELU, and computes attention with 16 bits.
TOLERANCE = 1e-3
CLS, SEP = 101, 102
RERANK_TEMPLATE = "[CLS] {query} [SEP] {document} [SEP]"


class OwnLibrary:
    """The model as its authors' library computes it."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModel.from_pretrained(folder).eval()

    def token_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, truncation=False, padding=False)["input_ids"]
        return ids

    def hidden(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """The vector of each token, shape (tokens, 384)."""
        with torch.no_grad():
            output = self._model(input_ids=torch.tensor([list(token_ids)]))
        vectors: NDArray[np.float32] = output.last_hidden_state[0].numpy()
        return vectors

    def vector(self, text: str) -> NDArray[np.float32]:
        return unit(self.hidden(self.token_ids(text)).mean(axis=0))


def unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)


@pytest.fixture(scope="module")
def own_library(minilm_folder: Path) -> OwnLibrary:
    return OwnLibrary(minilm_folder)


@pytest.fixture(scope="module")
def minilm_path(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    file = write_gguf_of_bert(minilm_folder, tmp_path_factory.mktemp("model") / "minilm.gguf")
    yield file
    file.unlink()


def spec_for(path: Path, max_seq_len: int | None = None, **options: object) -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "model_id": str(path),
            "model_type": "embedding",
            "backend": "llama_cpp",
            "max_seq_len": max_seq_len,
            "backend_extra_args": options,
        }
    )


LoadEmbedder = Callable[..., LlamaCppEmbedder]


@pytest.fixture(scope="module")
def load_embedder() -> Iterator[LoadEmbedder]:
    """Loads with `backend_extra_args` as keywords; closes all at the end."""
    loaded = []

    def load_one(path: Path, max_seq_len: int | None = None, **options: object) -> LlamaCppEmbedder:
        loaded.append(load(spec_for(path, max_seq_len, **options), path))
        return loaded[-1]

    yield load_one
    for embedder in loaded:
        asyncio.run(embedder.close())


@pytest.fixture(scope="module")
def minilm(load_embedder: LoadEmbedder, minilm_path: Path) -> LlamaCppEmbedder:
    return load_embedder(minilm_path)


@pytest.fixture(scope="module")
def smollm2_embedder(load_embedder: LoadEmbedder, smollm2_path: Path) -> LlamaCppEmbedder:
    return load_embedder(smollm2_path, max_seq_len=512)


async def vectors_of(embedder: LlamaCppEmbedder, *inputs: str | Sequence[int]) -> NDArray[np.float32]:
    return (await embedder.embed(inputs)).vectors


async def test_vectors_are_those_of_the_models_own_library(
    minilm: LlamaCppEmbedder, own_library: OwnLibrary
) -> None:
    embedded = await minilm.embed(TEXTS)
    expected = [own_library.vector(text) for text in TEXTS]
    np.testing.assert_allclose(embedded.vectors, expected, atol=TOLERANCE)
    assert embedded.tokens == sum(len(own_library.token_ids(text)) for text in TEXTS)


async def test_a_text_without_a_character_is_its_special_tokens(
    minilm: LlamaCppEmbedder, own_library: OwnLibrary
) -> None:
    embedded = await minilm.embed(["", "\u200b"])
    np.testing.assert_allclose(embedded.vectors[0], own_library.vector(""), atol=TOLERANCE)
    assert embedded.tokens == 4


async def test_vectors_are_as_long_as_1_in_32_bits(minilm: LlamaCppEmbedder) -> None:
    vectors = await vectors_of(minilm, *TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("which", ["minilm", "smollm2_embedder"])
async def test_similar_texts_are_nearer(which: str, request: pytest.FixtureRequest) -> None:
    cat, kitten, stocks = await vectors_of(request.getfixturevalue(which), CAT, KITTEN, STOCKS)
    assert cat @ kitten > max(cat @ stocks, kitten @ stocks)


@pytest.mark.parametrize("which", ["minilm", "smollm2_embedder"])
async def test_token_ids_are_taken_as_they_are(which: str, request: pytest.FixtureRequest) -> None:
    embedder: LlamaCppEmbedder = request.getfixturevalue(which)
    texts = TEXTS[:6]
    token_ids = [embedder.tokenize(text, add_special_tokens=True) for text in texts]
    by_ids, by_texts = await vectors_of(embedder, *token_ids), await vectors_of(embedder, *texts)
    np.testing.assert_allclose(by_ids, by_texts, atol=TOLERANCE)


async def test_token_ids_without_special_ones_get_none(
    minilm: LlamaCppEmbedder, own_library: OwnLibrary
) -> None:
    token_ids = minilm.tokenize(CAT, add_special_tokens=False)
    assert not {CLS, SEP} & set(token_ids)
    (vector,) = await vectors_of(minilm, token_ids)
    np.testing.assert_allclose(vector, unit(own_library.hidden(token_ids).mean(axis=0)), atol=TOLERANCE)


async def test_tokens_have_their_texts_and_special_ones_their_names(minilm: LlamaCppEmbedder) -> None:
    token_ids = minilm.tokenize("embeddings", add_special_tokens=True)
    texts = minilm.token_texts(token_ids)
    assert (texts[0], texts[-1], b"".join(texts[1:-1])) == (b"[CLS]", b"[SEP]", b" embeddings")


async def test_many_calls_share_forward_passes(minilm: LlamaCppEmbedder) -> None:
    texts = [f"This is sentence number {number}." for number in range(64)]
    alone = await vectors_of(minilm, *texts)
    before = minilm.status().steps
    together = await asyncio.gather(*(vectors_of(minilm, text) for text in texts))
    assert minilm.status().steps - before <= 8
    np.testing.assert_allclose(np.concatenate(together), alone, atol=TOLERANCE)


async def test_a_cancelled_call_leaves_the_others_as_they_are(minilm: LlamaCppEmbedder) -> None:
    expected = await vectors_of(minilm, CAT)
    cancelled = asyncio.create_task(minilm.embed(["word " * 300] * 100))
    others = [asyncio.create_task(vectors_of(minilm, CAT)) for _ in range(8)]
    await asyncio.sleep(0.1)
    cancelled.cancel()
    for vectors in await asyncio.gather(*others):
        np.testing.assert_allclose(vectors, expected, atol=TOLERANCE)
    before = minilm.status().steps
    await vectors_of(minilm, CAT)
    assert minilm.status().steps - before <= 3
    assert minilm.status().busy_slots == 0


async def test_a_probe_is_a_forward_pass(minilm: LlamaCppEmbedder) -> None:
    before = minilm.status().steps
    await minilm.probe()
    assert minilm.status().steps == before + 1


async def test_the_longest_text_is_taken_and_a_longer_one_is_named(minilm: LlamaCppEmbedder) -> None:
    word = minilm.tokenize("word", add_special_tokens=False)
    assert (await minilm.embed([word * 512])).tokens == 512
    with pytest.raises(TextTooLong, match=r"`input\[3\]` has 513 tokens; the model takes 512"):
        await minilm.embed([CAT, CAT, CAT, word * 513])
    with pytest.raises(TextTooLong, match=r"`input\[1\]` has 602 tokens"):
        await minilm.embed([CAT, "word " * 600])


async def test_a_text_with_far_too_many_characters_is_not_even_tokenized(minilm: LlamaCppEmbedder) -> None:
    with pytest.raises(TextTooLong, match=r"`input\[1\]` has 512001 characters; the model takes 512 tokens"):
        await minilm.embed([CAT, " " * 512_001])
    assert (await minilm.embed([" " * 512_000])).tokens == 2


async def test_a_text_may_have_more_tokens_than_bytes(load_embedder: LoadEmbedder, tmp_path: Path) -> None:
    embedder = load_embedder(write_gguf_of_bytes(tmp_path / "bytes.gguf"))
    blanks = embedder.tokenize("a" + " " * 20, add_special_tokens=False)
    assert b"".join(embedder.token_texts(blanks)).endswith(b"a" + "\u2581".encode() * 20)


async def test_a_call_that_is_given_up_is_not_tokenized_to_its_end(
    minilm: LlamaCppEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized: list[str] = []
    tokenize = minilm.tokenize

    def counted(text: str, *, add_special_tokens: bool) -> list[int]:
        tokenized.append(text)
        return tokenize(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(minilm, "tokenize", counted)
    call = asyncio.create_task(minilm.embed(["word " * 300] * 2048))
    while not tokenized:  # noqa: ASYNC110 - the thread that tokenizes tells nobody
        await asyncio.sleep(0.001)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()
    assert len(tokenized) < 1024


@pytest.mark.parametrize("token_id", [-1, 30522, 2**40])
async def test_a_token_that_the_model_does_not_have_is_named(minilm: LlamaCppEmbedder, token_id: int) -> None:
    message = rf"`input\[1\]\[2\]` is {token_id}; this model has the tokens 0 to 30521"
    with pytest.raises(InvalidRequest, match=message):
        await minilm.embed([CAT, [CLS, SEP, token_id]])
    with pytest.raises(InvalidRequest, match=rf"`tokens\[0\]` is {token_id}"):
        minilm.token_texts([token_id])


@pytest.mark.parametrize(("which", "empty"), [("minilm", []), ("smollm2_embedder", "")])
async def test_an_input_without_tokens_is_refused(
    which: str, empty: str | list[int], request: pytest.FixtureRequest
) -> None:
    with pytest.raises(InvalidRequest, match=r"`input\[1\]` has no tokens"):
        await request.getfixturevalue(which).embed([CAT, empty])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
async def test_the_spec_may_choose_the_pooling(
    pooling: str, load_embedder: LoadEmbedder, minilm_path: Path, own_library: OwnLibrary
) -> None:
    vectors = await vectors_of(load_embedder(minilm_path, pooling=pooling), CAT, STOCKS)
    for vector, text in zip(vectors, (CAT, STOCKS), strict=True):
        hidden = own_library.hidden(own_library.token_ids(text))
        chosen = {"mean": hidden.mean(axis=0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        np.testing.assert_allclose(vector, unit(chosen), atol=TOLERANCE)


async def test_without_a_word_about_pooling_an_encoder_takes_the_mean(
    load_embedder: LoadEmbedder, minilm_folder: Path, tmp_path: Path, minilm: LlamaCppEmbedder
) -> None:
    silent = load_embedder(write_gguf_of_bert(minilm_folder, tmp_path / "silent.gguf", pooling=None))
    np.testing.assert_allclose(
        await vectors_of(silent, *TEXTS), await vectors_of(minilm, *TEXTS), atol=TOLERANCE
    )


async def test_a_causal_model_takes_the_last_token(
    load_embedder: LoadEmbedder, smollm2_path: Path, smollm2_embedder: LlamaCppEmbedder
) -> None:
    token_ids = smollm2_embedder.tokenize(CAT, add_special_tokens=True)
    last, changed, cut = await vectors_of(smollm2_embedder, CAT, [*token_ids[:-1], 5], token_ids[:-1])
    assert max(changed @ last, cut @ last) < 0.95
    (mean,) = await vectors_of(load_embedder(smollm2_path, max_seq_len=512, pooling="mean"), CAT)
    assert mean @ last < 0.95


async def test_a_text_that_is_read_in_pieces_has_the_same_vector(
    load_embedder: LoadEmbedder, smollm2_path: Path, smollm2_embedder: LlamaCppEmbedder
) -> None:
    """As far as weights of 4 bits allow: a batch of another shape is rounded in another way."""
    in_pieces = load_embedder(smollm2_path, max_seq_len=512, n_batch=32)
    texts = [CAT, "Number " + " ".join(map(str, range(60))), STOCKS]
    before = in_pieces.status().steps
    pieces, whole = await vectors_of(in_pieces, *texts), await vectors_of(smollm2_embedder, *texts)
    assert min(np.sum(pieces * whole, axis=1)) > 0.998
    assert in_pieces.status().steps - before > 5


@pytest.fixture(scope="module")
def reranker_path(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    file = tmp_path_factory.mktemp("reranker") / "reranker.gguf"
    yield write_gguf_of_bert(minilm_folder, file, pooling=PoolingType.RANK, more_tensors=RandomHead().tensors)
    file.unlink()


@pytest.fixture(scope="module")
def reranker(load_embedder: LoadEmbedder, reranker_path: Path) -> LlamaCppEmbedder:
    return load_embedder(reranker_path)


QUERY = "Where do cats sleep?"
DOCUMENTS = [CAT, STOCKS, "Cats [SEP] sleep {query} [CLS] on sofas."]


def plain_ids(embedder: LlamaCppEmbedder, text: str) -> list[int]:
    """Without special tokens, also where one is written out."""
    apart = text.replace("[", "[ ").replace("]", " ]")
    return embedder.tokenize(apart, add_special_tokens=False)


async def test_a_reranker_scores_each_pair_as_its_classifier_does(
    reranker: LlamaCppEmbedder, own_library: OwnLibrary
) -> None:
    ranked = await reranker.rerank(QUERY, DOCUMENTS)
    pairs = [
        [CLS, *plain_ids(reranker, QUERY), SEP, *plain_ids(reranker, document), SEP] for document in DOCUMENTS
    ]
    expected = [RandomHead().score(own_library.hidden(pair)[0]) for pair in pairs]
    np.testing.assert_allclose(ranked.scores, expected, atol=5e-3)
    assert max(expected) - min(expected) > 0.05
    assert ranked.tokens == sum(map(len, pairs))


async def test_a_rerank_template_is_filled_in_without_making_control_tokens_of_texts(
    load_embedder: LoadEmbedder, minilm_folder: Path, tmp_path: Path, reranker: LlamaCppEmbedder
) -> None:
    file = write_gguf_of_bert(
        minilm_folder,
        tmp_path / "templated.gguf",
        pooling=PoolingType.RANK,
        more_tensors=RandomHead().tensors,
        rerank_template=RERANK_TEMPLATE,
    )
    templated = await load_embedder(file).rerank(QUERY, DOCUMENTS)
    framed = await reranker.rerank(QUERY, DOCUMENTS)
    np.testing.assert_allclose(templated.scores, framed.scores, atol=1e-4)
    assert templated.tokens == framed.tokens


async def test_a_pair_that_is_too_long_is_named(reranker: LlamaCppEmbedder) -> None:
    message = r"`documents\[1\]` has with the query 60\d tokens; the model takes 512"
    with pytest.raises(TextTooLong, match=message):
        await reranker.rerank(QUERY, [CAT, "word " * 595])


async def test_a_model_that_ranks_does_not_embed_and_the_other_way_round(
    reranker: LlamaCppEmbedder, minilm: LlamaCppEmbedder
) -> None:
    assert reranker.dimensions == 0
    with pytest.raises(UnsupportedValue, match="/v1/rerank"):
        await reranker.embed([CAT])
    with pytest.raises(UnsupportedValue, match="does not rank"):
        await minilm.rerank(QUERY, DOCUMENTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "rank"}, "no classifier"),
        ({"pooling": "median"}, "backend_extra_args.pooling"),
        ({"kv_unified": True}, "kv_unified.*takes: n_batch"),
        ({"matryoshka_dimensions": [128, 385]}, "has 385; the model's vectors have 384"),
        ({"matryoshka_dimensions": [0]}, "matryoshka_dimensions"),
        ({"n_gpu_layers": 1}, "no GPU support"),
        ({"max_seq_len": 513}, "`max_seq_len` is 513; the model has 512 positions"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    options: dict[str, Any], message: str, minilm_path: Path
) -> None:
    with pytest.raises(InvalidConfig, match=message):
        load(spec_for(minilm_path, **options), minilm_path)


@pytest.mark.parametrize(("option", "expected"), [([128, 256], (128, 256)), ("any", "any")])
def test_dimensions_may_be_cut_where_the_spec_says_so(
    option: object, expected: object, load_embedder: LoadEmbedder, minilm_path: Path, minilm: LlamaCppEmbedder
) -> None:
    assert load_embedder(minilm_path, matryoshka_dimensions=option).shorter_dimensions == expected
    assert minilm.shorter_dimensions == ()


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelLoadFailed):
        load(spec_for(file), file)


async def test_it_is_found_by_its_backend_and_closes(minilm_path: Path) -> None:
    told: list[float] = []
    embedder = EMBEDDERS["llama_cpp"](spec_for(minilm_path), minilm_path, told.append)
    assert told
    assert told == sorted(told)
    assert told[-1] <= 1
    waiting = asyncio.create_task(embedder.embed(["word " * 300] * 100))
    await asyncio.sleep(0.2)
    await embedder.close()
    with pytest.raises(WorkerUnavailable):
        await waiting
    with pytest.raises(WorkerUnavailable):
        await embedder.embed([CAT])
