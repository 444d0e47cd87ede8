"""Run by the Python of the environment that has infinity-emb: prints what the engine does, as JSON.

python infinity_findings.py MODEL_FOLDER EMPTY_FOLDER
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from gallama.config import ModelSpec
from gallama.engines.infinity import InfinityEmbedder, load
from gallama.errors import GallamaError

TEXTS = [
    "A cat sits on the mat.",
    "  Ein Käfer, 甲虫, sits there   too. ",
    "word " * 150,
    "Stocks fell sharply today.",
    "",
]
MODEL, SCRATCH = Path(sys.argv[1]), Path(sys.argv[2])


def embedder_of(folder: Path, max_seq_len: int | None = None, **arguments: object) -> InfinityEmbedder:
    values = {"model_id": str(folder), "backend": "embedding", "backend_extra_args": arguments}
    return load(ModelSpec.model_validate(values | {"max_seq_len": max_seq_len}), folder)


@asynccontextmanager
async def _started(embedder: InfinityEmbedder) -> Any:
    try:
        yield embedder
    finally:
        await embedder.close()


def started(folder: Path, **arguments: Any) -> AbstractAsyncContextManager[InfinityEmbedder]:
    return _started(embedder_of(folder, **arguments))


async def refusal(work: Awaitable[object]) -> dict[str, Any]:
    """The report of the error that a request ends with."""
    try:
        return {"answered": str(await work)}
    except GallamaError as error:
        return {"class": type(error).__name__, "message": error.message, "param": error.param}


async def after_step(embedder: InfinityEmbedder, step: int) -> None:
    while embedder.status().steps == step:  # noqa: ASYNC110 - the engine's threads tell nobody
        await asyncio.sleep(0.001)


def load_refusal(folder: Path, **arguments: Any) -> str:
    try:
        embedder_of(folder, **arguments)
    except GallamaError as error:
        return f"{type(error).__name__}: {error.message}"
    return "loaded"


async def distance_from_own_library(folder: Path, texts: Sequence[str] = TEXTS, **arguments: Any) -> float:
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(folder), device="cpu").encode(
        list(texts), normalize_embeddings=True, show_progress_bar=False
    )
    async with started(folder, **arguments) as embedder:
        vectors = (await embedder.embed(texts)).vectors
    assert vectors.dtype == np.float32
    assert vectors.shape == expected.shape
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    return float(np.abs(vectors - expected).max())


async def own_library() -> dict[str, float]:
    return {
        "plain": await distance_from_own_library(MODEL),
        "short passes": await distance_from_own_library(MODEL, batch_size=2, batch_tokens=40),
        "left padding": await distance_from_own_library(last_token_model()),
        "prompt": await distance_from_own_library(model_with_prompt(), TEXTS[:2]),
        "lower case": await distance_from_own_library(model_that_lowers_case()),
        "bfloat16": await distance_from_own_library(MODEL, dtype="bfloat16"),
    }


def last_token_model() -> Path:
    """A causal model without sense, padded on the left, whose last token counts."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import AutoTokenizer, Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    inner, folder = SCRATCH / "inner", SCRATCH / "last_token"
    config = Qwen2Config(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    Qwen2Model(config).save_pretrained(inner)
    AutoTokenizer.from_pretrained(MODEL, padding_side="left").save_pretrained(inner)
    transformer = models.Transformer(str(inner))
    pooling = models.Pooling(transformer.get_word_embedding_dimension(), pooling_mode="lasttoken")
    SentenceTransformer(modules=[transformer, pooling]).save(str(folder))
    return folder


def model_with_prompt() -> Path:
    folder = copy_of_model("prompt")
    settings = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder


def model_that_lowers_case() -> Path:
    """Its tokenizer leaves case as it is; the module around it does not."""
    folder = copy_of_model("lower")
    change_json(folder / "tokenizer_config.json", {"do_lower_case": False})
    change_json(folder / "sentence_bert_config.json", {"do_lower_case": True})
    return folder


def copy_of_model(name: str, **config: object) -> Path:
    folder = SCRATCH / name
    shutil.copytree(MODEL, folder)
    change_json(folder / "config.json", config)
    return folder


def change_json(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


async def token_ids() -> dict[str, Any]:
    async with started(MODEL) as embedder:
        ids = [embedder.tokenize(text, add_special_tokens=True) for text in TEXTS]
        of_texts, of_ids = await embedder.embed(TEXTS), await embedder.embed(ids)
        mixed = await embedder.embed([TEXTS[0], ids[1]])
        # Cut up once more, "##ing" would be "##", "ing".
        alone = await embedder.embed([[101, 2075, 102]])
        return {
            "equal": bool(np.array_equal(of_texts.vectors, of_ids.vectors)),
            "counted": [of_texts.tokens, of_ids.tokens, sum(map(len, ids))],
            "mixed": float(np.abs(mixed.vectors - of_texts.vectors[:2]).max()),
            "alone": alone.tokens,
            "special": embedder.tokenize("a cat", add_special_tokens=False),
            "of nothing": [embedder.tokenize("", add_special_tokens=False), embedder.token_texts([])],
            "texts": b"".join(embedder.token_texts([101, 2075, 4937, 2015, 102])).decode(),
            "unknown": await refusal(embedder.embed([[101, 102], [101, 30522]])),
            "none": await refusal(embedder.embed([[]])),
        }


async def lengths() -> dict[str, Any]:
    async with started(MODEL) as embedder:
        steps = embedder.status().steps
        return {
            "limit": embedder.context_length,
            "just fits": (await embedder.embed(["word " * (embedder.context_length - 2)])).tokens,
            "text": await refusal(embedder.embed(["a", "b", "word " * 300])),
            "ids": await refusal(embedder.embed([[101] * 300])),
            "characters": await refusal(embedder.embed([" " * 10_000_000])),
            "late": await refusal(embedder.embed(["a"] * 100 + ["word " * 300])),
            "steps": embedder.status().steps - steps,
            "longer": embedder_of(MODEL, max_seq_len=512).context_length,
            "too long": load_refusal(MODEL, max_seq_len=513),
        }


async def concurrent() -> dict[str, Any]:
    async with started(MODEL) as embedder:
        await embedder.probe()
        before = embedder.status()
        answers = await asyncio.gather(*(embedder.embed([f"sentence {i}"]) for i in range(64)))
        after = embedder.status()
        alone = [(await embedder.embed([f"sentence {i}"])).vectors[0] for i in range(64)]
        together = np.array([answer.vectors[0] for answer in answers])
        return {
            "steps": after.steps - before.steps,
            "steps alone": embedder.status().steps - after.steps,
            "busy": [before.busy_slots, after.busy_slots],
            "distance": float(np.abs(together - np.array(alone)).max()),
        }


async def cancelled() -> dict[str, Any]:
    async with started(MODEL, batch_size=4) as embedder:
        await embedder.probe()
        steps = embedder.status().steps
        calls = [asyncio.create_task(embedder.embed(["word " * 250] * 32)) for _ in range(16)]
        await after_step(embedder, steps)
        busy = embedder.status().busy_slots
        for call in calls:
            call.cancel()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        await embedder.embed(["word"])
        status = embedder.status()
        return {
            "busy": [busy, status.busy_slots],
            "waiting": status.waiting,
            "cancelled": sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes),
            "steps": status.steps - steps,
        }


async def closed() -> dict[str, Any]:
    """What becomes of calls that are computed, or whose texts are cut up, while the model is closed."""
    embedder = embedder_of(MODEL)
    await embedder.probe()
    steps = embedder.status().steps
    computed = asyncio.create_task(embedder.embed(["word " * 250] * 320))
    await after_step(embedder, steps)
    cut_up = asyncio.create_task(embedder.embed(["word"]))
    await asyncio.sleep(0)
    await embedder.close()
    async with asyncio.timeout(30):
        refusals = [await refusal(call) for call in (computed, cut_up, embedder.embed(["word"]))]
    return {"classes": [each.get("class") for each in refusals], "busy": embedder.status().busy_slots}


async def long_calls() -> dict[str, Any]:
    """How much of a large call is computed before a small one that comes later."""
    async with started(MODEL, batch_size=2) as embedder:
        await embedder.probe()
        steps = embedder.status().steps
        large = asyncio.create_task(embedder.embed(["a word"] * 400))
        await after_step(embedder, steps)
        await embedder.embed(["another"])
        before_small = embedder.status().steps - steps
        await large
        return {"before small": before_small, "all": embedder.status().steps - steps}


async def failing_passes() -> dict[str, Any]:
    async with started(MODEL) as embedder:
        replica: Any = embedder._passes[0]._model
        forward = replica.encode_core

        def fail_on_long(features: Any) -> Any:
            if features["input_ids"].shape[1] > 20:
                raise RuntimeError("out of memory")
            return forward(features)

        replica.encode_core = fail_on_long
        steps = embedder.status().steps
        failed = await refusal(embedder.embed(["word " * 100]))
        answered = await embedder.embed(["word"])
        return {"failed": failed, "answered": len(answered.vectors), "steps": embedder.status().steps - steps}


async def ranking() -> dict[str, Any]:
    from sentence_transformers import CrossEncoder

    folder, documents = ranking_model(), [*TEXTS, "no " * 40]
    expected = CrossEncoder(str(folder), device="cpu").predict([("a cat", each) for each in documents])
    async with started(folder, batch_size=2) as embedder:
        ranked = await embedder.rerank("a cat", documents)
        await embedder.probe()
        pair = embedder.tokenize("a cat", add_special_tokens=True)
        return {
            "distance": float(np.abs(np.array(ranked.scores) - expected).max()),
            "spread": float(expected.max() - expected.min()),
            "one": (await embedder.rerank("a cat", ["a cat"])).tokens - 2 * len(pair),
            "dimensions": embedder.dimensions,
            "embed": await refusal(embedder.embed(["a"])),
            "long": await refusal(embedder.rerank("a cat", ["b", "word " * 300])),
        }


def ranking_model() -> Path:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    folder = SCRATCH / "ranking"
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        num_labels=1,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


async def not_ranking() -> dict[str, Any]:
    async with started(MODEL) as embedder:
        return await refusal(embedder.rerank("a", ["b"]))


async def shorter() -> dict[str, Any]:
    return {
        "none": embedder_of(MODEL).shorter_dimensions,
        "config": embedder_of(copy_of_model("some", matryoshka_dimensions=[384, 64])).shorter_dimensions,
        "any": embedder_of(copy_of_model("any", is_matryoshka=True)).shorter_dimensions,
        "asked": embedder_of(MODEL, matryoshka_dimensions="64,128").shorter_dimensions,
        "asked any": embedder_of(MODEL, matryoshka_dimensions="any").shorter_dimensions,
        "too many": load_refusal(MODEL, matryoshka_dimensions=[512]),
    }


async def refused_models() -> dict[str, str]:
    code = copy_of_model("code")
    (code / "modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": "", "type": "code.Model"}])
    )
    return {
        "code": load_refusal(code),
        "classifier": load_refusal(classifier()),
        "no config": load_refusal(SCRATCH),
        "argument": load_refusal(MODEL, pooling="mean"),
        "value": load_refusal(MODEL, batch_size=0),
        "device": load_refusal(MODEL, device="cuda"),
        "unknown reading": refusal_of_unknown_reading(),
    }


def refusal_of_unknown_reading() -> str:
    """Of a model whose own library leaves the first token out."""
    from sentence_transformers import SentenceTransformer

    read = SentenceTransformer.tokenize
    SentenceTransformer.tokenize = lambda model, texts: {
        name: values[:, 1:] for name, values in read(model, texts).items()
    }
    try:
        return load_refusal(MODEL)
    finally:
        SentenceTransformer.tokenize = read


def classifier() -> Path:
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = SCRATCH / "classifier"
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


async def surroundings() -> dict[str, Any]:
    telemetry: Any = sys.modules["infinity_emb.telemetry"]
    return {
        "files": os.listdir(),
        "handlers": len(logging.getLogger().handlers),
        "offline": os.environ["HF_HUB_OFFLINE"],
        "telemetry": telemetry.TELEMETRY_ENABLED,
    }


FINDINGS: Sequence[Callable[[], Coroutine[Any, Any, Any]]] = (
    own_library,
    token_ids,
    lengths,
    concurrent,
    cancelled,
    closed,
    long_calls,
    failing_passes,
    ranking,
    not_ranking,
    shorter,
    refused_models,
    surroundings,
)


async def main() -> None:
    os.chdir(SCRATCH / "started_here")
    found = {}
    for find in FINDINGS:
        try:
            found[find.__name__] = await find()
        except Exception as error:
            logging.exception("%s", find.__name__)
            found[find.__name__] = {"broken": repr(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    (SCRATCH / "started_here").mkdir()
    asyncio.run(main())
