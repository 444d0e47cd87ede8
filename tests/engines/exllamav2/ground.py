"""exllamav2's own Python on a CPU: its queue, pages, drafts and filters are the real ones, its model is not.

The package is imported over a stub of its CUDA extension. In place of the model's layers stand a few lines:

    write   a token and its position go where the real keys and values would, through the block table
    read    what stands there for the whole text so far decides about the next token

So a page that is mixed up, copied too short or used too early shows as a wrong text. The next token's logits
are noise, which the whole text seeds: `Ground.next_logits` says what they must be.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from tests.engines.tiny_tokenizer import save_tiny_tokenizer, train_tiny_tokenizer

ROOT = Path(__file__).parents[3]
CONTEXT_LENGTH = 1024
PAGE = 256
PADDED_BY = 46
END_TOKENS = (2, 0)
LAYERS = 2
_GIB = 1024**3
_NORMS = ("input_layernorm", "post_attention_layernorm")


@cache
def vocabulary_size() -> int:
    """Of the model, which has more than its tokenizer."""
    return int(train_tiny_tokenizer().get_vocab_size()) + PADDED_BY


@dataclass(frozen=True)
class Pass:
    """One forward pass."""

    texts: tuple[tuple[int, ...], ...]
    """Of each row, all tokens as they are read from the cache, with those of this pass."""
    length: int
    """How many tokens of each row this pass computes."""
    is_prompt: bool
    is_of_draft_model: bool
    uses_cache: bool


@dataclass(eq=False)
class Ground:
    """What a test sees of the library, and how it makes trouble."""

    exllamav2: Any
    """The package."""
    passes: list[Pass] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    """What would go unnoticed on a GPU, or spoil its memory."""
    threads: set[int] = field(default_factory=set)
    """Those that have called what only one may call."""
    generators: list[weakref.ref[Any]] = field(default_factory=list)
    loads: list[dict[str, Any]] = field(default_factory=list)
    unloads: int = 0
    before_pass: Callable[[Pass], None] | None = None
    """May raise, or wait."""
    change_logits: Callable[[Pass, torch.Tensor], None] | None = None
    """Gets the logits as the model made them, shape (rows, length, padded vocabulary)."""
    before_token: Callable[[list[int]], None] | None = None
    """Gets a text whose next token was chosen and is about to be booked; may raise."""
    cuda_error: BaseException | None = None
    """What is raised wherever one waits for the GPU."""
    load_error: BaseException | None = None
    """What is raised when half of the model is loaded, which is loaded behind any draft model."""
    free_bytes: int = 24 * _GIB
    _in_generator: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        """Forget what was seen and stop making trouble."""
        for seen in (self.passes, self.violations, self.threads, self.loads):
            seen.clear()
        self.unloads = 0
        self.before_pass = self.change_logits = self.before_token = None
        self.cuda_error = self.load_error = None
        self.free_bytes = 24 * _GIB

    @property
    def steps(self) -> list[Pass]:
        """Passes of the model that gave tokens to answers."""
        return [
            one for one in self.passes if one.uses_cache and not one.is_prompt and not one.is_of_draft_model
        ]

    @property
    def prompt_tokens_computed(self) -> int:
        return sum(one.length for one in self.passes if one.is_prompt and not one.is_of_draft_model)

    @property
    def generator(self) -> Any:
        """The newest that is still held; to be looked at while it rests."""
        return [made for reference in self.generators if (made := reference()) is not None][-1]

    def referenced_pages(self) -> int:
        return len(self.generator.referenced_pages)

    def next_logits(self, text: Sequence[int]) -> NDArray[np.float16]:
        """What the model says after a text, shape (vocabulary,)."""
        token_ids = np.array([text], dtype=np.int64)
        logits: NDArray[np.float16] = _noise(token_ids, 1, vocabulary_size(), 0)[0, -1]
        return logits

    def greedy(self, prompt: Sequence[int], count: int, *, never: Sequence[int] = END_TOKENS) -> list[int]:
        """The likeliest continuation; of ids that have a token."""
        text = list(prompt)
        for _ in range(count):
            logits = self.next_logits(text)[:-PADDED_BY].copy()
            logits[list(never)] = -np.inf
            text.append(int(logits.argmax()))
        return text[len(prompt) :]


def save_folder(folder: Path, *, disagrees_every: int = 0, **config: Any) -> Path:
    """A model's folder as the library reads it.

    Args:
        disagrees_every: a draft model says something else after one text in so many.
        config: of config.json, over what it has here.
    """
    save_tiny_tokenizer(folder)
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary_size(),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT_LENGTH,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": None,
        "eos_token_id": list(END_TOKENS),
        "pad_token_id": 0,
        "quantization_config": {"quant_method": "exl2", "version": "0.3.2", "bits": 4.0},
        "disagrees_every": disagrees_every,
    }
    (folder / "config.json").write_text(json.dumps({**shape, **config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(END_TOKENS)}))
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.q_weight"]
    for layer in range(LAYERS):
        names += [f"model.layers.{layer}.self_attn.{name}_proj.q_weight" for name in "qkvo"]
        names += [f"model.layers.{layer}.mlp.{name}_proj.q_weight" for name in ("gate", "up", "down")]
        names += [f"model.layers.{layer}.{name}.weight" for name in _NORMS]
    save_file({name: torch.zeros(1, dtype=torch.int16) for name in names}, folder / "model.safetensors")
    return folder


@contextmanager
def laid_ground(*, has_flash_attention: bool = True) -> Iterator[Ground]:
    """The library, importable and changed for as long as this lasts.

    Args:
        has_flash_attention: without it, the library computes one text at a time, whose cache is no pages.
    """
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_MODULE_LOADING", "LAZY")  # the import sets it
        patch.delenv("EXLLAMA_NO_FLASH_ATTN", raising=False)
        folder = ROOT / ".gallama-test" / "exllama" / "exllamav2"
        if folder.exists():
            patch.syspath_prepend(str(folder))
        if find_spec("exllamav2") is None:
            pytest.fail("exllamav2 is not unpacked; do that with `scripts/setup dev`.")
        for module in [_extension(), *(_flash_attention() if has_flash_attention else [])]:
            module.__spec__ = ModuleSpec(module.__name__, None)
            patch.setitem(sys.modules, module.__name__, module)
        ground = Ground(None)
        _lay_cuda(patch, ground)
        try:
            ground.exllamav2 = importlib.import_module("exllamav2")
            _lay_model(patch, ground)
            _lay_generator(patch, ground)
            yield ground
        finally:
            torch.set_num_threads(threads)
            for name in [name for name in sys.modules if _holds_library(name)]:
                del sys.modules[name]


def _holds_library(module: str) -> bool:
    """Whether it is of the library, or is made of its classes."""
    return module.split(".")[0] == "exllamav2" or module in (
        "gallama.engines.exllamav2.library",
        "gallama.engines.exllamav2.generator",
    )


def _extension() -> ModuleType:
    extension = ModuleType("exllamav2_ext")
    extension.count_match = _count_match  # type: ignore[attr-defined]
    extension.cache_rotate = _rotate_pages  # type: ignore[attr-defined]
    return extension


def _flash_attention() -> list[ModuleType]:
    flash_attn = ModuleType("flash_attn")
    flash_attn.__version__ = "2.8.3"  # type: ignore[attr-defined]
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        setattr(flash_attn, name, _attend)
    return [flash_attn, ModuleType("flash_attn_2_cuda")]


def _count_match(cached: torch.Tensor, wanted: torch.Tensor, most: int) -> int:
    """The length of the common beginning of two rows."""
    length = min(most, wanted.shape[1])
    same = cached[0, :length] == wanted[0, :length]
    return length if bool(same.all()) else int((~same).to(torch.int8).argmax())


def _rotate_pages(cache: torch.Tensor, order: torch.Tensor, buffer: torch.Tensor) -> None:
    """Each page of `order` gets what the next one holds, and the last one what the first one held."""
    pages = order.tolist()
    first = cache[pages[0]].clone()
    for page, following in pairwise(pages):
        cache[page] = cache[following]
    cache[pages[-1]] = first


def _attend(q: Any, k: Any, v: Any, window_size: Any = None, softcap: Any = None) -> Any:
    raise AssertionError("the model of the tests has no attention")


def _lay_cuda(patch: pytest.MonkeyPatch, ground: Ground) -> None:
    """One GPU, as far as one asks for it."""

    def synchronize(device: Any = None) -> None:
        if ground.cuda_error is not None:
            raise ground.cuda_error

    properties = SimpleNamespace(major=9, minor=0, total_memory=24 * _GIB, name="GPU of the tests")
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": lambda device=0: (ground.free_bytes, 24 * _GIB),
        "memory_allocated": lambda device=0: 0,
        "get_device_properties": lambda device=0: properties,
        "get_device_capability": lambda device=0: (9, 0),
        "get_device_name": lambda device=0: properties.name,
        "synchronize": synchronize,
        "empty_cache": lambda: None,
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, answer)


def _lay_model(patch: pytest.MonkeyPatch, ground: Ground) -> None:
    model = ground.exllamav2.ExLlamaV2
    attention = ground.exllamav2.attn.ExLlamaV2Attention

    def modules_loaded(self: Any, callback: Any) -> Iterator[Any]:
        """Each module, told of before it is loaded."""
        _note_thread(ground)
        for index, module in enumerate(self.modules):
            if callback is not None:
                callback(index, len(self.modules))
            is_half_way = index == len(self.modules) // 2 and not _disagreement(self.config)
            if ground.load_error is not None and is_half_way:
                raise ground.load_error
            yield module
        if callback is not None:
            callback(len(self.modules), len(self.modules))
        self.loaded = True

    def load_autosplit_gen(
        self: Any,
        cache: Any,
        reserve_vram: int | list[int] | None = None,
        last_id_only: bool = False,
        callback: Any = None,
        callback_gen: Any = None,
    ) -> Iterator[None]:
        ground.loads.append({"how": "autosplit", "reserve_vram": reserve_vram})
        self.config.max_input_len = min(self.config.max_input_len, self.config.max_seq_len)
        reserved = reserve_vram[0] if isinstance(reserve_vram, list) else reserve_vram or 0
        with torch.inference_mode():
            for module in modules_loaded(self, callback):
                if isinstance(module, attention):
                    if cache.max_seq_len * _bytes_per_token(cache) > ground.free_bytes - reserved:
                        raise RuntimeError("Insufficient VRAM for model and cache")
                    self.cache_map[module.layer_idx] = "cpu"
                    cache.update_cache_tensors()
                    # There each layer computes as many tokens as it may have, and keeps them in the cache.
                    cache.key_states[module.layer_idx].narrow(1, 0, self.config.max_input_len)
        yield

    def load_gen(
        self: Any,
        gpu_split: list[float] | None = None,
        lazy: bool = False,
        stats: bool = False,
        callback: Any = None,
        callback_gen: Any = None,
    ) -> Iterator[None]:
        ground.loads.append({"how": "manual", "gpu_split": gpu_split})
        for module in modules_loaded(self, callback):
            if isinstance(module, attention):
                self.cache_map[module.layer_idx] = "cpu"
        yield

    def unload(self: Any) -> None:
        _note_thread(ground)
        ground.unloads += 1
        self.modules = []
        self.modules_dict = {}

    def forward_chunk(
        self: Any,
        input_ids: torch.Tensor,
        cache: Any = None,
        input_mask: torch.Tensor | None = None,
        preprocess_only: bool = False,
        last_id_only: bool = False,
        loras: Any = None,
        return_last_state: bool = False,
        position_offsets: torch.Tensor | None = None,
        abort_event: Any = None,
        attn_params: Any = None,
        extract_state_indices: Any = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        _note_thread(ground)
        config, length = self.config, input_ids.shape[1]
        assert (
            config.max_output_len is None
            or preprocess_only
            or last_id_only
            or length <= config.max_output_len
        ), "seq_len exceeds max_output_len"
        _check_input(ground, self, input_ids)
        texts = _write_and_read(ground, config, input_ids, cache, attn_params)
        is_draft = any(self is getattr(made(), "draft_model", None) for made in ground.generators)
        this = Pass(
            tuple(tuple(text.tolist()) for text in texts),
            length,
            preprocess_only,
            is_draft,
            cache is not None,
        )
        ground.passes.append(this)
        if ground.before_pass is not None:
            ground.before_pass(this)
        if preprocess_only:
            return {}
        logits = _padded_logits(texts, length, config.vocab_size, _disagreement(config))
        if last_id_only:
            logits = logits[:, -1:]
        if ground.change_logits is not None:
            ground.change_logits(this, logits)
        return {"logits": logits}

    patch.setattr(model, "load_autosplit_gen", load_autosplit_gen)
    patch.setattr(model, "load_gen", load_gen)
    patch.setattr(model, "unload", unload)
    patch.setattr(model, "forward_chunk", torch.inference_mode()(forward_chunk))


def _disagreement(config: Any) -> int:
    """What `save_folder` was told; 0 for what is no draft model."""
    return int(json.loads(Path(config.model_dir, "config.json").read_text())["disagrees_every"])


def _lay_generator(patch: pytest.MonkeyPatch, ground: Ground) -> None:
    """The real generator, watched: from which threads it is called, and whether its pages stay sound."""
    dynamic = importlib.import_module("exllamav2.generator.dynamic")
    generator = dynamic.ExLlamaV2DynamicGenerator
    construct, iterate, reset = generator.__init__, generator.iterate, generator.reset_page_table

    @wraps(construct)
    def watched_construct(self: Any, *args: Any, **kwargs: Any) -> None:
        _note_thread(ground)
        construct(self, *args, **kwargs)
        ground.generators.append(weakref.ref(self))

    @wraps(reset)
    def watched_reset(self: Any) -> None:
        if getattr(self, "active_jobs", None) or getattr(self, "pending_jobs", None):
            ground.violations.append("the page table was reset while there were jobs")
        self.has_broken = False
        reset(self)

    @wraps(iterate)
    def watched_iterate(self: Any) -> Any:
        if self.has_broken:
            ground.violations.append("a step after one that broke: the library may never come back from it")
            raise RuntimeError("iterate would hang")
        self.has_broken = True
        with _alone(ground):
            results = iterate(self)
        self.has_broken = False
        # The next step writes there: who kept a view of it must see that.
        self.logits_pinned.fill_(float("nan"))
        _check_pages(ground, self)
        return results

    receive_sample = dynamic.ExLlamaV2DynamicJob.receive_sample

    @wraps(receive_sample)
    def watched_receive_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        if ground.before_token is not None:
            ground.before_token(self.sequences[0].sequence_ids.torch()[0].tolist())
        return receive_sample(self, *args, **kwargs)

    patch.setattr(dynamic.ExLlamaV2DynamicJob, "receive_sample", watched_receive_sample)
    patch.setattr(generator, "__init__", watched_construct)
    patch.setattr(generator, "reset_page_table", watched_reset)
    patch.setattr(generator, "iterate", watched_iterate)
    for name in ("enqueue", "cancel", "clear_queue"):
        patch.setattr(generator, name, _watched(getattr(generator, name), ground))


def _watched(method: Callable[..., Any], ground: Ground) -> Callable[..., Any]:
    @wraps(method)
    def watched(self: Any, *args: Any) -> Any:
        with _alone(ground):
            result = method(self, *args)
        _check_pages(ground, self)
        return result

    return watched


@contextmanager
def _alone(ground: Ground) -> Iterator[None]:
    """The generator has no locks: whoever calls into it must be the only one."""
    _note_thread(ground)
    if not ground._in_generator.acquire(blocking=False):
        ground.violations.append("the generator was called while it was in a call")
        raise RuntimeError("the generator is in use")
    try:
        yield
    finally:
        ground._in_generator.release()


def _note_thread(ground: Ground) -> None:
    ground.threads.add(threading.get_ident())


def _check_pages(ground: Ground, generator: Any) -> None:
    """The check of the library's own that it leaves out."""
    try:
        generator._ExLlamaV2DynamicGenerator___validate_cache()
    except AssertionError as error:
        ground.violations.append(f"the page table is not sound: {error}")


def _check_input(ground: Ground, model: Any, input_ids: torch.Tensor) -> None:
    if not model.modules:
        ground.violations.append("a model was computed after it was unloaded")
    if input_ids.dtype != torch.int64:
        ground.violations.append(f"token ids of {input_ids.dtype}")
    if input_ids.numel() > model.config.max_input_len * model.config.max_batch_size:
        ground.violations.append(f"a pass over {tuple(input_ids.shape)} tokens writes beyond its buffers")
    if int(input_ids.max()) >= model.config.vocab_size:
        ground.violations.append("a token id beyond the vocabulary")


def _write_and_read(
    ground: Ground, config: Any, input_ids: torch.Tensor, cache: Any, attn_params: Any
) -> list[NDArray[np.int64]]:
    """Write a pass's tokens to the cache; all tokens of each row's text as they then are read."""
    if cache is None:
        return list(input_ids.numpy())
    rows, length = input_ids.shape
    if attn_params is None or not attn_params.paged:
        past = cache.current_seq_len if attn_params is None else attn_params.past_len
        cache.current_seq_len = past + length
        tables, pasts, page = torch.zeros((1, 1), dtype=torch.int64), [past], cache.max_seq_len
    else:
        tables, pasts, page = attn_params.block_index.long(), attn_params.cache_seqlens.tolist(), PAGE
    slots = []
    for row, past in enumerate(pasts):
        if past + length > config.max_seq_len:
            ground.violations.append(f"position {past + length - 1} has no place in the table of rotations")
        positions = torch.arange(past + length)
        slots.append(tables[row, positions // page] * page + positions % page)
        _write(cache, slots[row][past:], input_ids[row], positions[past:])
    return [_read(ground, cache, slots[row]) for row in range(rows)]


def _write(cache: Any, slots: torch.Tensor, token_ids: torch.Tensor, positions: torch.Tensor) -> None:
    """Two small numbers each, since some caches hold bytes."""
    for keys, values in zip(cache.key_states, cache.value_states, strict=True):
        for states, numbers in ((keys, token_ids), (values, positions)):
            states[0, slots, 0, 0] = (numbers % 128).to(states.dtype)
            states[0, slots, 0, 1] = (numbers // 128).to(states.dtype)


def _read(ground: Ground, cache: Any, slots: torch.Tensor) -> NDArray[np.int64]:
    token_ids = _numbers(cache.key_states[-1], slots)
    if not np.array_equal(_numbers(cache.value_states[0], slots), np.arange(len(slots))):
        ground.violations.append("keys of another place are read")
    return token_ids


def _numbers(states: torch.Tensor, slots: torch.Tensor) -> NDArray[np.int64]:
    pairs = states[0, slots, 0, :2].to(torch.int64).numpy()
    numbers: NDArray[np.int64] = pairs[:, 0] + 128 * pairs[:, 1]
    return numbers


def _bytes_per_token(cache: Any) -> int:
    per_head = (cache.shape_wk[-1] + cache.shape_wv[-1]) * cache.dtype.itemsize
    return int(per_head * cache.num_key_value_heads * cache.num_hidden_layers)


def _padded_logits(
    texts: Sequence[NDArray[np.int64]], length: int, vocabulary_size: int, disagrees_every: int
) -> torch.Tensor:
    """Shape (rows, length, vocabulary to the next 32)."""
    padded = (vocabulary_size + 31) // 32 * 32
    logits = torch.full((len(texts), length, padded), -65504.0, dtype=torch.half)
    for row, text in enumerate(texts):
        noise = _noise(text[None], length, vocabulary_size, disagrees_every)
        logits[row, :, :vocabulary_size] = torch.from_numpy(noise[0])
    return logits


def _noise(
    texts: NDArray[np.int64], length: int, vocabulary_size: int, disagrees_every: int
) -> NDArray[np.float16]:
    """Logits after each of the last `length` tokens, shape (rows, length, vocabulary)."""
    tokens = texts.astype(np.uint64)
    positions = np.arange(texts.shape[1], dtype=np.uint64)
    seeds = np.cumsum(_mix(tokens * _PRIME + positions * _OTHER_PRIME + _ONE), axis=1, dtype=np.uint64)
    seeds = _mix(seeds[:, -length:])
    if disagrees_every:
        seeds = np.where(seeds % np.uint64(disagrees_every) == 0, ~seeds, seeds)
    mixed = _mix(seeds[..., None] + np.arange(vocabulary_size, dtype=np.uint64) * _PRIME)
    noise: NDArray[np.float16] = (12 * (mixed >> np.uint64(40)) / 2**24).astype(np.float16)
    return noise


_PRIME = np.uint64(0x9E3779B97F4A7C15)
_OTHER_PRIME = np.uint64(0xC2B2AE3D27D4EB4F)
_ONE = np.uint64(1)


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each bit of a number depends on all its bits."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))
