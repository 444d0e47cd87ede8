"""What exllamav2 is told of a folder, and which folders and wishes it is not given at all."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gallama.config import ModelSpec
from gallama.engines import exllamav2
from gallama.engines.exllamav2.loading import (
    check_sliding_window,
    check_tensor_parallel,
    naming,
    prints_in_log,
    read_library_config,
    rotations,
)
from gallama.engines.exllamav2.options import ExLlamaV2Options, Rotations, choose_sizes, read_options
from gallama.errors import InvalidConfig, ModelLoadFailed, NotEnoughMemory
from tests.engines.exllamav2.asking import expected, generate_all, loaded, make_prompts
from tests.engines.exllamav2.ground import CONTEXT_LENGTH, Ground, save_folder

LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {
    "rope_theta": 10000.0,
    "rope_type": "longrope",
    "long_factor": [2.0] * 16,
    "short_factor": [1.0] * 16,
    "original_max_position_embeddings": 512,
}


@pytest.fixture(autouse=True)
def no_loads(ground: Ground) -> None:
    ground.loads.clear()
    ground.unloads = 0


def spec(folder: Path, **values: Any) -> ModelSpec:
    return ModelSpec.model_validate({"model_id": str(folder), "backend": "exllamav2", **values})


def options(folder: Path, **arguments: Any) -> ExLlamaV2Options:
    return read_options(spec(folder, backend_extra_args=arguments))


async def load_and_close(folder: Path, **values: Any) -> list[float]:
    """The progress that was reported."""
    told: list[float] = []
    engine = exllamav2.load(spec(folder, **values), folder, told.append)
    await engine.close()
    return told


@pytest.mark.parametrize(
    ("quantization", "way_out"),
    [
        ({"quant_method": "exl3", "bits": 4.0}, "EXL3 .*backend=exllamav3"),
        ({"quant_method": "awq", "bits": 4}, "AWQ .*leave `backend` out"),
        ({"quant_method": "gptq", "bits": 8}, "GPTQ of 4 bits"),
        ({"quant_method": "fp8"}, "FP8"),
    ],
)
def test_weights_that_it_would_read_wrongly_are_refused(
    ground: Ground, tmp_path: Path, quantization: dict[str, object], way_out: str
) -> None:
    folder = save_folder(tmp_path, quantization_config=quantization)
    with pytest.raises(ModelLoadFailed, match=way_out):
        exllamav2.load(spec(folder), folder)


async def test_gptq_of_4_bits_and_unquantized_folders_are_loaded(ground: Ground, tmp_path: Path) -> None:
    for name, quantization in (("gptq", {"quant_method": "gptq", "bits": 4}), ("none", None)):
        (tmp_path / name).mkdir()
        await load_and_close(save_folder(tmp_path / name, quantization_config=quantization))
    assert len(ground.loads) == 2


def test_an_architecture_that_it_would_take_for_a_llama_is_refused(ground: Ground, tmp_path: Path) -> None:
    folder = save_folder(tmp_path, architectures=["MambaForCausalLM"])
    with pytest.raises(ModelLoadFailed, match="MambaForCausalLM, which exllamav2 does not know"):
        exllamav2.load(spec(folder), folder)


def test_a_folder_without_weights_is_told_of(ground: Ground, tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadFailed, match=f"exllamav2 could not load {folder}.*safetensors"):
        exllamav2.load(spec(folder), folder)


@pytest.mark.parametrize(
    ("rope", "attributes"),
    [
        ({"rope_theta": 777.0, "rope_type": "default"}, {"rotary_embedding_base": 777.0}),
        ({"rope_theta": 777.0}, {"rotary_embedding_base": 777.0, "alt_rope_method": None}),
        ({"rope_type": "linear", "factor": 2.0}, {"scale_pos_emb": 2.0, "rotary_embedding_base": 10000.0}),
        (LLAMA3, {"alt_rope_method": "llama3", "l3_rope_factor": 32.0, "rotary_embedding_base": 5e5}),
        (YARN, {"alt_rope_method": "yarn", "yarn_rope_factor": 4.0}),
        (LONGROPE, {"alt_rope_method": "su", "original_max_seq_len": 512}),
    ],
)
def test_positions_are_read_from_where_transformers_5_writes_them(
    ground: Ground, tmp_path: Path, rope: dict[str, object], attributes: dict[str, object]
) -> None:
    folder = save_folder(tmp_path, rope_parameters=rope)
    config = read_library_config(folder, options(folder))
    assert {name: getattr(config, name) for name in attributes} == attributes


def test_the_same_positions_are_read_from_both_forms(ground: Ground, tmp_path: Path) -> None:
    read = []
    for name, described in (
        (
            "older",
            {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        ),
        ("newer", {"rope_parameters": LLAMA3}),
    ):
        (tmp_path / name).mkdir()
        config = read_library_config(
            save_folder(tmp_path / name, **described), ExLlamaV2Options.model_construct()
        )
        read.append({key: value for key, value in vars(config).items() if "rop" in key or "rot" in key})
    assert read[0] == read[1]


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "dynamic", "factor": 2.0}, {"full_attention": {"rope_theta": 1e6}}, {"rope_type": "yarn"}],
)
def test_positions_that_it_cannot_compute_are_refused(
    ground: Ground, tmp_path: Path, rope: dict[str, object]
) -> None:
    folder = save_folder(tmp_path, rope_parameters=rope)
    with pytest.raises(ModelLoadFailed):
        read_library_config(folder, options(folder))


def test_rotations_tell_how_long_a_text_the_model_knows(ground: Ground, tmp_path: Path) -> None:
    lengths = []
    for name, rope in (("plain", {}), ("yarn", YARN), ("long", LONGROPE)):
        (tmp_path / name).mkdir()
        folder = save_folder(tmp_path / name, rope_parameters=rope)
        known = rotations(read_library_config(folder, options(folder)))
        lengths.append((known.trained_length, known.is_yarn, known.short_length))
    assert lengths == [
        (CONTEXT_LENGTH, False, None),
        (4 * 512, True, None),
        (CONTEXT_LENGTH, False, 512),
    ]


async def test_positions_are_stretched_as_asked(ground: Ground, tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    config = read_library_config(folder, options(folder, rope_scale=2.0, rope_alpha=3.0))
    assert (config.scale_pos_emb, config.scale_alpha_value) == (2.0, 3.0)
    await load_and_close(folder, max_seq_len=2 * CONTEXT_LENGTH, backend_extra_args={"rope_scale": 2.0})


async def test_progress_grows_to_the_end_with_a_draft_model_too(ground: Ground, tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    for values in ({}, {"draft_model_id": str(folder)}):
        told = await load_and_close(folder, **values)
        assert told == sorted(told)
        assert 0 <= told[0] < 0.1
        assert told[-1] == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("quant", "kind"),
    [
        (None, "ExLlamaV2Cache"),
        ("FP16", "ExLlamaV2Cache"),
        ("Q8", "ExLlamaV2Cache_Q8"),
        ("Q6", "ExLlamaV2Cache_Q6"),
        ("Q4", "ExLlamaV2Cache_Q4"),
    ],
)
async def test_the_cache_is_stored_as_asked(
    ground: Ground, tmp_path: Path, quant: str | None, kind: str
) -> None:
    async with loaded(ground, save_folder(tmp_path), cache_quant=quant, cache_size=2048):
        cache = ground.generator.cache
        assert type(cache).__name__ == kind
        assert cache.max_seq_len >= 2048


async def test_the_draft_model_s_cache_may_be_stored_in_another_way(ground: Ground, tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    kinds = []
    for quant in (None, "Q4"):
        drafting = {"draft_model_id": str(folder), "cache_quant": "Q8", "draft_cache_quant": quant}
        async with loaded(ground, folder, **drafting):
            caches = (ground.generator.cache, ground.generator.draft_cache)
            kinds.append([type(cache).__name__.removeprefix("ExLlamaV2Cache_") for cache in caches])
    assert kinds == [["Q8", "Q8"], ["Q8", "Q4"]]


def test_a_cache_of_odd_heads_is_not_quantized(ground: Ground, tmp_path: Path) -> None:
    folder = save_folder(tmp_path, head_dim=80)
    with pytest.raises(InvalidConfig, match=r"`cache_quant` is Q8.*heads of 80"):
        exllamav2.load(spec(folder, cache_quant="Q8"), folder)


async def test_gigabytes_count_the_draft_model_where_it_has_none_of_its_own(
    ground: Ground, tmp_path: Path
) -> None:
    folder = save_folder(tmp_path)
    free = ground.free_bytes
    await load_and_close(folder, gpus=[10], draft_model_id=str(folder))
    await load_and_close(folder, gpus=[10], draft_gpus=[3], draft_model_id=str(folder))
    reserved = [load["reserve_vram"][0] for load in ground.loads]
    assert reserved == [free - 10**10, free - 10**10, free - 3 * 10**9, free - 10**10]


async def test_models_are_kept_from_gpus_of_zero_gigabytes(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    folder, free = save_folder(tmp_path), ground.free_bytes
    await load_and_close(folder, gpus=[10, 0], draft_gpus=[0, 4], draft_model_id=str(folder))
    draft, model = ground.loads
    assert draft["how"] == "manual"
    assert draft["gpu_split"][0] == 0
    assert 0 < draft["gpu_split"][1] < 4
    assert model["reserve_vram"] == [free - 10**10, free]


def test_a_cache_that_does_not_fit_is_told_of(ground: Ground, tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    ground.free_bytes = 300 * 2**20
    with pytest.raises(NotEnoughMemory, match="too little memory"):
        exllamav2.load(spec(folder, cache_size=2**22), folder)
    assert ground.unloads == 1


def test_all_ways_to_say_that_memory_is_too_small_are_understood(tmp_path: Path) -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("Insufficient VRAM for model and cache"),
        AssertionError("Insufficient space in device allocation"),
    ):
        with pytest.raises(NotEnoughMemory, match=r"VRAM|out of memory|space"), naming(tmp_path):
            raise error


def test_an_error_without_words_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="AssertionError"), naming(tmp_path):
        raise AssertionError


def test_what_it_prints_goes_into_the_log(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO), prints_in_log():
        print(" ## Warning: something\n\n", end="")
    assert caplog.messages == ["## Warning: something"]
    assert capsys.readouterr().out == ""


def test_another_vocabulary_for_the_draft_model_is_refused(ground: Ground, tmp_path: Path) -> None:
    folders = []
    for name in ("model", "draft"):
        (tmp_path / name).mkdir()
        folders.append(save_folder(tmp_path / name))
    described = json.loads((folders[1] / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folders[1] / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(InvalidConfig, match="another vocabulary"):
        exllamav2.load(spec(folders[0], draft_model_id=str(folders[1])), folders[0])


def model_to_split(**changes: Any) -> Any:
    language = SimpleNamespace(supports_tp=True, swa=False, alternating_swa=False)
    values = {
        "architecture": "LlamaForCausalLM",
        "arch": SimpleNamespace(lm=language),
        "num_experts": None,
        "use_qk_norm": False,
        "sliding_window": 0,
        "intermediate_size": 1280,
        **changes,
    }
    for name in ("supports_tp", "alternating_swa"):
        if name in values:
            setattr(language, name, values.pop(name))
    return SimpleNamespace(**values)


def test_layers_that_it_can_split_are_split() -> None:
    check_tensor_parallel(model_to_split(sliding_window=4096), "exl2", is_paged=True)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"supports_tp": False}, "LlamaForCausalLM"),
        ({"num_experts": 8}, "experts"),
        ({"use_qk_norm": True}, "norms"),
        ({"sliding_window": 4096, "alternating_swa": True}, "window"),
        ({"intermediate_size": 1000}, "128"),
    ],
)
def test_layers_that_it_would_split_wrongly_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidConfig, match=f"`tp` is true.*{problem}"):
        check_tensor_parallel(model_to_split(**changes), "exl2", is_paged=True)


def test_only_exl2_weights_are_split_and_only_with_flash_attention() -> None:
    for method in ("gptq", None):
        with pytest.raises(InvalidConfig, match="EXL2"):
            check_tensor_parallel(model_to_split(), method, is_paged=True)
    with pytest.raises(InvalidConfig, match="flash-attn"):
        check_tensor_parallel(model_to_split(), "exl2", is_paged=False)


async def test_without_flash_attention_there_is_one_slot_and_a_warning(
    ground: Ground, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await load_and_close(save_folder(tmp_path), backend_extra_args={"flash_attn": False})
    assert "one request at a time" in caplog.text


async def test_a_cache_smaller_than_a_step_is_loaded(ground: Ground, folder: Path) -> None:
    async with loaded(ground, folder, max_seq_len=300, cache_size=512) as engine:
        prompt = make_prompts(1)[0][:250]
        [answer] = await generate_all(engine, [prompt], max_tokens=50)
        assert [answer.text] == expected(ground, engine, [prompt], 50)


@pytest.mark.parametrize(("max_seq_len", "is_computed"), [(1016, True), (1017, False)])
def test_texts_longer_than_a_sliding_window_need_flash_attention(max_seq_len: int, is_computed: bool) -> None:
    asked = ModelSpec.model_validate({"model_id": "m", "backend": "exllamav2", "max_seq_len": max_seq_len})
    sizes = choose_sizes(asked, read_options(asked), Rotations(trained_length=8192), paged=False)
    model = model_to_split(sliding_window=1024, alternating_swa=True)
    check_sliding_window(model, sizes, is_paged=True)
    check_sliding_window(model_to_split(sliding_window=1024), sizes, is_paged=False)
    with nullcontext() if is_computed else pytest.raises(InvalidConfig, match="to 1016 at most"):
        check_sliding_window(model, sizes, is_paged=False)
