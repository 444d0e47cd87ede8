"""A folder in Hugging Face's form, loaded: nothing is fetched, and code in it runs only if it is trusted."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_accelerate_available
from transformers.utils import logging as library_logging

from gallama.config import ModelSpec
from gallama.engines.tokenizer_folder import (
    FolderTokens,
    default_template,
    make_tokens,
    read_generation_ends,
)
from gallama.engines.transformers.options import TransformersOptions, placement
from gallama.errors import GallamaError, InvalidConfig, MissingExtra, ModelLoadFailed, NotEnoughMemory
from gallama.generation import ReportProgress

logger = logging.getLogger(__name__)

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MANY = 3


def load_config(path: Path, options: TransformersOptions) -> Any:
    """The model's config.json, with the changes that the options make.

    Raises:
        InvalidConfig: a change is to something that the config does not have.
        ModelLoadFailed: the folder holds no model that generates text, or none in safetensors files.
    """
    _check_files(path)
    with naming(path):
        config, unused = transformers.AutoConfig.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=options.trust_remote_code,
            return_unused_kwargs=True,
            **options.config_params,
        )
    if unused:
        raise InvalidConfig(
            f"`backend_extra_args.config_params` names {', '.join(sorted(unused))}, which a"
            f" {type(config).__name__} does not have."
        )
    _check_generates_text(config, options)
    return config


def longest_text(config: Any, spec: ModelSpec) -> int | None:
    """How many positions the model has for a text; None: its config does not say.

    With LongRoPE all positions of a text change their meaning once it grows beyond what the model was first
    trained for: what was computed of it is worth nothing then, and texts in one row would change each other.

    Raises:
        InvalidConfig: `max_seq_len` goes beyond that.
    """
    described = config.get_text_config()
    positions: int | None = getattr(described, "max_position_embeddings", None)
    rope = getattr(described, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, Mapping))]
    ends = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    if not ends:
        return positions
    longest: int = min(ends)
    if spec.max_seq_len is not None and spec.max_seq_len > longest:
        raise InvalidConfig(
            f"`max_seq_len` is {spec.max_seq_len}; the transformers backend runs this model with texts of at"
            f" most {longest} tokens, beyond which LongRoPE changes all positions of a text. For longer"
            " ones use a GGUF file of it."
        )
    return longest


def load_tokens(path: Path, config: Any, spec: ModelSpec, options: TransformersOptions) -> FolderTokens:
    """The tokenizer of the folder.

    Raises:
        InvalidConfig: `eos_token_list` names what is no token.
        ModelLoadFailed: there is no fast tokenizer, or it cannot be read.
    """
    with naming(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=options.trust_remote_code
        )
    if not tokenizer.is_fast:
        raise ModelLoadFailed(
            f"{path} has no tokenizer.json, and its tokenizer cannot be made into one; save it with"
            " `PreTrainedTokenizerFast.save_pretrained`."
        )
    text_config = config.get_text_config()
    ends = [tokenizer.eos_token_id, *read_generation_ends(path), *_as_list(text_config.eos_token_id)]
    return make_tokens(
        tokenizer.backend_tokenizer,
        end_tokens=[token for token in ends if token is not None],
        spec=spec,
        chat_template=default_template(tokenizer.chat_template),
        model_tokens=getattr(text_config, "vocab_size", None),
    )


def load_weights(
    path: Path, config: Any, spec: ModelSpec, options: TransformersOptions, report_progress: ReportProgress
) -> Any:
    """The model itself, on its devices.

    Raises:
        InvalidConfig: the spec asks for devices that are not there.
        MissingExtra: it needs accelerate to get there.
        ModelLoadFailed: transformers refused it, or weights are missing.
        NotEnoughMemory: it does not fit the GPUs.
    """
    where = placement(spec, options, gpus=torch.cuda.device_count())
    if where and not is_accelerate_available():
        raise MissingExtra("The transformers backend needs accelerate to put a model onto a GPU.")
    with naming(path), _reported(report_progress):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
            local_files_only=True,
            trust_remote_code=options.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **where,
        )
    _check_weights(path, found)
    _check_devices(model, options)
    model.eval()
    return model


def free_memory() -> None:
    """Give back what a model took that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_files(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelLoadFailed(
            f"{path} is no folder of a model: it has no config.json. The transformers backend loads folders"
            " as Hugging Face has them; a GGUF file is for llama_cpp."
        )
    files = sorted(file.name for file in path.iterdir())
    if any(name.endswith(".safetensors") for name in files):
        return
    pickled = [name for name in files if name.endswith(_PICKLED)]
    if pickled:
        raise ModelLoadFailed(
            f"{path} has its weights in {', '.join(pickled[:_MANY])}: such files can run code when they are"
            " loaded, and are refused. Save the model again as safetensors."
        )
    raise ModelLoadFailed(f"{path} has no weights: there is no .safetensors file in it.")


def _check_generates_text(config: Any, options: TransformersOptions) -> None:
    architectures = getattr(config, "architectures", None) or []
    named = ", ".join(architectures) or config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelLoadFailed(
            f"The model ({named}) has an encoder; only models that go on with a text are run."
        )
    brought = getattr(config, "auto_map", None) or {}
    if options.trust_remote_code and "AutoModelForCausalLM" in brought:
        return
    known = _generators_of(config.model_type)
    if not known:
        raise ModelLoadFailed(
            f"The model ({named}) generates no text, or not with this version of transformers."
        )
    # Without its own head, transformers would make one up.
    if architectures and not any(name in known or _has_text_inside(name) for name in architectures):
        raise ModelLoadFailed(
            f"The model ({named}) generates no text. One that embeds is loaded with model_type=embedding."
        )


def _generators_of(model_type: str) -> tuple[str, ...]:
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)


def _has_text_inside(architecture: str) -> bool:
    """Whether it is a model for text and images, whose part for text is loaded."""
    return architecture.endswith("ForConditionalGeneration")


def _as_list(token_ids: Any) -> list[int]:
    return list(token_ids) if isinstance(token_ids, list | tuple) else [token_ids]


def _check_weights(path: Path, found: Mapping[str, Any]) -> None:
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - _MANY} more" if len(missing) > _MANY else ""
        raise ModelLoadFailed(
            f"{path} is not whole: it has no weights for {', '.join(missing[:_MANY])}{more}."
        )


def _check_devices(model: Any, options: TransformersOptions) -> None:
    """Refuse a model that was put beside its GPUs, unless that was asked for: it would be far too slow."""
    places = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if options.device_map is None and places & {"cpu", "disk"}:
        raise NotEnoughMemory(
            "The model does not fit the GPUs that it may use; `backend_extra_args.device_map` `auto` puts the"
            " rest into main memory."
        )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the library raises, whatever it is, as our error."""
    try:
        yield
    except GallamaError:
        raise
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"There is too little memory on the GPU for {path}: {error}") from error
    except ImportError as error:
        raise MissingExtra(f"transformers needs a library to load {path}: {error}") from error
    except Exception as error:
        raise ModelLoadFailed(f"transformers could not load {path}: {error}") from error


@contextmanager
def _reported(report_progress: ReportProgress) -> Iterator[None]:
    """Tell of the weights that are loaded instead of drawing bars."""

    def make_bar(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return library_logging.EmptyTqdm(*(_counted(part, report_progress) for part in args[:1]), **kwargs)

    earlier = library_logging.set_tqdm_hook(make_bar)
    try:
        yield
    finally:
        library_logging.set_tqdm_hook(earlier)


def _counted(items: Iterable[Any], report_progress: ReportProgress) -> Iterator[Any]:
    known = list(items)
    for done, item in enumerate(known):
        report_progress(done / len(known))
        yield item
