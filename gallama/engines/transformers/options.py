"""From a model's spec to what transformers takes; what that cannot express is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, JsonValue, model_validator

from gallama.config import ModelSpec
from gallama.engines.extra_arguments import read_extra_arguments
from gallama.engines.processor_cores import Cores, OwnCores, cores_to_share, usable_cores
from gallama.errors import InvalidConfig

# Of `device_map`: transformers divides the model among the GPUs itself.
DIVIDING = ("auto", "balanced", "balanced_low_0", "sequential")


class TransformersOptions(BaseModel, extra="forbid", frozen=True):
    """The keys of `backend_extra_args`."""

    device_map: str | int | dict[str, str | int] | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    trust_remote_code: bool = False
    # Others would be fetched from a hub.
    attn_implementation: (
        Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None
    ) = None
    config_params: dict[str, JsonValue] = {}
    n_batch: int = Field(512, ge=32, le=65536)
    n_threads: int | None = Field(None, ge=1, le=1024)
    prompt_step_ms: int = Field(200, ge=1, le=60_000)

    @model_validator(mode="before")
    @classmethod
    def _read_older_names(cls, values: Any) -> Any:
        """`torch_dtype: torch.bfloat16` is what transformers has called `dtype: bfloat16`."""
        if not isinstance(values, Mapping):
            return values
        if "torch_dtype" in values and "dtype" in values:
            raise ValueError("`dtype` and `torch_dtype` are the same; leave one out")
        named = {"dtype" if key == "torch_dtype" else key: value for key, value in values.items()}
        if isinstance(named.get("dtype"), str):
            named["dtype"] = named["dtype"].removeprefix("torch.")
        return named


def read_options(spec: ModelSpec) -> TransformersOptions:
    """The spec's `backend_extra_args`.

    Raises:
        InvalidConfig: an unknown key, or a value that cannot be.
    """
    options = read_extra_arguments(TransformersOptions, spec, backend="transformers")
    if spec.cache_quant not in (None, "FP16"):
        raise InvalidConfig(
            f"`cache_quant` is {spec.cache_quant}; the transformers backend keeps its cache in the model's"
            " dtype. Leave it out."
        )
    return options


def placement(spec: ModelSpec, options: TransformersOptions, *, gpus: int) -> dict[str, Any]:
    """Where the model goes, as arguments of `from_pretrained`; {}: onto the CPU.

    Args:
        gpus: that this process sees.

    Raises:
        InvalidConfig: the spec asks for a GPU that is not there, or for two things at once.
    """
    gigabytes = () if isinstance(spec.gpus, str) else spec.gpus
    if any(gigabytes) and not gpus:
        raise InvalidConfig("`gpus` asks for a GPU, but PyTorch sees none here. Leave it out to use the CPU.")
    hides_all = bool(gigabytes) and not any(gigabytes)
    asked = options.device_map
    if asked is None:
        asked = "cpu" if hides_all or not gpus else "auto"
    elif gigabytes and asked not in DIVIDING:
        raise InvalidConfig(
            f"`gpus` and `backend_extra_args.device_map` {asked!r} both say where the model goes; leave"
            " one out."
        )
    if asked == "cpu" or (hides_all and asked in DIVIDING):
        return {}
    if asked == "auto" and gpus == 1 and not gigabytes:
        return {"device_map": {"": 0}}
    if not any(gigabytes):
        return {"device_map": asked}
    most = {index: int(size * 10**9) for index, size in enumerate(gigabytes)}
    return {"device_map": asked, "max_memory": most}


def choose_cores(options: TransformersOptions, *, is_on_cpu: bool) -> Cores:
    """The cores to compute on: as many as the spec says, else what there is, shared with other workers."""
    if options.n_threads is not None:
        return OwnCores(options.n_threads)
    return cores_to_share() if is_on_cpu else OwnCores(usable_cores())


def choose_context_length(spec: ModelSpec, trained_context_length: int | None) -> int:
    """The longest sequence: what the spec says, else what the model was trained for and the cache holds.

    Raises:
        InvalidConfig: nobody says how long, or the spec asks for more than the model has positions.
    """
    if trained_context_length is None:
        if spec.max_seq_len is None:
            raise InvalidConfig("The model's config.json names no longest sequence; set `max_seq_len`.")
        return spec.max_seq_len
    if spec.max_seq_len is not None and spec.max_seq_len > trained_context_length:
        raise InvalidConfig(
            f"`max_seq_len` is {spec.max_seq_len}; the model has {trained_context_length} positions. What"
            " stretches them goes into `backend_extra_args.config_params`, as in"
            ' {"max_position_embeddings": 8192, "rope_scaling": ...}.'
        )
    return spec.max_seq_len or min(trained_context_length, spec.cache_size or trained_context_length)
