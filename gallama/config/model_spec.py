"""How one model is served: the keys of `-id`, of a model in the config file, and of the worker's order.

The attribute docstrings are the text of the generated config file; see `default_config.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gallama.generation import SamplingSettings

Backend = Literal["auto", "llama_cpp", "exllamav2", "exllamav3", "transformers", "embedding", "scripted"]
ModelType = Literal["llm", "embedding"]
CacheQuant = Literal["FP16", "Q8", "Q6", "Q4"]
Speculative = Literal["off", "draft", "ngram", "auto"]

_ENUMERATIONS: Mapping[str, tuple[str, ...]] = {
    "backend": get_args(Backend),
    "model_type": get_args(ModelType),
    "cache_quant": get_args(CacheQuant),
    "draft_cache_quant": get_args(CacheQuant),
    "speculative": get_args(Speculative),
}
_BACKEND_ALIASES = {
    "exllama": "exllamav2",
    "exl2": "exllamav2",
    "exl3": "exllamav3",
    "llama.cpp": "llama_cpp",
    "llama-cpp": "llama_cpp",
    "llamacpp": "llama_cpp",
}
# Works, but plays a text from its arguments: for tests of everything around an engine.
_UNDOCUMENTED = ("scripted",)

_EXLLAMA = ("exllamav2", "exllamav3")
_ONLY_WITH: Mapping[tuple[str, object], tuple[str, ...]] = {
    ("cache_quant", "Q6"): _EXLLAMA,
    ("draft_cache_quant", "Q6"): _EXLLAMA,
    ("tp", True): _EXLLAMA,
}
"""Values that not every backend that makes text honours, and those that do."""
_BACKENDS_THAT_GUESS_AHEAD = ("llama_cpp", *_EXLLAMA)

_BACKENDS_THAT_EMBED = ("auto", "llama_cpp", "embedding", "scripted")
# Vectors are made in batches: the more requests there are, the fuller these are.
_MAX_CONCURRENT_EMBEDDINGS = 64
ONLY_FOR_TEXT = (
    "cache_size",
    "cache_quant",
    "tp",
    "prompt_template",
    "eos_token_list",
    "default_sampling",
    "speculative",
    "draft_model_id",
)
"""Keys that say nothing to a model that embeds."""

NESTED_KEYS = ("backend_extra_args", "default_sampling")
"""The keys that hold settings of their own: written with a dot in `-id`, overridden one by one."""

_DRAFT_KEYS = ("draft_model_id", "draft_model_name", "draft_gpus", "draft_cache_size", "draft_cache_quant")
SPECULATION_KEYS = ("speculative", *_DRAFT_KEYS, "num_draft_tokens")
"""The keys that must go together: each may be right only beside another."""
# With the token before them, 15 make a step of 16: on a CPU one of 17 takes an eighth longer.
_DRAFT_TOKENS = {"off": 0, "draft": 8, "ngram": 15}
# On GPUs all that is guessed is computed, whatever comes of it; by ngram it costs nothing to guess.
_DRAFT_TOKENS_ON_GPUS: Mapping[str, Mapping[str, int]] = {
    "exllamav2": {"off": 0, "draft": 4, "ngram": 4},
    "exllamav3": {"off": 0, "draft": 4, "ngram": 7},
}

CACHE_PAGE_TOKENS = 256
MAX_TOKENS = 2**30
MAX_GPUS = 64


def allowed_names(key: str) -> list[str]:
    """The documented names for a key; [] for keys that hold no names."""
    return [name for name in _ENUMERATIONS.get(key, ()) if name not in _UNDOCUMENTED]


def layer_values(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `upper` over those of `lower`; settings inside a nested key are merged one by one."""
    layered = {**lower, **upper}
    for key in NESTED_KEYS:
        below, above = lower.get(key), upper.get(key)
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            layered[key] = {**below, **above}
    return layered


def layer_defaults(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values over defaults for all models, of which a model that embeds takes those that concern it."""
    if _embeds(values):
        defaults = {key: value for key, value in defaults.items() if key not in ONLY_FOR_TEXT}
    return layer_values(defaults, values)


def _embeds(values: Mapping[str, Any]) -> bool:
    return "embedding" in (str(values.get(key)).lower() for key in ("backend", "model_type"))


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


def _split_at_commas(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _check_printable(text: object) -> object:
    if isinstance(text, str) and (not text.isprintable() or not text or text != text.strip()):
        raise ValueError("must be printable text without blanks at its ends")
    return text


def _read_gigabytes_per_gpu(value: object) -> object:
    """`auto`, or gigabytes from "22,22,10,0", from a list, or from one number for one GPU."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    parts = _split_at_commas(value)
    parts = list(parts) if isinstance(parts, list | tuple) else [parts]
    try:
        gigabytes = tuple(float(_refuse_bool(part)) for part in parts)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        gigabytes = ()
    in_range = all(math.isfinite(size) and size >= 0 for size in gigabytes)
    if not 1 <= len(gigabytes) <= MAX_GPUS or not in_range:
        raise ValueError(f"must be `auto` or gigabytes per GPU as in 22,22,10,0, not {value!r}")
    return gigabytes


def _check_finite(value: object) -> object:
    """Refuse NaN and infinity at any depth: JSON, which carries the spec to the worker, has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must hold finite numbers only")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_finite(part)
    return value


Text = Annotated[str, BeforeValidator(_check_printable)]
TextList = Annotated[tuple[Text, ...], BeforeValidator(_split_at_commas)]
TokenTexts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_split_at_commas)]
Tokens = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1, le=MAX_TOKENS)]
Count = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0, le=MAX_TOKENS)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]
Gpus = Annotated[Literal["auto"] | tuple[float, ...], BeforeValidator(_read_gigabytes_per_gpu)]
ExtraArguments = Annotated[Mapping[str, JsonValue], BeforeValidator(_check_finite)]


class ConfigModel(BaseModel):
    """What all parts of the configuration share: no unknown keys, no change after reading, finite numbers."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        # A settings object in a log must not drag a key along.
        hide_input_in_errors=True,
    )


class SamplingDefaults(ConfigModel):
    """How a model samples where a request is silent. The ranges are those of a chat request."""

    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None

    def to_settings(self) -> SamplingSettings:
        return SamplingSettings(**self.model_dump())


class ModelSpec(ConfigModel):
    """How one model is served. It crosses from the gateway to the worker as JSON.

    Values that the backend does not honour are refused, not ignored: here, or by the engine when it loads.
    While the backend is `auto`, those are allowed that any honours.
    """

    model_id: Annotated[Text, Field(examples=["/path/to/model.gguf"])]
    """A GGUF file, a folder that holds exactly one, a folder in the form of Hugging Face, or the name of a
    model inside an installed package. A relative path starts at this file's folder.
    Default: the name above."""
    model_name: Annotated[Text | None, Field(examples=["my-model"])] = None
    """The name that clients use. Default: the name above."""
    aliases: Annotated[TextList, Field(examples=[["gpt-4o-mini"]])] = ()
    """More names that clients may use."""
    strict: bool = False
    """Answer only to its exact name and aliases, even when it is the only model."""
    backend: Backend = "auto"
    """The engine. Default: by the kind of file: llama_cpp for GGUF; of folders, exllamav3 for EXL3, exllamav2
    for EXL2 and for GPTQ of 4 bits, embedding (infinity-emb) for a model that embeds, transformers for
    others. exllama is exllamav2."""
    model_type: ModelType = "llm"
    """What the model is for: text (llm), or vectors of texts and rankings of them (embedding)."""
    gpus: Annotated[Gpus, Field(examples=[[22, 22, 10, 0]])] = "auto"
    """Gigabytes to use on each GPU, by index; 0 hides a GPU from the model. As a list or as in 22,22,10,0."""
    max_seq_len: Annotated[Tokens | None, Field(examples=[8192])] = None
    """Tokens that prompt and answer together may have. Default: the model's own limit."""
    cache_size: Annotated[Tokens | None, Field(examples=[32768])] = None
    """Tokens of cache that all running requests share; at least max_seq_len, rounded up to 256.
    Default: the model's own limit."""
    cache_quant: Annotated[CacheQuant | None, Field(examples=["Q8"])] = None
    """How the cache is stored. Q6 only with exllamav2 and exllamav3; with transformers only FP16.
    Default: FP16."""
    max_concurrent_requests: Annotated[Count, Field(ge=1, le=1024)] = 16
    """Requests that one instance answers at the same time. Default: 16; 64 for a model that embeds."""
    queue_limit: Annotated[Count, Field(le=100_000)] = 64
    """Requests that may wait for one instance; more are refused with status 429."""
    queue_token_limit: Annotated[Tokens, Field(examples=[524_288])] = 524_288
    """Prompt tokens, as estimated from their text, that may wait for one instance; more are refused with
    status 429. A request for which nobody waits is taken whatever its size."""
    replicas: Annotated[Count, Field(ge=1, le=64)] = 1
    """Instances of the model, which share its requests."""
    prompt_template: Text = "auto"
    """The dialect of the model's prompts and tool calls. `auto` chooses by the model's own template."""
    eos_token_list: Annotated[TokenTexts, Field(examples=[["<|im_end|>"]])] = ()
    """More tokens that end an answer, as text."""
    default_sampling: Annotated[
        SamplingDefaults, Field(examples=[{"temperature": 0.7, "top_p": 0.95, "top_k": 40}])
    ] = SamplingDefaults()
    """How to sample where a request is silent: temperature, top_p, top_k, min_p, repetition_penalty,
    frequency_penalty, presence_penalty."""
    backend_extra_args: Annotated[ExtraArguments, Field(examples=[{"n_batch": 512}])] = {}
    """Arguments for the engine's loader; it refuses those that it does not know. They stand in
    docs/llama_cpp_settings.md, docs/exllamav2.md, docs/exllamav3.md, docs/transformers.md and
    docs/embeddings.md."""
    python: Annotated[Text | None, Field(examples=["/path/to/venv/bin/python"])] = None
    """The Python interpreter of the worker, for an engine with an environment of its own.
    Default: the one that `gallama setup` has built for the backend, else the server's own."""
    tp: bool = False
    """Split every layer over all GPUs (tensor parallel). Only with exllamav2 and exllamav3."""
    speculative: Speculative | None = None
    """How tokens are guessed ahead, to be checked several at a time: with a draft model, by ngram, which is
    what followed the same words before in prompt and answer, or by auto, the draft model if one is named,
    else ngram. Answers stay the same. Default: draft when a draft model is named, else off."""
    draft_model_id: Annotated[Text | None, Field(examples=["/path/to/small-model.gguf"])] = None
    """The small model that drafts: one with the same vocabulary, named in the ways of model_id, or by its
    name in this file, of which only the file counts."""
    draft_model_name: Annotated[Text | None, Field(examples=["my-small-model"])] = None
    """The draft model's name in logs and errors. Default: that of its section or file."""
    draft_gpus: Annotated[Gpus | None, Field(examples=[[2, 0, 0, 0]])] = None
    """As gpus, for the draft model. Default: as the model."""
    draft_cache_size: Annotated[Tokens | None, Field(examples=[32768])] = None
    """Tokens of the draft model's cache; an answer that does not fit goes on without drafts. With exllamav2
    and exllamav3 it cannot differ from the model's. Default: as many as the model's."""
    draft_cache_quant: Annotated[CacheQuant | None, Field(examples=["Q8"])] = None
    """How the draft model's cache is stored. Default: as the model's."""
    num_draft_tokens: Annotated[Count | None, Field(ge=1, le=64, examples=[8])] = None
    """Tokens to guess in one go, at most; fewer where that is faster.
    Default: 8 with a draft model, 15 with ngram; with exllamav2 4, with exllamav3 4 and 7."""
    reserve_vram: Annotated[Annotated[Number, Field(ge=0)] | None, Field(examples=[1.5])] = None
    """Gigabytes to keep free on each GPU."""
    ttl_seconds: Annotated[Annotated[Number, Field(gt=0)] | None, Field(examples=[600])] = None
    """Unload the model after so many seconds without a request. Default: never."""
    pinned: bool = False
    """Never unload the model to make room for another."""

    @model_validator(mode="before")
    @classmethod
    def _complete_what_embeds(cls, values: Any) -> Any:
        """The backend that only embeds says what the model is for; that changes a default."""
        if not isinstance(values, Mapping) or not _embeds(values):
            return values
        return {
            "model_type": "embedding",
            "max_concurrent_requests": _MAX_CONCURRENT_EMBEDDINGS,
            **values,
        }

    @field_validator(*_ENUMERATIONS, mode="before")
    @classmethod
    def _read_names_in_any_case(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name is not None
        if value is None and info.field_name not in ("backend", "model_type"):
            return None
        names = {name.lower(): name for name in _ENUMERATIONS[info.field_name]}
        wanted = str(value).lower()
        if info.field_name == "backend":
            wanted = _BACKEND_ALIASES.get(wanted, wanted)
        if wanted not in names:
            raise ValueError(f"{value!r} is not allowed; {_way_out(info.field_name)}")
        return names[wanted]

    @field_validator("cache_size")
    @classmethod
    def _fit_cache_to_sequences(cls, cache_size: int | None, info: ValidationInfo) -> int | None:
        if cache_size is None:
            return None
        whole_pages = math.ceil(cache_size / CACHE_PAGE_TOKENS) * CACHE_PAGE_TOKENS
        longest = info.data.get("max_seq_len")
        if longest is not None and whole_pages < longest:
            raise ValueError(f"must be at least max_seq_len ({longest}), not {cache_size}")
        return whole_pages

    @property
    def speculation(self) -> Literal["off", "draft", "ngram"]:
        """How tokens are guessed ahead, all told."""
        if self.speculative is None:
            return "draft" if self.draft_model_id else "off"
        if self.speculative == "auto":
            return "draft" if self.draft_model_id else "ngram"
        return self.speculative

    @property
    def most_draft_tokens(self) -> int:
        """Tokens to guess in one go, at most; 0 where none are."""
        defaults = _DRAFT_TOKENS_ON_GPUS.get(self.backend, _DRAFT_TOKENS)
        return self.num_draft_tokens or defaults[self.speculation]

    @model_validator(mode="after")
    def _check_type(self) -> ModelSpec:
        if self.model_type == "llm":
            if self.backend == "embedding":
                raise ValueError("the backend embedding makes no text; leave `model_type` out")
            return self
        if self.backend not in _BACKENDS_THAT_EMBED:
            raise ValueError(f"the backend {self.backend} does not embed; leave `backend` out")
        fields = type(self).model_fields
        unused = [key for key in ONLY_FOR_TEXT if getattr(self, key) != fields[key].default]
        if unused:
            raise ValueError(f"a model that embeds does not use `{'`, `'.join(unused)}`; leave that out")
        return self

    @model_validator(mode="after")
    def _check_speculation(self) -> ModelSpec:
        speculation = self.speculation
        if speculation == "draft" and not self.draft_model_id:
            raise ValueError("`speculative` is draft, but there is no `draft_model_id`; name a draft model")
        unused = [key for key in _DRAFT_KEYS if getattr(self, key) is not None and speculation != "draft"]
        if self.num_draft_tokens is not None and speculation == "off":
            unused.append("num_draft_tokens")
        if unused:
            raise ValueError(f"`{'`, `'.join(unused)}` would not be used: {self._why_no_draft_model()}")
        self._check_that_drafts_fit_a_batch()
        return self

    def _why_no_draft_model(self) -> str:
        if self.speculation == "off" and self.speculative is None:
            return "there is no `draft_model_id`; name a draft model, or leave them out"
        return f"`speculative` is {self.speculative}; leave them out, or change it"

    def _check_that_drafts_fit_a_batch(self) -> None:
        batch_tokens = str(self.backend_extra_args.get("n_batch", ""))  # what else is wrong, the engine tells
        needed = self.max_concurrent_requests + self.most_draft_tokens
        if self.speculation != "off" and batch_tokens.isdigit() and int(batch_tokens) < needed:
            raise ValueError(
                f"`backend_extra_args.n_batch` is {batch_tokens}, but a batch must hold a token of each"
                f" request (`max_concurrent_requests`: {self.max_concurrent_requests}) and one draft"
                f" (`num_draft_tokens`: {self.most_draft_tokens})"
            )

    @model_validator(mode="after")
    def _check_backend(self) -> ModelSpec:
        problem = None if self.backend == "auto" else why_backend_cannot(self.backend, self)
        if problem is not None:
            raise ValueError(problem)
        return self


def why_backend_cannot(backend: str, spec: ModelSpec) -> str | None:
    """Which of the values a backend does not honour, and what to do; None: it may honour them all.

    Args:
        backend: any but `auto`, which need not be that of the spec.
    """
    for (key, value), backends in _ONLY_WITH.items():
        if getattr(spec, key) == value and backend not in backends:
            return (
                f"`{key}` is {str(value).lower() if isinstance(value, bool) else value}, which the backend"
                f" {backend} has not; leave `{key}` out, or use one of the backends: {', '.join(backends)}"
            )
    hidden = next((key for key in ("gpus", "draft_gpus") if _hides_all(getattr(spec, key))), None)
    if hidden is not None and backend in _EXLLAMA:
        return f"`{hidden}` hides all GPUs, and the backend {backend} needs one; leave `{hidden}` out"
    if spec.speculation != "off" and backend not in _BACKENDS_THAT_GUESS_AHEAD:
        return f"the backend {backend} does not guess ahead; leave `speculative` and the draft's keys out"
    return None


def _hides_all(gigabytes: str | tuple[float, ...] | None) -> bool:
    return isinstance(gigabytes, tuple) and not any(gigabytes)


def _way_out(key: str) -> str:
    names = ", ".join(allowed_names(key))
    return f"use one of: {names}" if names else f"leave `{key}` out"
