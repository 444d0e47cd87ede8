"""exllamav3 itself, on a machine without a GPU, over a model that is made of arithmetic.

The library's own Python runs: generator, jobs, page table, caches, filters, samplers, tokenizer. The model
keeps each token that it is given, with its place, in the page that the library names, and makes its logits of
what it then reads there: a page that is lost, mixed up or read too early makes another answer, and is noted
as a fault.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from tests.engines.exllamav3.ground_extension import Extension
from tests.engines.tiny_tokenizer import save_tiny_tokenizer

# Where `scripts/setup dev` unpacks the library: its Python, without what it requires.
WHEEL = Path(__file__).parents[3] / ".gallama-test" / "exllama" / "exllamav3"
PAGE = 256
CONTEXT_LENGTH = 1024
PADDED_BY = 46
"""Logits of the model that no token belongs to."""
_CPU = torch.device("cpu")


@dataclass
class Ground:
    """The library while it stands on arithmetic, and what a test may do to it."""

    library: Any
    """The package `exllamav3`."""
    before_forward: Callable[[list[list[int]]], None] | None = None
    """Called with the texts of a forward pass, each with what is drafted for it; may raise."""
    before_prefill: Callable[[list[int]], None] | None = None
    """Called with the part of a text that is about to be read; may raise."""
    is_spoiled: Callable[[list[int]], bool] | None = None
    """Which texts have no numbers as logits behind them."""
    load_error: BaseException | None = None
    """Raised when half of the modules are loaded."""
    scripts: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    """What the model says for certain behind a text."""
    forwards: list[tuple[int, int]] = field(default_factory=list)
    """(texts, tokens of each) of the main model's passes over the cache."""
    tokens_read: int = 0
    """Of prompts, by the main model."""
    longest_read: int = 0
    """Tokens that a pass has read at once, of the main model or a draft model."""
    loads: list[dict[str, Any]] = field(default_factory=list)
    """The arguments of each `Model.load`."""
    threads: set[int] = field(default_factory=set)
    """Those that called the library."""
    faults: list[str] = field(default_factory=list)
    """What would be wrong on a GPU, too, though nothing need show it."""
    _generators: list[weakref.ref[Any]] = field(default_factory=list)

    @property
    def generators(self) -> list[Any]:
        """Those that can compute: their caches are loaded, and no later generator has taken them over."""
        alive = [generator for reference in self._generators if (generator := reference()) is not None]
        return [
            generator
            for generator in alive
            if generator.cache.initialized and generator.cache.owner_serial == generator.cache_owner_serial
        ]

    @property
    def pages_in_use(self) -> int:
        return sum(len(generator.pagetable.referenced_pages) for generator in self.generators)

    def forget(self) -> None:
        """Start a test as if there had been no other."""
        self.before_forward = self.before_prefill = self.is_spoiled = self.load_error = None
        self.scripts.clear()
        self.forwards.clear()
        self.tokens_read = self.longest_read = 0
        self.loads.clear()

    def greedy(
        self,
        token_ids: Sequence[int],
        count: int,
        *,
        among: Sequence[int],
        ends: frozenset[int] = frozenset(),
    ) -> list[int]:
        """The answer that is likeliest token by token: up to `count` tokens, without the one that ends it."""
        answer: list[int] = []
        candidates = np.array(among)
        for _ in range(count):
            logits = self.logits([*token_ids, *answer], max(among) + 1)
            token = int(candidates[logits[candidates].argmax()])
            if token in ends:
                break
            answer.append(token)
        return answer

    def logits(self, token_ids: Sequence[int], vocab_size: int, voice: int = 0) -> NDArray[np.float32]:
        """What the model has to say behind a text: noise, which depends on each token and its place.

        Args:
            vocab_size: so many of the model's logits; with fewer, they are the same.
        """
        return self._logits(list(token_ids), int(_hashes(token_ids)[-1]), vocab_size, voice)

    def _logits(self, token_ids: list[int], seed: int, vocab_size: int, voice: int) -> NDArray[np.float32]:
        bits = np.random.Philox(key=seed ^ voice * 0x9E3779B97F4A7C15 & _WORD)
        logits = np.random.Generator(bits).standard_normal(vocab_size, np.float32) * 4
        for start, script in self.scripts.items():
            place = len(token_ids) - len(start)
            if 0 <= place < len(script) and tuple(token_ids) == (*start, *script[:place]):
                logits[script[place]] = 60
        if self.is_spoiled is not None and self.is_spoiled(token_ids):
            logits[:] = np.nan
        return logits.astype(np.float16).astype(np.float32)


_WORD = (1 << 64) - 1
_ground: Ground | None = None


def current() -> Ground:
    assert _ground is not None, "the library is used outside of its ground"
    return _ground


@contextmanager
def without_gpu() -> Iterator[Ground]:
    """Let `import exllamav3` be the library on arithmetic, and torch say that there is one GPU."""
    global _ground
    modules = _modules()
    before = set(sys.modules)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, module in modules.items():
                patch.setitem(sys.modules, name, module)
            patch.syspath_prepend(WHEEL)
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
            patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (80 << 30, 80 << 30))
            _ground = Ground(modules["exllamav3"])
            yield _ground
    finally:
        _ground = None
        # Nor may the engine keep what it took from it.
        for name in set(sys.modules) - before:
            if "exllamav3" in name:
                del sys.modules[name]


def save_model(
    folder: Path, *, voice: int = 0, is_draft: bool = False, is_recurrent: bool = False, **config: Any
) -> Path:
    """Write a model's folder, of a Llama whose weights nobody reads.

    Args:
        voice: models of different voices say different things.
        is_draft: what it computes is not counted.
        is_recurrent: it keeps a state of each text that cannot be taken back at will.
        config: over what config.json has here.
    """
    tokenizer = save_tiny_tokenizer(folder)
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size() + PADDED_BY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": CONTEXT_LENGTH,
        "eos_token_id": 2,
        "voice": voice,
        "is_draft": is_draft,
        "is_recurrent": is_recurrent,
    }
    (folder / "config.json").write_text(json.dumps({**shape, **config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    save_file({"model.norm.weight": torch.ones(64)}, folder / "model.safetensors")
    return folder


def _loaded() -> dict[str, types.ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "exllamav3"}


@functools.cache
def _modules() -> dict[str, types.ModuleType]:
    """The library's modules, imported over the stand-ins and changed for good; no other code sees them."""
    if not (WHEEL / "exllamav3").is_dir():
        pytest.fail("The sources of exllamav3 are not here; unpack them with `scripts/setup dev`.")
    environment = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.syspath_prepend(WHEEL)
        patch.setitem(sys.modules, "exllamav3_ext", Extension(lambda fault: current().faults.append(fault)))
        for name in ("triton", "triton.language"):
            if name not in sys.modules:
                patch.setitem(sys.modules, name, _Decorators(name))
        importlib.import_module("exllamav3")
        # What is imported only when a folder is read, or when a generator has nothing left to do.
        importlib.import_module("exllamav3.architecture.architectures").get_architectures()
        importlib.import_module("exllamav3.modules.block_sparse_mlp_cpu")
        modules = _loaded()
    for name in modules:
        del sys.modules[name]
    os.environ.clear()
    os.environ.update(environment)
    _stand_in(modules)
    return modules


def _stand_in(modules: dict[str, types.ModuleType]) -> None:
    generator: Any = modules["exllamav3.generator.generator"]
    job: Any = modules["exllamav3.generator.job"]
    model: Any = modules["exllamav3.model.model"].Model
    generator.torch = job.torch = _TorchWithoutPinnedMemory()
    generator.cuda_sync_active = lambda: None
    model.load = torch.inference_mode()(_load)
    model.forward = torch.inference_mode()(_forward)
    model.prefill = torch.inference_mode()(_prefill)
    model.unload = _watched(model.unload)
    model.from_config = staticmethod(functools.partial(_make_model, model.from_config))
    for name in ("enqueue", "iterate", "cancel", "clear_queue", "close", "get_cache_stats"):
        setattr(generator.Generator, name, _watched(getattr(generator.Generator, name)))
    generator.Generator.__init__ = _strict(generator.Generator.__init__, _remember)
    job.Job.__init__ = _strict(job.Job.__init__, lambda made: None)


def _watched(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        current().threads.add(threading.get_ident())
        return method(*args, **kwargs)

    return call


def _strict(init: Callable[..., Any], made: Callable[[Any], None]) -> Callable[..., Any]:
    """The library swallows arguments that it does not know."""
    known = set(inspect.signature(init).parameters) - {"kwargs"}

    @functools.wraps(init)
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        if unknown := set(kwargs) - known:
            current().faults.append(f"unknown arguments: {unknown}")
        current().threads.add(threading.get_ident())
        init(self, *args, **kwargs)
        made(self)

    return call


def _remember(generator: Any) -> None:
    current()._generators.append(weakref.ref(generator))


class _TorchWithoutPinnedMemory:
    """torch, as two of the library's modules see it."""

    cuda = SimpleNamespace(synchronize=lambda device=None: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        return torch.empty(*args, **kwargs)

    @staticmethod
    def zeros(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        return torch.zeros(*args, **kwargs)


def _make_model(make: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> Any:
    model = make(config, *args, **kwargs)
    if config.config_dict["is_recurrent"]:
        model.recurrent_state_cls = _Memory
        model.caps.update(recurrent_states=True, default_recurrent_checkpoint_interval=PAGE)
    return model


class _Memory:
    """What a recurrent model keeps of a text: here, all of its tokens."""

    checkpoint_size = 1 << 20

    def __init__(
        self, cache: Any, slot: int, position: int, clear: bool = True, stashed: dict[str, Any] | None = None
    ) -> None:
        self.cache = cache
        self.slot = slot
        self.position = position
        self.last_history = 0
        self.token_ids: list[int] = [] if stashed is None else list(stashed["token_ids"])
        assert len(self.token_ids) == position

    def rewind(self, count: int) -> None:
        """Take back tokens of the pass before, which were kept apart for that."""
        if count > min(self.last_history, self.cache.max_history):
            current().faults.append("a state was taken back further than it can be")
        del self.token_ids[self.position - count :]
        self.position -= count
        self.last_history = 0

    def rollback_capacity(self) -> int:
        return 0

    def stash(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "checkpoint_size": self.checkpoint_size,
            "token_ids": list(self.token_ids),
        }

    def free(self) -> None:
        self.cache.release_state(self)

    def post_advance(self) -> None:
        """Called after each pass."""


class _Decorators(types.ModuleType):
    """triton, whose kernels are declared and never run."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "language":
            return sys.modules["triton.language"]
        return lambda *args, **kwargs: args[0] if args and not kwargs else lambda function: function


def _load(self: Any, *args: Any, **kwargs: Any) -> None:
    ground = current()
    ground.threads.add(threading.get_ident())
    bound = inspect.signature(type(self).load_gen).bind(self, *args, **kwargs)
    given = {name: value for name, value in bound.arguments.items() if name != "self"}
    ground.loads.append(given)
    use, reserve = given.get("use_per_device"), given.get("reserve_per_device")
    assert use is None or reserve is None, "Cannot specify both reserve_per_device and use_per_device."
    for split in (use, reserve):
        if split is not None and not isinstance(split, list | float | int):
            raise ValueError("use_per_device must be float or list[float]")
    for reference in self.cache_weakrefs.values():
        # A chunk of that size is computed in the cache, to see what memory it takes.
        chunk = given.get("max_chunk_size", 2048)
        assert chunk <= reference().max_num_tokens, "Cache too small for batch shape"
        assert chunk % PAGE == 0, "cache seq len must be a multiple of 256"
    callback = given.get("callback")
    total = len(self.modules)
    for index in range(total):
        if callback:
            callback(index, total)
        if ground.load_error is not None and index == total // 2:
            raise ground.load_error
    if callback:
        callback(total, total)
    for module in self.get_cache_layers():
        for layer in module.cache_layers:
            layer.alloc(_CPU)
    self.output_device = _CPU
    for reference in self.cache_weakrefs.values():
        reference().initialized = True


def _prefill(self: Any, input_ids: Any, params: dict[str, Any] | None = None) -> None:
    ground = current()
    ground.threads.add(threading.get_ident())
    params = {} if params is None else params
    input_ids = self.prepare_inputs(input_ids, params)
    ground.longest_read = max(ground.longest_read, input_ids.shape[-1])
    if not _is_draft(self):
        if ground.before_prefill is not None:
            ground.before_prefill(input_ids[0].tolist())
        ground.tokens_read += input_ids.shape[-1]
    _write(self, input_ids, params)
    _advance(self, input_ids, params)


def _forward(self: Any, input_ids: Any, params: dict[str, Any] | None = None) -> Any:
    """Logits of half precision, shape (texts, tokens of each, vocabulary rounded up to 128)."""
    ground = current()
    ground.threads.add(threading.get_ident())
    params = {} if params is None else params
    input_ids = self.prepare_inputs(input_ids, params)
    width = input_ids.shape[-1]
    if params.get("attn_mode") == "flash_attn_nc":
        texts = input_ids.tolist()
    else:
        _write(self, input_ids, params)
        texts = _read(self, input_ids, params)
        _advance(self, input_ids, params)
        for text, state in zip(texts, params.get("recurrent_states") or (), strict=False):
            if text != state.token_ids:
                ground.faults.append("a state is that of another text")
        if not _is_draft(self):
            if ground.before_forward is not None:
                ground.before_forward(texts)
            ground.forwards.append((len(texts), width))
    voice = self.config.config_dict["voice"]
    size = self.config.vocab_size
    kept = min(params.get("last_tokens_only") or width, width)
    logits = np.zeros((len(texts), kept, -(-size // 128) * 128), np.float32)
    for row, text in enumerate(texts):
        hashes = _hashes(text)
        for place in range(kept):
            length = len(text) - kept + place + 1
            logits[row, place, :size] = ground._logits(text[:length], int(hashes[length - 1]), size, voice)
    return torch.from_numpy(logits).half()


def _is_draft(model: Any) -> bool:
    return bool(model.config.config_dict["is_draft"])


def _write(model: Any, input_ids: Any, params: dict[str, Any]) -> None:
    """Keep the tokens where the library says: the first layer has room enough."""
    layer = _first_layer(params["cache"])
    if not all(0 <= token < model.config.vocab_size for token in input_ids.flatten().tolist()):
        current().faults.append("a token that the model does not have")
    for ids, pages, start in zip(input_ids, params["block_table"], params["cache_seqlens"], strict=False):
        places = torch.arange(int(start), int(start) + len(ids))
        at = pages[places // PAGE].long(), places % PAGE
        if hasattr(layer, "qk"):
            layer.qk[(*at, 0)], layer.qv[(*at, 0)] = ids.int(), places.int()
        else:
            for tensor, values in ((layer.k, ids), (layer.v, places)):
                tensor[(*at, 0, 0)], tensor[(*at, 0, 1)] = (values % 1024).half(), (values // 1024).half()


def _read(model: Any, input_ids: Any, params: dict[str, Any]) -> list[list[int]]:
    """All of each text, from its pages."""
    layer = _first_layer(params["cache"])
    texts = []
    for ids, pages, start in zip(input_ids, params["block_table"], params["cache_seqlens"], strict=False):
        length = int(start) + len(ids)
        used = pages[: -(-length // PAGE)].long()
        if hasattr(layer, "qk"):
            tokens, places = (tensor[used, :, 0] for tensor in (layer.qk, layer.qv))
        else:
            tokens, places = (
                tensor[used, :, 0, 0].long() + 1024 * tensor[used, :, 0, 1].long()
                for tensor in (layer.k, layer.v)
            )
        if not torch.equal(places.flatten()[:length].long(), torch.arange(length)):
            current().faults.append("a place of a page was read that nobody wrote for this text")
        texts.append(tokens.flatten()[:length].tolist())
    return texts


def _advance(model: Any, input_ids: Any, params: dict[str, Any]) -> None:
    for state, ids in zip(params.get("recurrent_states") or (), input_ids.tolist(), strict=False):
        state.token_ids += ids
    advance = sys.modules["exllamav3.cache.recurrent_util"].advance_recurrent_states
    advance(input_ids, params, model)


def _first_layer(cache: Any) -> Any:
    return next(iter(cache.layers.values()))


def _hashes(token_ids: Sequence[int]) -> NDArray[np.uint64]:
    """One number for each beginning of a text."""
    values = np.array(token_ids, np.uint64) + np.uint64(1)
    return np.cumsum(values * _powers(1 << (len(values) - 1).bit_length())[: len(values)], dtype=np.uint64)


@functools.cache
def _powers(count: int) -> NDArray[np.uint64]:
    return np.cumprod(np.full(count, 0xD1342543DE82EF95, np.uint64), dtype=np.uint64)
