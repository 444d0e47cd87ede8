"""What a path leads to, and which engine that is for: a GGUF file, or a folder as Hugging Face has them.

A folder says in its `config.json` how its weights are quantized; where it does not, their names do:

    "quantization_config": {"quant_method": "exl3", "bits": 4.0, ...}
    model.layers.0.mlp.up_proj.trellis
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from gallama.catalog.gguf_files import find_gguf
from gallama.catalog.safetensors_files import read_tensors
from gallama.config import ModelSpec
from gallama.errors import InvalidConfig

CONFIG_FILE = "config.json"
"""Stands in every folder of Hugging Face's form, and says what model it is."""

_GPTQ_FILE = "quantize_config.json"
"""What older folders have instead of `quantization_config`."""
_MOST_CONFIG_BYTES = 16 * 2**20
"""Those that list thousands of experts have a few MB."""
_MOST_VALUE_BYTES = 2**18
_MOST_LETTERS_OF_METHOD = 40
_BITS_OF_GPTQ = 4
"""The only ones that exllamav2 can read; it would take others for these."""
_SIGNS = {".trellis": "exl3", ".q_weight": "exl2"}

_UNQUANTIZED = ("transformers", "exllamav2", "exllamav3")
_BACKENDS: Mapping[str, tuple[str, ...]] = {
    "exl3": ("exllamav3",),
    "exl2": ("exllamav2",),
    "gptq": ("exllamav2", "transformers"),
    "fp8": ("transformers", "exllamav3"),
    "mxfp4": ("transformers", "exllamav3"),
}
"""What loads a folder that is quantized so; the first is the one to take."""
_OTHER_BACKENDS = ("transformers",)


def find_model(path: Path) -> Path:
    """What to load for a file or folder that exists: a GGUF file, as `find_gguf` finds it, or the folder.

    Raises:
        InvalidConfig: it holds no model, or what would keep its readers waiting.
    """
    if not path.is_dir() or _has_gguf(path):
        return find_gguf(path)
    _check_files(path)
    if (path / CONFIG_FILE).is_file():
        return path
    raise InvalidConfig(f"The folder {path} holds no model: it has no GGUF file, and no {CONFIG_FILE}.")


def engine_for(spec: ModelSpec, path: Path) -> str:
    """The backend that loads it.

    Args:
        path: as `find_model` gives it.

    Raises:
        InvalidConfig: the spec asks for one that cannot.
    """
    if spec.backend == "scripted":
        return spec.backend
    fitting = _fitting_backends(path, embeds=spec.model_type == "embedding")
    # Whoever asks for vectors need not know which engine makes them of a GGUF file.
    if spec.backend in ("auto", "embedding"):
        return fitting[0]
    if spec.backend in fitting:
        return spec.backend
    raise InvalidConfig(
        f"model {spec.model_id!r}: the backend {spec.backend} cannot load {_kind_of(path)}; leave `backend`"
        f" out, or use {' or '.join(fitting)}.",
        param="backend",
    )


def check_draft_model(spec: ModelSpec, path: Path) -> None:
    """See that the backend of a model can load another one, too, that drafts for it.

    Raises:
        InvalidConfig: it cannot.
    """
    if spec.backend not in _fitting_backends(path, embeds=False):
        raise InvalidConfig(
            f"model {spec.model_id!r}, `draft_model_id`: the model is loaded by {spec.backend}, which cannot"
            f" load {_kind_of(path)} ({path})."
        )


def read_config(folder: Path) -> Mapping[str, Any]:
    """The `config.json` of a folder.

    Raises:
        InvalidConfig: it cannot be read, or is no JSON object.
    """
    file = folder / CONFIG_FILE
    content = _decode(file, Any)
    if not isinstance(content, Mapping):
        raise InvalidConfig(f"{file} must be a JSON object, not {type(content).__name__}.")
    return content


def read_from_config(folder: Path, keys: tuple[str, ...], *, inside: str | None = None) -> Mapping[str, Any]:
    """What the `config.json` of a folder says under some keys; those that it lacks are left out.

    Nothing is made of all the rest, which may be much: the gateway reads it while it serves.

    Args:
        inside: the object that has them; {} where there is none. None: the whole.

    Raises:
        InvalidConfig: it cannot be read, or is no JSON object, or one of the values is absurdly long.
    """
    return _read_values(folder / CONFIG_FILE, keys, inside)


def quantization_of(path: Path) -> str | None:
    """How a folder's weights are quantized: the `quant_method` in small letters, as in "exl3", "exl2", "gptq"
    or "awq"; None: not at all, so far as can be seen. Reads its config, and the heads of its weights.

    Raises:
        InvalidConfig: it cannot be read.
    """
    method = _quantization_config(path).get("quant_method")
    if isinstance(method, str):
        return _checked_name(method, path)
    endings = {name[name.rfind(".") :] for name, _ in read_tensors(path)}
    named = next((method for sign, method in _SIGNS.items() if sign in endings), None)
    # AWQ's have the same name, but neither this file nor an order of their own.
    is_gptq = ".qweight" in endings and (".g_idx" in endings or (path / _GPTQ_FILE).is_file())
    return named or ("gptq" if is_gptq else None)


def gptq_bits(path: Path) -> int | None:
    """The bits of each weight in a GPTQ folder; None where it does not say.

    Raises:
        InvalidConfig: it cannot be read.
    """
    said = _quantization_config(path)
    if "bits" not in said and (path / _GPTQ_FILE).is_file():
        said = _read_values(path / _GPTQ_FILE, ("bits",), None)
    bits = said.get("bits")
    return bits if isinstance(bits, int) else None


def _fitting_backends(path: Path, *, embeds: bool) -> tuple[str, ...]:
    """Those that can load it; the first is the one to take."""
    if not path.is_dir():
        return ("llama_cpp",)
    if embeds:
        return ("embedding",)
    method = quantization_of(path)
    if method is None:
        return _UNQUANTIZED
    if method == "gptq" and gptq_bits(path) != _BITS_OF_GPTQ:
        return ("transformers",)
    return _BACKENDS.get(method, _OTHER_BACKENDS)


def _kind_of(path: Path) -> str:
    if not path.is_dir():
        return "a GGUF file"
    method = quantization_of(path)
    if method is None:
        return "a folder without a GGUF file"
    bits = gptq_bits(path) if method == "gptq" else None
    return f"a folder of {method.upper()} weights{f' of {bits} bits' if bits else ''}"


def _quantization_config(path: Path) -> Mapping[str, Any]:
    return read_from_config(path, ("quant_method", "bits"), inside="quantization_config")


def _checked_name(method: str, path: Path) -> str:
    """
    Raises:
        InvalidConfig: it is none that could stand in a message.
    """
    if len(method) > _MOST_LETTERS_OF_METHOD or not method.isprintable():
        start = method[:_MOST_LETTERS_OF_METHOD]
        raise InvalidConfig(f"{path / CONFIG_FILE}: `quant_method` is {start!r}, which is no name.")
    return method.lower()


def _read_values(file: Path, keys: tuple[str, ...], inside: str | None) -> dict[str, Any]:
    if inside is None:
        found = _decode(file, _with_keys(keys))
    else:
        content = getattr(_decode(file, _with_keys((inside,))), inside)
        if not bytes(content).lstrip().startswith(b"{"):
            return {}
        found = msgspec.json.decode(content, type=_with_keys(keys))
    values = {key: raw for key in keys if (raw := bytes(getattr(found, key)))}
    for key, raw in values.items():
        if len(raw) > _MOST_VALUE_BYTES:
            raise InvalidConfig(f"{file}: `{key}` is too long: {_MOST_VALUE_BYTES} bytes are the most.")
    return {key: msgspec.json.decode(raw) for key, raw in values.items()}


@cache
def _with_keys(keys: tuple[str, ...]) -> type[msgspec.Struct]:
    """An object whose values under these keys are kept as they stand there."""
    return msgspec.defstruct("Values", [(key, msgspec.Raw, msgspec.Raw()) for key in keys])


def _decode(file: Path, kind: Any) -> Any:
    """
    Raises:
        InvalidConfig: the file cannot be read, or is no JSON of this kind.
    """
    try:
        if file.stat().st_size > _MOST_CONFIG_BYTES:
            raise InvalidConfig(f"{file} is too large: {_MOST_CONFIG_BYTES} bytes are the most.")
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except OSError as error:
        raise InvalidConfig(f"{file} cannot be read: {error.strerror}.") from None
    except msgspec.ValidationError as error:
        raise InvalidConfig(f"{file} must be a JSON object: {error}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{file} is no JSON: {error}.") from None
    except RecursionError:
        raise InvalidConfig(f"{file} is nested too deeply.") from None


def _check_files(folder: Path) -> None:
    """See that nobody who opens one of the files waits for ever, as on a pipe: libraries open what is there.

    Raises:
        InvalidConfig: that would be so.
    """
    try:
        for file in folder.iterdir():
            if not file.is_file() and not file.is_dir() and file.exists():
                raise InvalidConfig(f"{file} is no regular file. Take it out of the folder.")
    except OSError as error:
        raise InvalidConfig(f"The folder {folder} cannot be read: {error.strerror}.") from None


def _has_gguf(folder: Path) -> bool:
    try:
        return any(file.suffix.lower() == ".gguf" for file in folder.iterdir())
    except OSError as error:
        raise InvalidConfig(f"The folder {folder} cannot be read: {error.strerror}.") from None
