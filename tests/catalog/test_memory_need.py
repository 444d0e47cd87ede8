"""What a model will take is told before it is loaded, and comes close to what it does take."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from gallama.catalog import ResolvedModel, resolve_model
from gallama.catalog.memory_need import MemoryNeed, estimate_memory
from gallama.config import ServerConfig
from gallama.embedding import EmbedRequest
from gallama.engines.llama_cpp import _shelf_tokens
from gallama.engines.llama_cpp.options import choose_context_length, context_options, read_options
from gallama.errors import InvalidConfig
from gallama.pool.launchers.local import LocalLauncher
from gallama.wire import ask
from tests.engines.gguf_of_bert import write_gguf_of_bert

# 30 layers with 3 heads for keys and values of 64 numbers each, in 2 bytes.
SMOLLM2_CELL_BYTES = 30 * 3 * (64 + 64) * 2
TEXTS = ("word " * 200,) * 4  # more than one full batch
TOLERANCE = 1.25
"""The factor within which the estimate is right."""

GgufWriter = Callable[..., Path]


def smollm2(**values: Any) -> ResolvedModel:
    return resolve_model({"model_id": "smollm2-135m", **values}, ServerConfig())


def need_of(file: Path, **values: Any) -> MemoryNeed:
    return estimate_memory(resolve_model({"model_id": str(file), **values}, ServerConfig()))


@pytest.fixture
def write_gguf(tmp_path: Path) -> GgufWriter:
    """Writes a model without tensors, of 4 layers and other sizes as told."""

    def write(**changes: int | list[int]) -> Path:
        sizes = {"block_count": 4, "context_length": 1024, "embedding_length": 64, **changes}
        values = b"".join(_pair(f"x.{name.replace('__', '.')}", value) for name, value in sizes.items())
        path = tmp_path / "model.gguf"
        path.write_bytes(
            struct.pack("<4sIQQ", b"GGUF", 3, 0, len(sizes) + 1)
            + _text("general.architecture")
            + struct.pack("<I", 8)
            + _text("x")
            + values
        )
        return path

    return write


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _pair(name: str, value: int | list[int]) -> bytes:
    if isinstance(value, int):
        return _text(name) + struct.pack("<II", 4, value)
    return _text(name) + struct.pack(f"<IIQ{len(value)}I", 9, 4, len(value), *value)


@pytest.mark.parametrize(
    "values",
    [
        {"max_seq_len": 2048},
        {"max_seq_len": 2048, "cache_size": 32768},
        {"cache_quant": "Q8"},
        {"max_seq_len": 2048, "draft_model_id": "smollm2-135m"},
    ],
)
async def test_the_estimate_comes_close_to_what_a_worker_takes(values: dict[str, Any]) -> None:
    await comes_close(smollm2(**values))


async def test_the_estimate_for_a_model_that_embeds_comes_close() -> None:
    await comes_close(smollm2(model_type="embedding"))


async def test_the_estimate_for_an_encoder_comes_close(minilm_folder: Path, tmp_path: Path) -> None:
    file = write_gguf_of_bert(minilm_folder, tmp_path / "minilm.gguf")
    await comes_close(resolve_model({"model_id": str(file), "model_type": "embedding"}, ServerConfig()))


async def comes_close(model: ResolvedModel) -> None:
    worker = await LocalLauncher().launch(model)
    try:
        ready = await worker.ready(lambda _: None)
        if model.spec.model_type == "embedding":  # before its first texts it has not touched its memory
            await ask(ready.address, worker.secret, EmbedRequest(request_id="r", model="m", inputs=TEXTS))
        taken = psutil.Process(worker.process_id).memory_info().rss
    finally:
        await worker.stop()
    assert taken / TOLERANCE < estimate_memory(model).host_bytes < taken * TOLERANCE


def test_the_estimate_counts_the_cells_and_the_shelf_that_the_engine_makes(write_gguf: GgufWriter) -> None:
    rng = random.Random(0)
    file = write_gguf(context_length=8192, attention__head_count=4)
    cell_bytes = 4 * 64 * 2 * 2
    for _ in range(200):
        longest = rng.choice([None, rng.randint(1, 9000)])
        values = {
            "max_seq_len": longest,
            "cache_size": rng.choice([None, (longest or 1) + rng.randint(0, 100_000)]),
            "max_concurrent_requests": rng.randint(1, 40),
            "backend_extra_args": rng.choice([{}, {}, {"kv_unified": True}, {"shelf_tokens": 1000}]),
        }
        model = resolve_model({"model_id": str(file), **values}, ServerConfig())
        length = choose_context_length(model.spec, 8192)
        made = context_options(model.spec, read_options(model.spec), length)
        need = estimate_memory(model).model
        assert need.cache_bytes == made.cells * cell_bytes, model.spec
        kept = _shelf_tokens(read_options(model.spec), made)
        assert need.shelf_bytes == kept * cell_bytes, model.spec


def test_an_engine_without_a_model_takes_nothing(tmp_path: Path) -> None:
    need = need_of(tmp_path / "no-file", backend="scripted")
    assert (need.host_bytes, need.gpu_bytes, need.shelf_bytes) == (0, 0, 0)


def test_a_file_that_tells_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(InvalidConfig, match="damaged or no language model"):
        need_of(tmp_path / "a.gguf")


@pytest.mark.parametrize(("quant", "part"), [("Q8", 34 / 64), ("Q4", 18 / 64)])
def test_a_quantized_cache_is_smaller(quant: str, part: float) -> None:
    whole = estimate_memory(smollm2()).model.cache_bytes
    assert estimate_memory(smollm2(cache_quant=quant)).model.cache_bytes == whole * part


def test_the_draft_model_is_told_apart() -> None:
    need = estimate_memory(smollm2(draft_model_id="smollm2-135m", draft_cache_size=1024))
    assert need.draft is not None
    assert need.draft.cache_bytes == 1024 * SMOLLM2_CELL_BYTES
    assert need.gpu_bytes == need.model.gpu_bytes + need.draft_gpu_bytes
    assert need.draft_gpu_bytes == need.draft.total_bytes


def test_all_of_a_model_goes_onto_gpus_unless_it_is_told_otherwise() -> None:
    assert estimate_memory(smollm2()).gpu_bytes == estimate_memory(smollm2()).model.total_bytes


def test_without_layers_on_gpus_nothing_goes_there() -> None:
    assert estimate_memory(smollm2(backend_extra_args={"n_gpu_layers": 0})).gpu_bytes == 0


def test_the_more_layers_on_gpus_the_more_goes_there() -> None:
    sizes = [
        estimate_memory(smollm2(backend_extra_args={"n_gpu_layers": layers})).gpu_bytes
        for layers in (0, 1, 15, 31, 99)
    ]
    assert sizes == sorted(sizes)
    assert sizes[-2] == sizes[-1] == estimate_memory(smollm2()).gpu_bytes


def test_a_cache_in_main_memory_is_not_on_gpus() -> None:
    need = estimate_memory(smollm2(backend_extra_args={"offload_kqv": False}))
    assert need.gpu_bytes == need.model.total_bytes - need.model.cache_bytes


def test_only_the_layers_with_keys_have_a_cache(write_gguf: GgufWriter) -> None:
    heads = {"attention__head_count": 4, "attention__key_length": 8, "attention__value_length": 16}
    per_head = 1024 * (8 + 16) * 2
    need = need_of(write_gguf(attention__head_count_kv=[0, 2, 0, 1], **heads))
    assert need.model.cache_bytes == 3 * per_head
    need = need_of(write_gguf(attention__head_count_kv=2, full_attention_interval=4, **heads))
    assert need.model.cache_bytes == 2 * per_head


def test_a_model_with_states_has_one_for_each_sequence_and_layer(write_gguf: GgufWriter) -> None:
    file = write_gguf(attention__head_count=0, wkv__head_size=8)
    sequences = 1 + 16
    need = need_of(file, max_concurrent_requests=1)
    assert need.model.cache_bytes == sequences * 4 * 64 * (8 + 2) * 4


def test_a_window_keeps_cells_from_being_divided(write_gguf: GgufWriter) -> None:
    values = {"cache_size": 5 * 1024, "max_concurrent_requests": 4}
    divided = need_of(write_gguf(attention__head_count=4), **values).model.cache_bytes
    shared = need_of(write_gguf(attention__head_count=4, attention__sliding_window=512), **values)
    assert shared.model.cache_bytes == divided * 5 / 4


def test_scores_are_kept_without_flash_attention() -> None:
    without = smollm2(backend_extra_args={"flash_attn": False})
    assert estimate_memory(without).model.compute_bytes > estimate_memory(smollm2()).model.compute_bytes


def test_arguments_that_the_engine_will_refuse_do_not_matter() -> None:
    wrong = smollm2(backend_extra_args={"n_ubatch": "many", "n_batch": {}, "n_gpu_layers": -7})
    assert estimate_memory(wrong) == estimate_memory(smollm2())


# 2 layers with 2 heads of 64 numbers for keys and as many for values.
LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
LLAMA_NUMBERS = 2 * 2 * 2 * 64


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model of Hugging Face's form: a table of 1000 vectors, and one weight of as many bytes."""

    def write(name: str = "tiny", dtype: Any = np.float16, **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        table = np.zeros((1000, 256), dtype)
        save_file({"model.embed_tokens.weight": table, "lm_head.weight": table}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**LLAMA, **config}))
        return folder

    return write


class TestExllama:
    @pytest.mark.parametrize("backend", ["exllamav2", "exllamav3"])
    @pytest.mark.parametrize(
        ("quant", "bits"), [("FP16", 16.0), ("Q8", 8.5), ("Q6", 6.5), ("Q4", 4.5)], ids=str
    )
    def test_the_cache_takes_its_bits_for_each_number(
        self, write_folder: Callable[..., Path], backend: str, quant: str, bits: float
    ) -> None:
        need = need_of(write_folder(), backend=backend, cache_size=8192, cache_quant=quant).model
        cells = 8192 + 256  # a token more than a text may have, in whole pages
        one_layer = cells * LLAMA_NUMBERS // 2 * 2 if backend == "exllamav2" and quant != "FP16" else 0
        assert need.cache_bytes == cells * LLAMA_NUMBERS * bits / 8 + one_layer

    def test_keys_and_values_may_take_different_bits(self, write_folder: Callable[..., Path]) -> None:
        folder = write_folder()
        for bits in ([8, 4], "8, 4"):
            need = need_of(folder, backend="exllamav3", backend_extra_args={"cache_bits": bits}).model
            assert need.cache_bytes == (4096 + 256) * LLAMA_NUMBERS * 6.5 / 8

    def test_shorter_chunks_need_less_room(self, write_folder: Callable[..., Path]) -> None:
        folder, short = write_folder(), {"max_chunk_size": 256}
        needs = [need_of(folder, backend="exllamav2", backend_extra_args=args).model for args in ({}, short)]
        vectors = 2 * (8 * 256 + 4 * 512)
        assert needs[0].compute_bytes - needs[1].compute_bytes == (2048 - 256) * vectors

    def test_the_cache_holds_a_longest_text_with_its_drafts(self, write_folder: Callable[..., Path]) -> None:
        folder = write_folder()
        cell_bytes = LLAMA_NUMBERS * 2
        assert need_of(folder, backend="exllamav3").model.cache_bytes == (4096 + 256) * cell_bytes
        short = need_of(folder, backend="exllamav3", max_seq_len=1000)
        assert short.model.cache_bytes == 1024 * cell_bytes
        drafts = need_of(
            folder, backend="exllamav3", max_seq_len=1000, speculative="ngram", num_draft_tokens=24
        )
        assert drafts.model.cache_bytes == 1280 * cell_bytes

    def test_the_embedding_stays_in_main_memory(self, write_folder: Callable[..., Path]) -> None:
        need = need_of(write_folder(), backend="exllamav3")
        assert need.model.weight_bytes == 2 * 512_000
        assert need.gpu_bytes == need.model.total_bytes - 512_000

    def test_main_memory_never_takes_what_must_be_on_gpus(self, write_folder: Callable[..., Path]) -> None:
        need = need_of(write_folder(), backend="exllamav3")
        assert need.least_host_bytes == need.process_bytes + 512_000
        on_cpus = need_of(write_folder("other"), backend="transformers")
        assert on_cpus.least_host_bytes == on_cpus.host_bytes

    def test_weights_of_4_bytes_are_held_in_2(self, write_folder: Callable[..., Path]) -> None:
        assert need_of(write_folder(dtype=np.float32), backend="exllamav2").model.weight_bytes == 2 * 512_000

    def test_each_gpu_has_its_own_room_to_compute_in(self, write_folder: Callable[..., Path]) -> None:
        folder = write_folder(quantization_config={"quant_method": "exl3"})
        one, two = (need_of(folder, tp=True, gpus=gpus).model.compute_bytes for gpus in ("8,0", "8,0,8"))
        logits = 16 * 1000 * 6
        assert two - logits == 2 * (one - logits)

    def test_the_draft_model_has_a_cache_of_the_same_length(self, write_folder: Callable[..., Path]) -> None:
        folder, small = write_folder(), write_folder("small", num_hidden_layers=1)
        need = need_of(folder, backend="exllamav2", draft_model_id=str(small))
        assert need.draft is not None
        assert need.draft.cache_bytes * 2 == need.model.cache_bytes
        assert need.gpu_bytes == need.model.gpu_bytes + need.draft.gpu_bytes

    @pytest.mark.parametrize(
        ("config", "numbers"),
        [
            ({"text_config": {"num_hidden_layers": 3}}, 3 * 256),
            ({"head_dim": 32}, 2 * 128),
            ({"num_key_value_heads": None}, 2 * 512),
            ({"layer_types": ["linear_attention", "full_attention"]}, 256),
            ({"kv_lora_rank": 100, "qk_rope_head_dim": 28}, 2 * 128),
            ({"num_hidden_layers": "many"}, 0),
            ({"num_attention_heads": -1, "num_key_value_heads": 1}, 2 * 512),
        ],
    )
    def test_the_measures_are_read_from_the_config(
        self, write_folder: Callable[..., Path], config: dict[str, Any], numbers: int
    ) -> None:
        need = need_of(write_folder(**config), backend="exllamav3", max_seq_len=240)
        assert need.model.cache_bytes == 256 * numbers * 2
