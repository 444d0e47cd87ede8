"""The config file of LLM-API as our settings, for `gallama serve --llm-api-config FILE`.

models_dir: /models
model_family: llama
setup_params: {repo_id: user/repo_id, filename: model.gguf}
model_params: {n_ctx: 512}

Variables named LLM_API_<KEY> go over the file; those of the two mappings are JSON, and go over them key by
key. What cannot be honoured is refused; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, Field, ValidationInfo, field_validator

from gallama.config.model_spec import ConfigModel, Count, Number, Text, Tokens
from gallama.config.problems import KeyPath, explain_unknown_key, validated
from gallama.config.yaml_lines import line_of, read_yaml
from gallama.errors import InvalidConfig

PREFIX = "LLM_API_"
EMBEDDINGS_SUFFIX = "-embeddings"
"""Behind the model's name: what makes vectors of texts."""

_LLAMA_FAMILIES = ("llama", "alpaca", "vicuna")
_FAMILIES_NOT_SERVED = {"autoawq": "AWQ files need a backend that is not in this version"}
_FAMILIES = (*_LLAMA_FAMILIES, "gptq_llama", "huggingface")
_MAPPINGS = ("setup_params", "model_params")

# What LLM-API takes where its config is silent; LLM-API hands them to the library whatever the file says.
_OLD_ROPE_FREQ_BASE = 10000.0
_OLD_ROPE_FREQ_SCALE = 1.0
_LLAMA_SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1}
# The transformers library takes the likeliest token unless a request says `do_sample`.
_TRANSFORMERS_SAMPLING = {"temperature": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmApiConfig:
    """What an LLM-API server would have served."""

    model: Mapping[str, Any]
    """Keys of `ModelSpec`."""
    embeddings: Mapping[str, Any] | None
    """The same of the model that makes the vectors: the same file once more. None: it can make none."""
    server: Mapping[str, object]
    """The settings of the server that are given: host and port."""


def read_llm_api_config(path: Path, environment: Mapping[str, str]) -> LlmApiConfig:
    """
    Raises:
        InvalidConfig: the file or a variable is wrong or asks for what cannot be had, or the model is not
            there.
    """
    source = _Source(path, environment)
    settings = validated(_Settings, source.values, source.locate)
    if settings.model_family in _LLAMA_FAMILIES:
        return _of_llama(settings, source)
    if settings.model_family == "gptq_llama":
        return _of_gptq(settings, source)
    return _of_huggingface(settings, source)


class _Source:
    """The file with the variables over it; knows where each value comes from."""

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        self.path = path
        content, self._lines = read_yaml(path, "LLM-API config file")
        if not isinstance(content, dict | None):
            raise InvalidConfig(f"{path}: must be a mapping of keys to values, not {type(content).__name__}")
        self._variables = _read_variables(environment)
        self.values = _layered(content or {}, self._variables)

    def locate(self, keys: KeyPath) -> str:
        """ "FILE, line 2, `model_params.n_ctx`", or the variable that has the value."""
        name = ".".join(map(str, keys))
        if self._is_from_variable(keys):
            return f"environment variable {PREFIX}{str(keys[0]).upper()}, `{name}`"
        place = f"{self.path}, line {line_of(keys, self._lines)}"
        return f"{place}, `{name}`" if name else place

    def problem(self, explanation: str, *keys: str) -> InvalidConfig:
        return InvalidConfig(f"{self.locate(keys)}: {explanation}", param=".".join(keys))

    def _is_from_variable(self, keys: KeyPath) -> bool:
        given: Any = self._variables
        for key in keys[:2]:
            if not isinstance(given, Mapping) or key not in given:
                return False
            given = given[key]
        return bool(keys)


def _read_variables(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings that variables give, by key."""
    names = {f"{PREFIX}{key}".upper(): key for key in _Settings.model_fields}
    given = {name.upper(): text for name, text in environment.items() if name.upper().startswith(PREFIX)}
    for name in given:
        if name not in names:
            raise InvalidConfig(f"environment: {explain_unknown_key(name, names)}")
    return {names[name]: _read_variable(name, names[name], text) for name, text in given.items()}


def _read_variable(name: str, key: str, text: str) -> Any:
    if key not in _MAPPINGS:
        return text
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InvalidConfig(f'environment variable {name}: must be a JSON object, as in {{"n_ctx": 512}}')
    return values


def _layered(file: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    layered = {**file, **variables}
    for key in _MAPPINGS:
        below, above = file.get(key), variables.get(key)
        if isinstance(below, Mapping) and above is not None:
            layered[key] = {**below, **above}
    return layered


def _absent_as_empty(value: object) -> object:
    return {} if value is None else value


Parameters = Annotated[Mapping[str, Any], BeforeValidator(_absent_as_empty)]


class _Settings(ConfigModel):
    models_dir: Path = Path("models")
    model_family: Text
    model_name: Text | None = None
    setup_params: Parameters = Field(default={})
    model_params: Parameters = Field(default={})
    host: Text | None = None
    port: Annotated[Count, Field(le=65535)] | None = None
    log_level: Text | None = None

    @field_validator("model_family")
    @classmethod
    def _check_family(cls, family: str) -> str:
        if family in _FAMILIES_NOT_SERVED:
            way_out = "take the model as a GGUF file, with `model_family: llama`"
            raise ValueError(f"{_FAMILIES_NOT_SERVED[family]}; {way_out}")
        if family not in _FAMILIES:
            raise ValueError(f"there is no family {family!r}; use one of: {', '.join(_FAMILIES)}")
        return family

    @field_validator("log_level")
    @classmethod
    def _check_log_level(cls, level: str | None) -> str | None:
        if level is not None and level.lower() != "info":
            raise ValueError("leave it out; `gallama serve -v` logs more")
        return level


_NO_LORA = "LoRA adapters are not in this version: merge it into the model's file"
_CONVERT = "convert the model to GGUF before, with llama.cpp's convert_hf_to_gguf.py"
_CHOOSE_GPU = (
    "start gallama with CUDA_VISIBLE_DEVICES, or say `gpus` in a model_config.yaml, and leave this out"
)
_WITHOUT_EFFECT: Mapping[str, tuple[tuple[object, ...], str]] = {
    "convert": ((None, False), _CONVERT),
    "migrate": ((None, False), _CONVERT),
    "n_parts": ((None, -1), "a GGUF file knows its parts: leave it out"),
    "seed": ((None, -1), "send `seed` in the `params` of each request instead"),
    "last_n_tokens_size": ((None, 64), "repetition counts in all of prompt and answer: leave it out"),
    "lora_base": ((None,), _NO_LORA),
    "lora_path": ((None,), _NO_LORA),
    "low_vram": ((None, False), "in a model_config.yaml, `backend_extra_args.offload_kqv: false` does this"),
    "tensor_split": ((None,), "in a model_config.yaml, `gpus` says how much goes to each GPU"),
    "verbose": ((None, True, False), "`gallama serve -v` logs more: leave it out"),
    "wbits": ((None, 4), "exllamav2 reads GPTQ of 4 bits only: take the model as a GGUF file"),
    "cuda_visible_devices": ((None, "0", 0), _CHOOSE_GPU),
    "device": ((None, "cuda", "cuda:0"), _CHOOSE_GPU),
}
"""Keys that are read for the sake of the values that change nothing, and what to do for another value."""


class _Parameters(ConfigModel):
    @field_validator("*", mode="before")
    @classmethod
    def _refuse_what_is_not_honoured(cls, value: object, info: ValidationInfo) -> object:
        name = str(info.field_name)
        if name not in _WITHOUT_EFFECT:
            return value
        honoured, way_out = _WITHOUT_EFFECT[name]
        if not any(type(value) is type(each) and value == each for each in honoured):
            raise ValueError(f"{value!r} cannot be honoured; {way_out}")
        return value


class _LlamaSetup(_Parameters):
    repo_id: Text | None = None
    filename: Text
    convert: Any = None
    migrate: Any = None


class _LlamaParameters(_Parameters):
    n_ctx: Tokens | None = Field(None, validation_alias=AliasChoices("n_ctx", "ctx_size"))
    n_threads: Count | None = Field(None, validation_alias=AliasChoices("n_threads", "num_threads"))
    n_batch: Count | None = Field(None, validation_alias=AliasChoices("n_batch", "batch_size"))
    n_gpu_layers: int | None = None
    use_mmap: bool | None = None
    rope_freq_base: Number | None = None
    rope_freq_scale: Number | None = None
    n_parts: Any = None
    seed: Any = None
    last_n_tokens_size: Any = None
    lora_base: Any = None
    lora_path: Any = None
    low_vram: Any = None
    tensor_split: Any = None
    verbose: Any = None


class _GptqSetup(_Parameters):
    repo_id: Text
    filename: Text


class _GptqParameters(_Parameters):
    # The file says it of each weight.
    group_size: int | None = None
    wbits: Any = None
    cuda_visible_devices: Any = None
    device: Any = None


class _HuggingfaceSetup(_Parameters):
    repo_id: Text
    tokenizer_repo_id: Text | None = None
    trust_remote_code: bool = False
    config_params: Parameters = Field(default={})


class _HuggingfaceParameters(_Parameters):
    device_map: str | int | dict[str, str | int] | None = None
    torch_dtype: Text | None = None
    trust_remote_code: bool = False


def _of_llama(settings: _Settings, source: _Source) -> LlmApiConfig:
    setup = validated(_LlamaSetup, settings.setup_params, _inside(source, "setup_params"))
    parameters = validated(_LlamaParameters, settings.model_params, _inside(source, "model_params"))
    folder = _models_folder(settings, source)
    path = _first_there(_llama_files(folder, settings, setup), setup.filename, source)
    rope_base, rope_scale = parameters.rope_freq_base, parameters.rope_freq_scale
    arguments = {
        "n_threads": parameters.n_threads,
        "n_batch": parameters.n_batch,
        "n_gpu_layers": parameters.n_gpu_layers,
        "use_mmap": parameters.use_mmap,
        # A GGUF file knows its own, which LLM-API's defaults would spoil.
        "rope_freq_base": None if rope_base == _OLD_ROPE_FREQ_BASE else rope_base,
        "rope_freq_scale": None if rope_scale == _OLD_ROPE_FREQ_SCALE else rope_scale,
    }
    name = settings.model_name or Path(setup.filename).stem
    values = {
        "model_id": str(path),
        "max_seq_len": parameters.n_ctx,
        "backend_extra_args": _given(arguments),
    }
    return _both(name, values, _LLAMA_SAMPLING, _given(arguments), settings)


def _of_gptq(settings: _Settings, source: _Source) -> LlmApiConfig:
    setup = validated(_GptqSetup, settings.setup_params, _inside(source, "setup_params"))
    validated(_GptqParameters, settings.model_params, _inside(source, "model_params"))
    if not setup.filename.endswith(".safetensors"):
        raise source.problem(
            "exllamav2 loads safetensors files only: take the model as one, which most authors offer, too",
            "setup_params",
            "filename",
        )
    folders = _gptq_folders(_models_folder(settings, source), setup)
    file = _first_there((folder / setup.filename for folder in folders), setup.filename, source)
    others = sorted(other.name for other in file.parent.glob("*.safetensors") if other != file)
    if others:
        raise source.problem(
            f"beside {file} there is {others[0]}, and exllamav2 loads all weights of a folder: move one away",
            "setup_params",
            "filename",
        )
    name = settings.model_name or Path(setup.repo_id).name
    values = {"model_id": str(file.parent), "backend": "exllamav2"}
    return replace(_both(name, values, _LLAMA_SAMPLING, {}, settings), embeddings=None)


def _of_huggingface(settings: _Settings, source: _Source) -> LlmApiConfig:
    setup = validated(_HuggingfaceSetup, settings.setup_params, _inside(source, "setup_params"))
    parameters = validated(_HuggingfaceParameters, settings.model_params, _inside(source, "model_params"))
    if setup.tokenizer_repo_id not in (None, setup.repo_id):
        raise source.problem(
            "the tokenizer must be in the model's own folder: put it there, and leave this out",
            "setup_params",
            "tokenizer_repo_id",
        )
    folder = _models_folder(settings, source)
    path = _first_there(_huggingface_folders(folder, setup.repo_id), setup.repo_id, source)
    arguments = {
        "device_map": parameters.device_map,
        "dtype": None if parameters.torch_dtype is None else parameters.torch_dtype.removeprefix("torch."),
        "trust_remote_code": setup.trust_remote_code or parameters.trust_remote_code or None,
        "config_params": setup.config_params or None,
    }
    values = {"model_id": str(path), "backend_extra_args": _given(arguments)}
    name = settings.model_name or Path(setup.repo_id).name
    for_embedder = {
        key: value for key, value in _given(arguments).items() if key in ("dtype", "trust_remote_code")
    }
    return _both(name, values, _TRANSFORMERS_SAMPLING, for_embedder, settings)


def _inside(source: _Source, mapping: str) -> Callable[[KeyPath], str]:
    return lambda keys: source.locate((mapping, *keys))


def _both(
    name: str,
    values: Mapping[str, Any],
    sampling: Mapping[str, Any],
    embedder_arguments: Mapping[str, Any],
    settings: _Settings,
) -> LlmApiConfig:
    """The model that writes, and beside it the same one for vectors."""
    shared = _given(values)
    return LlmApiConfig(
        model={**shared, "model_name": name, "default_sampling": sampling},
        embeddings={
            **shared,
            "model_name": f"{name}{EMBEDDINGS_SUFFIX}",
            "model_type": "embedding",
            "backend_extra_args": embedder_arguments,
        },
        server=_given({"host": settings.host, "port": settings.port}),
    )


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _models_folder(settings: _Settings, source: _Source) -> Path:
    # pathlib's own raises an error for a user that there is not.
    return source.path.absolute().parent / os.path.expanduser(settings.models_dir)


def _first_there(places: Iterable[Path], what: str, source: _Source) -> Path:
    """
    Raises:
        InvalidConfig: nothing is there.
    """
    looked_at = list(dict.fromkeys(places))
    for place in looked_at:
        if place.exists():
            return place
    listing = ", ".join(map(str, looked_at))
    raise source.problem(
        f"{what} is not there; looked for: {listing}. Nothing is downloaded: put it in one of these places",
        "setup_params",
    )


def _llama_files(folder: Path, settings: _Settings, setup: _LlamaSetup) -> Iterator[Path]:
    """Where the file may be: as its author has it, and where LLM-API's versions put what they downloaded."""
    yield folder / setup.filename
    if setup.repo_id is not None:
        yield folder / setup.repo_id / setup.filename
        yield folder / Path(setup.repo_id).name / setup.filename
    yield folder / _llm_api_folder(settings.model_family, setup.filename) / setup.filename
    if settings.model_name is not None:
        yield folder / f"ggml-{settings.model_family}-{settings.model_name}-q4.bin"


def _gptq_folders(folder: Path, setup: _GptqSetup) -> Iterator[Path]:
    """Where the file and its config.json may be: plain, or where LLM-API put what it downloaded."""
    for parent in (folder, folder / "gptq"):
        yield parent / setup.repo_id
        yield parent / Path(setup.repo_id).name
    yield folder / _llm_api_folder("gptq_llama", setup.filename)


def _huggingface_folders(folder: Path, repo_id: str) -> Iterator[Path]:
    """Where the model's folder may be: plain, or in a cache of Hugging Face's form."""
    yield folder / repo_id
    yield folder / Path(repo_id).name
    in_cache = f"models--{repo_id.replace('/', '--')}"
    for cache in (folder / _llm_api_folder("huggingface", repo_id) / in_cache, folder / in_cache):
        yield cache / "snapshots" / _main_revision(cache)


def _main_revision(cache: Path) -> str:
    try:
        return (cache / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return "main"


def _llm_api_folder(family: str, name: str) -> str:
    """The folder that LLM-API made for a model: its family, and the first digits of a digest."""
    digest = hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()
    return f"{family}_{str(int(digest, 16))[:12]}"
