"""What a path leads to, and which engine loads it."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gallama.catalog import resolve_model
from gallama.catalog.memory_need import TORCH_PROCESS_BYTES, estimate_memory
from gallama.catalog.model_files import quantization_of
from gallama.catalog.safetensors_files import read_tensors
from gallama.config import ServerConfig, parse_model_argument
from gallama.errors import InvalidConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as Hugging Face has them, as far as it is looked at before it is loaded."""
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"x" * 1000)
    return path


def quantized(folder: Path, *tensors: str, files: Mapping[str, Any] | None = None, **said: Any) -> Path:
    """The folder with tensors of these names, and a config that says this of how it is quantized."""
    save_file({name: np.zeros(4, np.float16) for name in tensors}, folder / "model.safetensors")
    config = {"quantization_config": said} if said else {}
    for name, content in {"config.json": config, **(files or {})}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def write_head(file: Path, head: bytes) -> None:
    """A safetensors file without tensors."""
    file.write_bytes(len(head).to_bytes(8, "little") + head)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF")
    return path


def backend_of(path: Path, **values: Any) -> str:
    model = resolve_model({"model_id": str(path), **values}, ServerConfig())
    assert model.path == path
    return model.spec.backend


@pytest.mark.parametrize(
    ("values", "backend"),
    [
        ({}, "transformers"),
        ({"backend": "transformers"}, "transformers"),
        ({"model_type": "embedding"}, "embedding"),
        ({"backend": "embedding"}, "embedding"),
    ],
)
def test_the_engine_for_a_folder(folder: Path, values: dict[str, str], backend: str) -> None:
    assert backend_of(folder, **values) == backend


@pytest.mark.parametrize(
    "values", [{}, {"backend": "llama_cpp"}, {"model_type": "embedding"}, {"backend": "embedding"}]
)
def test_the_engine_for_a_gguf_file(gguf: Path, values: dict[str, str]) -> None:
    assert backend_of(gguf, **values) == "llama_cpp"


def test_a_folder_with_a_gguf_file_is_that_file(folder: Path, gguf: Path) -> None:
    file = gguf.rename(folder / gguf.name)
    assert resolve_model({"model_id": str(folder)}, ServerConfig()).path == file


def test_an_engine_that_cannot_load_it_is_refused(folder: Path, gguf: Path) -> None:
    with pytest.raises(
        InvalidConfig, match=r"llama_cpp cannot load a folder without a GGUF file.*transformers"
    ):
        backend_of(folder, backend="llama_cpp")
    with pytest.raises(InvalidConfig, match=r"transformers cannot load a GGUF file.*llama_cpp"):
        backend_of(gguf, backend="transformers")


EXL3: dict[str, Any] = {"quant_method": "exl3", "bits": 4.0}
EXL2: dict[str, Any] = {"quant_method": "exl2", "bits": 4.65}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4}
GPTQ_OF_8_BITS: dict[str, Any] = {"quant_method": "gptq", "bits": 8}
AWQ: dict[str, Any] = {"quant_method": "AWQ", "bits": 4}


@pytest.mark.parametrize(
    ("said", "method"),
    [(EXL3, "exl3"), (EXL2, "exl2"), (GPTQ, "gptq"), (AWQ, "awq"), ({"quant_method": 7}, None)],
)
def test_how_weights_are_quantized_stands_in_the_config(
    folder: Path, said: dict[str, Any], method: str | None
) -> None:
    assert quantization_of(quantized(folder, "model.norm.weight", **said)) == method


@pytest.mark.parametrize(
    ("tensors", "files", "method"),
    [
        (["a.up_proj.trellis", "a.up_proj.suh"], {}, "exl3"),
        (["a.up_proj.q_weight", "a.up_proj.q_scale"], {}, "exl2"),
        (["a.up_proj.qweight", "a.up_proj.g_idx"], {}, "gptq"),
        (["a.up_proj.qweight"], {"quantize_config.json": {"bits": 4}}, "gptq"),
        (["a.up_proj.qweight"], {}, None),
        (["a.up_proj.weight", "trellis"], {}, None),
    ],
)
def test_where_no_config_says_it_names_of_tensors_do(
    folder: Path, tensors: list[str], files: dict[str, Any], method: str | None
) -> None:
    assert quantization_of(quantized(folder, *tensors, files=files)) == method


@pytest.mark.parametrize(
    "head", [b"", b"\xff" * 100, b"\x02" + b"\0" * 7 + b"[]", b"\x04" + b"\0" * 7 + b"{}"]
)
def test_a_file_that_is_none_tells_nothing(folder: Path, head: bytes) -> None:
    (folder / "model.safetensors").write_bytes(head)
    assert quantization_of(folder) is None


@pytest.mark.parametrize("note", ["", '},"a.trellis":{"dtype":"F16","data_offsets":[0,1]},' * 10_000])
def test_of_a_long_head_each_tensor_is_read_once(folder: Path, note: str) -> None:
    rng = random.Random(7)
    sizes = {f"{number}.{rng.choice(['weight', '},', 'é'])}": rng.randrange(99) for number in range(20_000)}
    members: dict[str, Any] = {
        name: {"dtype": "F16", "shape": [size], "data_offsets": [100, 100 + size]}
        for name, size in sizes.items()
    }
    head = {"__metadata__": {"note": note}, **members}
    for separators in ((",", ":"), (", ", ": ")):
        write_head(folder / "model.safetensors", json.dumps(head, separators=separators).encode() + b"   ")
        assert [(name, tensor.stored_bytes) for name, tensor in read_tensors(folder)] == list(sizes.items())


@pytest.mark.parametrize("end", [b"", b"}}", b",}", b'},"b":{}'])
def test_a_long_head_that_is_broken_at_its_end_tells_nothing(folder: Path, end: bytes) -> None:
    tensors = {f"{number}.trellis": {"dtype": "F16", "data_offsets": [0, 2]} for number in range(20_000)}
    head = json.dumps(tensors, separators=(",", ":")).encode()
    write_head(folder / "model.safetensors", head[:-1] + end)
    assert quantization_of(folder) is None


def test_measures_that_no_tensor_has_tell_nothing(folder: Path) -> None:
    head = {"a.trellis": {"dtype": "F16", "shape": [4], "data_offsets": [0, -8]}}
    write_head(folder / "model.safetensors", json.dumps(head).encode())
    assert quantization_of(folder) is None


def test_heads_that_are_nested_deeply_tell_nothing(folder: Path) -> None:
    write_head(folder / "model.safetensors", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    assert quantization_of(folder) is None


def test_heads_that_no_model_has_are_not_read(folder: Path) -> None:
    write_head(folder / "model.safetensors", b"{}" + b" " * 2**24)
    with pytest.raises(InvalidConfig, match=r"model\.safetensors: its head has 16777218 bytes"):
        quantization_of(folder)


def test_many_long_heads_are_not_read_to_their_end(folder: Path) -> None:
    write_head(folder / "model.safetensors", b"{}" + b" " * (2**24 - 2))
    for number in range(4):
        os.link(folder / "model.safetensors", folder / f"model-{number}.safetensors")
    with pytest.raises(InvalidConfig, match="have more than 67108864 bytes"):
        quantization_of(folder)


def test_thousands_of_files_are_refused(folder: Path) -> None:
    for number in range(4096):
        os.link(folder / "model.safetensors", folder / f"model-{number}.safetensors")
    with pytest.raises(InvalidConfig, match="has 4097 files of weights; 4096 are the most"):
        quantization_of(folder)


@pytest.mark.parametrize("name", ["more.safetensors", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("embeds", [False, True])
def test_a_file_that_a_reader_would_wait_for_is_refused(folder: Path, name: str, embeds: bool) -> None:
    os.mkfifo(folder / name)
    with pytest.raises(InvalidConfig, match=f"{re.escape(name)} is no regular file"):
        backend_of(folder, model_type="embedding" if embeds else "llm")


def test_a_link_that_leads_nowhere_is_named(folder: Path) -> None:
    (folder / "more.safetensors").symlink_to(folder / "blobs" / "1234")
    with pytest.raises(InvalidConfig, match=r"more\.safetensors is a link that leads nowhere"):
        quantization_of(folder)


def test_a_config_that_is_nested_deeply_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 10_000 + "1" + "}" * 10_000)
    with pytest.raises(InvalidConfig, match=r"config\.json is nested too deeply"):
        backend_of(folder)


def test_what_is_not_looked_at_in_a_config_may_be_long(folder: Path) -> None:
    said: dict[str, Any] = {
        "quant_method": "exl3",
        "modules": [f"model.layers.{number}" for number in range(100_000)],
    }
    assert backend_of(quantized(folder, "a.trellis", **said)) == "exllamav3"


@pytest.mark.parametrize("method", ["exl3\x1b[2J", "exl3\n", "e" * 41, "e" * 2**19])
def test_how_weights_are_quantized_is_a_name(folder: Path, method: str) -> None:
    with pytest.raises(InvalidConfig, match=r"config\.json: `quant_method` is ") as refused:
        backend_of(quantized(folder, "a.weight", quant_method=method))
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 500


@pytest.mark.parametrize("config", ["[]", "{", '{"a": 1} x', "\udc80"])
def test_a_config_that_is_no_object_is_refused(folder: Path, config: str) -> None:
    (folder / "config.json").write_bytes(config.encode(errors="surrogateescape"))
    with pytest.raises(InvalidConfig, match=r"config\.json (is no JSON|must be a JSON object)"):
        backend_of(folder)


@pytest.mark.parametrize(
    ("said", "backend"),
    [
        (EXL3, "exllamav3"),
        (EXL2, "exllamav2"),
        (GPTQ, "exllamav2"),
        (GPTQ_OF_8_BITS, "transformers"),
        (AWQ, "transformers"),
        ({}, "transformers"),
    ],
)
def test_the_engine_for_weights_that_are_quantized(folder: Path, said: dict[str, Any], backend: str) -> None:
    assert backend_of(quantized(folder, "model.norm.weight", **said)) == backend


def test_an_older_gptq_folder_says_its_bits_in_a_file_of_their_own(folder: Path) -> None:
    tensors = ("a.qweight", "a.g_idx")
    assert backend_of(quantized(folder, *tensors, files={"quantize_config.json": {"bits": 4}})) == "exllamav2"
    eight = quantized(folder, *tensors, files={"quantize_config.json": {"bits": 8}})
    assert backend_of(eight) == "transformers"


@pytest.mark.parametrize(
    ("said", "backend"),
    [
        ({}, "exllama"),
        ({}, "exllamav3"),
        (GPTQ, "exllama"),
        (GPTQ, "transformers"),
        (EXL3, "exllamav3"),
        ({"quant_method": "fp8"}, "exllamav3"),
    ],
)
def test_an_engine_that_is_asked_for_by_name(folder: Path, said: dict[str, Any], backend: str) -> None:
    path = quantized(folder, "model.norm.weight", **said)
    assert backend_of(path, backend=backend) == ("exllamav2" if backend == "exllama" else backend)


@pytest.mark.parametrize(
    ("said", "backend", "explanation"),
    [
        (
            EXL3,
            "exllama",
            "exllamav2 cannot load a folder of EXL3 weights; leave `backend` out, or use exllamav3",
        ),
        (EXL2, "exllamav3", "exllamav3 cannot load a folder of EXL2 weights.*use exllamav2"),
        (GPTQ, "exllamav3", "a folder of GPTQ weights of 4 bits.*use exllamav2 or transformers"),
        (GPTQ_OF_8_BITS, "exllama", "a folder of GPTQ weights of 8 bits.*use transformers"),
        (AWQ, "exllama", "a folder of AWQ weights.*use transformers"),
        (AWQ, "exllamav3", "a folder of AWQ weights.*use transformers"),
        (EXL3, "transformers", "a folder of EXL3 weights.*use exllamav3"),
    ],
)
def test_an_engine_that_cannot_load_the_weights_is_refused_by_the_name_of_one_that_can(
    folder: Path, said: dict[str, Any], backend: str, explanation: str
) -> None:
    with pytest.raises(InvalidConfig, match=explanation):
        backend_of(quantized(folder, "model.norm.weight", **said), backend=backend)


def test_a_draft_model_may_be_a_folder_that_the_models_engine_loads(folder: Path, gguf: Path) -> None:
    quantized(folder, "model.norm.weight", **EXL3)
    spec = resolve_model(
        {"model_id": str(folder), "draft_model_id": str(folder), "draft_cache_quant": "Q6"}, ServerConfig()
    ).spec
    assert (spec.draft_model_id, spec.draft_model_name) == (str(folder), "tiny")
    with pytest.raises(InvalidConfig, match=r"loaded by exllamav3, which cannot load a GGUF file"):
        resolve_model({"model_id": str(folder), "draft_model_id": str(gguf)}, ServerConfig())
    with pytest.raises(
        InvalidConfig, match=r"loaded by llama_cpp, which cannot load a folder of EXL3 weights"
    ):
        resolve_model({"model_id": str(gguf), "draft_model_id": str(folder)}, ServerConfig())


@pytest.mark.parametrize(
    "argument",
    [
        "model_id={folder} backend=exLlama",
        "model_id={folder} gpus=22,22,10,0",
        "model_id={folder} cache_size=4096 cache_quant=Q6",
        "model_id={folder} draft_model_id={folder} draft_gpus=10,10 draft_cache_quant=Q4",
    ],
)
def test_the_ways_in_which_users_of_exllama_start_a_model_lead_to_it(folder: Path, argument: str) -> None:
    quantized(folder, "model.norm.weight", **EXL2)
    values = parse_model_argument(argument.format(folder=folder))
    assert resolve_model(values, ServerConfig()).spec.backend == "exllamav2"


@pytest.mark.parametrize("values", [{"tp": True}, {"cache_quant": "Q6"}, {"speculative": "ngram"}])
def test_what_the_engine_that_is_found_has_not_is_refused(folder: Path, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=r"model '.*tiny': .*the backend transformers"):
        backend_of(folder, **values)
    assert backend_of(quantized(folder, "model.norm.weight", **EXL3), **values) == "exllamav3"


@pytest.mark.parametrize("values", [{"gpus": "0,0"}, {"draft_gpus": [0]}])
def test_an_engine_for_gpus_does_not_go_without_one(folder: Path, values: dict[str, Any]) -> None:
    model = {"draft_model_id": str(folder), **values}
    quantized(folder, "model.norm.weight", **EXL3)
    for backend in ("auto", "exllamav3"):
        with pytest.raises(InvalidConfig, match="gpus` hides all GPUs, and the backend exllamav3"):
            backend_of(folder, backend=backend, **model)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"holds no model: it has no GGUF file, and no config\.json"):
        backend_of(tmp_path)


def test_the_memory_of_a_folder_is_that_of_its_weights_and_of_torch(folder: Path) -> None:
    need = estimate_memory(resolve_model({"model_id": str(folder)}, ServerConfig()))
    assert (need.model.weight_bytes, need.gpu_bytes) == (1000, 1000)
    assert need.host_bytes == 1000 + TORCH_PROCESS_BYTES
