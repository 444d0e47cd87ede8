"""What a path leads to, and which engine that is for: a GGUF file, or a folder as Hugging Face has them.

A folder says in its `config.json` how its weights are quantized; where it does not, their names do:

    "quantization_config": {"quant_method": "exl3", "bits": 4.0, ...}
    model.layers.0.mlp.up_proj.trellis
"""

from __future__ import annotations

from collections.abc import Mapping
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
_MOST_CONFIG_BYTES = 64 * 2**20
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
        InvalidConfig: it holds no model.
    """
    if not path.is_dir() or _has_gguf(path):
        return find_gguf(path)
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
    return _read_json(folder / CONFIG_FILE)


def quantization_of(path: Path) -> str | None:
    """How a folder's weights are quantized: the `quant_method` in small letters, as in "exl3", "exl2", "gptq"
    or "awq"; None: not at all, so far as can be seen. Reads its config, and the heads of its weights.

    Raises:
        InvalidConfig: it cannot be read.
    """
    method = _quantization_config(path).get("quant_method")
    if isinstance(method, str):
        return method.lower()
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
        said = _read_json(path / _GPTQ_FILE)
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
    said = read_config(path).get("quantization_config")
    return said if isinstance(said, Mapping) else {}


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        if file.stat().st_size > _MOST_CONFIG_BYTES:
            raise InvalidConfig(f"{file} is too large: {_MOST_CONFIG_BYTES} bytes are the most.")
        content = msgspec.json.decode(file.read_bytes())
    except OSError as error:
        raise InvalidConfig(f"{file} cannot be read: {error.strerror}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{file} is no JSON: {error}.") from None
    if not isinstance(content, Mapping):
        raise InvalidConfig(f"{file} must be a JSON object, not {type(content).__name__}.")
    return content


def _has_gguf(folder: Path) -> bool:
    try:
        return any(file.suffix.lower() == ".gguf" for file in folder.iterdir())
    except OSError as error:
        raise InvalidConfig(f"The folder {folder} cannot be read: {error.strerror}.") from None
