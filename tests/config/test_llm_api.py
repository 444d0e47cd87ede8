from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gallama.config import ModelSpec
from gallama.config.llm_api import LlmApiConfig, read_llm_api_config
from gallama.errors import InvalidConfig

# The examples of LLM-API's own documentation, but for the folder.
SEED = Path(__file__).parents[1] / "data" / "seed_llm_api"
LLAMA = (SEED / "llama.yaml").read_text().replace("/models", "models")
HUGGINGFACE = (SEED / "huggingface.yaml").read_text().replace("/models", "models")
GPTQ = (SEED / "gptq.yaml").read_text().replace("/models", "models")


def put(folder: Path, place: str) -> Path:
    path = folder / "models" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF")
    return path


def read(folder: Path, text: str, **environment: str) -> LlmApiConfig:
    file = folder / "config.yaml"
    file.write_text(text)
    return read_llm_api_config(file, environment)


def read_changed(folder: Path, changes: dict[str, Any]) -> LlmApiConfig:
    """The example for llama with other `model_params`, which stand last in it."""
    others = [line for line in LLAMA.splitlines() if line.strip().partition(":")[0] not in changes]
    return read(folder, "\n".join([*others, *(f"  {key}: {json.dumps(changes[key])}" for key in changes)]))


def test_the_example_for_llama_is_a_spec_for_llama_cpp(tmp_path: Path) -> None:
    path = put(tmp_path, "ggml-model-q4_0.bin")
    spec = ModelSpec.model_validate(read(tmp_path, LLAMA).model)
    assert (spec.model_id, spec.model_name, spec.max_seq_len) == (str(path), "ggml-model-q4_0", 512)
    assert spec.backend_extra_args == {
        "n_threads": 8,
        "n_batch": 2048,
        "n_gpu_layers": 0,
        "use_mmap": True,
    }
    assert spec.default_sampling.model_dump(exclude_unset=True) == {
        "temperature": 0.8,
        "top_p": 0.95,
        "top_k": 40,
        "repetition_penalty": 1.1,
    }


def test_the_same_file_makes_vectors_under_another_name(tmp_path: Path) -> None:
    put(tmp_path, "ggml-model-q4_0.bin")
    config = read(tmp_path, LLAMA)
    spec = ModelSpec.model_validate(config.embeddings)
    assert (spec.model_type, spec.model_name) == ("embedding", "ggml-model-q4_0-embeddings")
    assert (spec.model_id, spec.max_seq_len) == (config.model["model_id"], 512)


def test_the_example_for_transformers_is_a_spec_for_that_engine(tmp_path: Path) -> None:
    path = put(tmp_path, "user/repo_id/config.json").parent
    config = read(tmp_path, HUGGINGFACE)
    spec = ModelSpec.model_validate(config.model)
    assert (spec.model_id, spec.model_name) == (str(path), "repo_id")
    assert spec.backend_extra_args == {
        "device_map": "cuda:0",
        "dtype": "bfloat16",
        "trust_remote_code": True,
        "config_params": {"init_device": "cuda:0", "attn_config": {"attn_impl": "triton"}},
    }
    assert ModelSpec.model_validate(config.embeddings).model_type == "embedding"


def test_remote_code_is_trusted_only_where_the_config_says_so(tmp_path: Path) -> None:
    put(tmp_path, "user/repo_id/config.json")
    silent = HUGGINGFACE.replace("  trust_remote_code: True\n", "")
    assert "trust_remote_code" not in read(tmp_path, silent).model["backend_extra_args"]


@pytest.mark.parametrize(
    "place", ["user/repo_id", "repo_id", "gptq/user/repo_id", "gptq/repo_id", "gptq_llama_230392754240"]
)
def test_the_example_for_gptq_is_a_spec_for_exllamav2(tmp_path: Path, place: str) -> None:
    file = put(tmp_path, f"{place}/model.safetensors")
    config = read(tmp_path, GPTQ)
    spec = ModelSpec.model_validate(config.model)
    assert (spec.model_id, spec.model_name, spec.backend) == (str(file.parent), "repo_id", "exllamav2")
    assert spec.default_sampling.repetition_penalty == 1.1
    assert config.embeddings is None


@pytest.mark.parametrize(
    ("line", "changed", "explanation"),
    [
        ("wbits: 4", "wbits: 8", r"line 8, `model_params.wbits`: 8 cannot be honoured; .*4 bits only.*GGUF"),
        (
            'devices: "0"',
            'devices: "1"',
            r"cuda_visible_devices`: '1' cannot be honoured; start gallama with",
        ),
        ('"cuda:0"', '"cpu"', r"`model_params.device`: 'cpu' cannot be honoured; .*`gpus`"),
        ("model.safetensors", "model.pt", r"`setup_params.filename`: exllamav2 loads safetensors files only"),
        ("group_size: 128", "group_size: wide", r"`model_params.group_size`: "),
        ("group_size: 128", "groupsize: 128", r"unknown key `groupsize`"),
    ],
)
def test_a_gptq_file_that_exllamav2_cannot_load_so_is_refused_with_a_way_out(
    tmp_path: Path, line: str, changed: str, explanation: str
) -> None:
    put(tmp_path, "repo_id/model.safetensors")
    with pytest.raises(InvalidConfig, match=explanation):
        read(tmp_path, GPTQ.replace(line, changed))


def test_two_gptq_files_in_a_folder_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "repo_id/model.safetensors")
    put(tmp_path, "repo_id/other.safetensors")
    with pytest.raises(InvalidConfig, match=r"there is other\.safetensors, and exllamav2 loads all weights"):
        read(tmp_path, GPTQ)


@pytest.mark.parametrize(
    "place",
    [
        "user/repo_id/ggml-model-q4_0.bin",
        "repo_id/ggml-model-q4_0.bin",
        "llama_601507219781/ggml-model-q4_0.bin",
        "ggml-llama-7b-q4.bin",
    ],
)
def test_the_file_is_found_where_llm_api_and_its_users_put_it(tmp_path: Path, place: str) -> None:
    path = put(tmp_path, place)
    assert read(tmp_path, LLAMA + "model_name: 7b\n").model["model_id"] == str(path)


def test_a_folder_is_found_in_a_cache_of_hugging_faces_form(tmp_path: Path) -> None:
    cache = "huggingface_150403748915/models--mosaicml--mpt-7b"
    put(tmp_path, f"{cache}/refs/main").write_text("0a1b\n")
    path = put(tmp_path, f"{cache}/snapshots/0a1b/config.json").parent
    text = HUGGINGFACE.replace("user/repo_id", "mosaicml/mpt-7b")
    assert read(tmp_path, text).model["model_id"] == str(path)


def test_a_model_that_is_not_there_is_an_error_with_the_places(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig) as raised:
        read(tmp_path, LLAMA)
    assert str(tmp_path / "models" / "user" / "repo_id" / "ggml-model-q4_0.bin") in raised.value.message
    assert "Nothing is downloaded" in raised.value.message


def test_a_home_that_nobody_has_is_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"is not there; looked for: .*~nobody-of-that-name/"):
        read(tmp_path, LLAMA.replace("models_dir: models", "models_dir: ~nobody-of-that-name/models"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", 1337, "send `seed` in the `params` of each request"),
        ("lora_path", "adapter.bin", "merge it"),
        ("tensor_split", [1, 1], "`gpus`"),
        ("low_vram", True, "offload_kqv"),
        ("n_parts", 2, "leave it out"),
        ("last_n_tokens_size", 128, "all of prompt and answer"),
        ("n_ctx", 0, "greater than or equal to 1"),
        ("rope_freq_base", float("nan"), "finite number"),
        ("n_cxt", 512, "Did you mean `n_ctx`"),
    ],
)
def test_what_cannot_be_honoured_is_named(tmp_path: Path, key: str, value: object, words: str) -> None:
    put(tmp_path, "ggml-model-q4_0.bin")
    with pytest.raises(InvalidConfig) as raised:
        read_changed(tmp_path, {key: value})
    assert f"`model_params.{key}`" in raised.value.message
    assert words in raised.value.message


def test_other_frequencies_than_the_old_defaults_are_passed_on(tmp_path: Path) -> None:
    put(tmp_path, "ggml-model-q4_0.bin")
    arguments = read_changed(tmp_path, {"rope_freq_scale": 0.5}).model["backend_extra_args"]
    assert arguments["rope_freq_scale"] == 0.5
    assert "rope_freq_base" not in arguments


def test_older_names_of_parameters_are_read(tmp_path: Path) -> None:
    put(tmp_path, "m.gguf")
    text = "{models_dir: models, model_family: vicuna, setup_params: {filename: m.gguf},"
    config = read(tmp_path, text + "model_params: {ctx_size: 256, num_threads: 2, batch_size: 64}}")
    assert config.model["max_seq_len"] == 256
    assert config.model["backend_extra_args"] == {"n_threads": 2, "n_batch": 64}


def test_variables_go_over_the_file_key_by_key(tmp_path: Path) -> None:
    path = put(tmp_path / "elsewhere", "ggml-model-q4_0.bin")
    config = read(
        tmp_path,
        LLAMA,
        LLM_API_MODELS_DIR=str(path.parent),
        LLM_API_MODEL_PARAMS='{"n_threads": 2}',
        LLM_API_PORT="81",
        LLM_API_HOST="0.0.0.0",
    )
    assert config.model["model_id"] == str(path)
    assert config.model["max_seq_len"] == 512
    assert config.model["backend_extra_args"]["n_threads"] == 2
    assert config.server == {"host": "0.0.0.0", "port": 81}


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("LLM_API_MODEL_PARAMS", "n_ctx=5", "must be a JSON object"),
        (
            "LLM_API_MODEL_PARAMS",
            '{"n_ctx": "x"}',
            "environment variable LLM_API_MODEL_PARAMS, `model_params.n_ctx`",
        ),
        ("LLM_API_MODEL_DIR", "/models", "Did you mean `LLM_API_MODELS_DIR`"),
        ("LLM_API_MODEL_FAMILY", "gpt", "there is no family 'gpt'"),
    ],
)
def test_a_wrong_variable_is_named(tmp_path: Path, variable: str, text: str, words: str) -> None:
    put(tmp_path, "ggml-model-q4_0.bin")
    with pytest.raises(InvalidConfig) as raised:
        read(tmp_path, LLAMA, **{variable: text})
    assert words in raised.value.message
    assert variable in raised.value.message


def test_an_unknown_key_of_the_file_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"config.yaml, line 22, `model_parms`: unknown key"):
        read(tmp_path, LLAMA + "model_parms: {}\n")


def test_parameters_may_be_left_empty(tmp_path: Path) -> None:
    put(tmp_path, "m.gguf")
    config = read(
        tmp_path, "models_dir: models\nmodel_family: llama\nmodel_params:\nsetup_params: {filename: m.gguf}\n"
    )
    assert config.model["backend_extra_args"] == {}


def test_the_document_names_every_key_of_the_examples() -> None:
    document = (Path(__file__).parents[2] / "docs" / "simple_api.md").read_text()
    names = set(re.findall(r"^ *(\w+):", LLAMA + HUGGINGFACE, re.MULTILINE))
    of_one_model = {"init_device", "attn_config", "attn_impl"}
    missing = [
        name for name in names - of_one_model if f"`{name}" not in document and f"{name}:" not in document
    ]
    assert missing == []
