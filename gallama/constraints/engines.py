"""The constraint engines by name, and the choice between them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from gallama.constraints.cache import MAX_GRAMMARS, Backend, Compiled, GrammarCache
from gallama.constraints.json_regex import is_held
from gallama.constraints.ledgers import schemas_of
from gallama.constraints.llguidance import LLGuidanceBackend
from gallama.constraints.lm_format_enforcer import LMFormatEnforcerBackend
from gallama.constraints.outlines import OutlinesBackend
from gallama.constraints.specs import AnswerSpec, cache_key
from gallama.errors import (
    ConstraintTooComplex,
    InvalidConstraint,
    MissingExtra,
    UnsupportedConstraint,
    UnsupportedValue,
    WorkerBusy,
)
from gallama.generation import Vocabulary

_BACKENDS: dict[str, Callable[[Vocabulary], Backend]] = {
    "llguidance": LLGuidanceBackend,
    "lm-format-enforcer": LMFormatEnforcerBackend,
    "outlines": OutlinesBackend,
}
# Automata are larger than the grammars of llguidance: megabytes each.
_CAPACITIES = {"lm-format-enforcer": 16, "outlines": 16}

AUTO = "auto"
DEFAULT = "llguidance"
ENGINE_NAMES = (AUTO, *_BACKENDS)
MAX_CHOICES = 1024
PARAM = "guided_decoding_backend"


class ConstraintEngines:
    """All constraint engines for one vocabulary, each made when it is first asked. Safe in many threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._caches: dict[str, GrammarCache] = {}
        self._backends: dict[str, Backend] = {}
        self._choices: dict[bytes, str] = {}

    def prepare(self) -> None:
        """Make the default engine's tables of the vocabulary now, so that no request waits for them.

        They are a tree in llguidance's memory, which cannot be kept on disk. Making it takes 2 µs for each
        token, and stops the event loop for as long.
        """
        self._cache(DEFAULT)

    def compile(self, spec: AnswerSpec, engine: str = AUTO) -> Compiled:
        """The grammar of a spec, from a cache where it can be. Blocks: not for an event loop.

        Args:
            engine: one of ENGINE_NAMES. "auto" is llguidance; where that does not hold all of the spec, the
                first other engine that is installed and does; if none does, llguidance and what it says.

        Raises:
            UnsupportedValue: there is no such engine, or it is not installed.
            InvalidConstraint, UnsupportedConstraint, ConstraintTooComplex: as `Backend.compile`.
        """
        name = self._chosen(spec) if engine == AUTO else engine
        return self._cache(name).compile(spec)

    def cached(self, spec: AnswerSpec) -> Compiled | None:
        """The default engine's grammar of a spec if it is there and holds all; never blocks."""
        cache = self._caches.get(DEFAULT)
        grammar = None if cache is None else cache.cached(spec)
        return None if grammar is None or grammar.unenforced else grammar

    def close(self) -> None:
        """End the helper processes; a later compile starts others."""
        with self._lock:
            backends = list(self._backends.values())
        for backend in backends:
            if isinstance(backend, LMFormatEnforcerBackend | OutlinesBackend):
                backend.close()

    def _chosen(self, spec: AnswerSpec) -> str:
        """The engine for a spec, chosen once: what cannot be compiled may take seconds to find out."""
        key = cache_key(spec)
        name = self._choices.get(key)
        if name is None:
            try:
                name = DEFAULT if self._is_held(spec, DEFAULT) else self._another(spec) or DEFAULT
            except WorkerBusy:
                return DEFAULT  # for now
            if len(self._choices) >= MAX_CHOICES:
                self._choices.clear()
            self._choices[key] = name
        return name

    def _another(self, spec: AnswerSpec) -> str | None:
        """The first engine beside the default that holds all of the spec."""
        if not all(is_held(schema) for _, schema, _ in schemas_of(spec)):
            return None
        others = (name for name in _BACKENDS if name != DEFAULT)
        return next((name for name in others if self._is_held(spec, name)), None)

    def _is_held(self, spec: AnswerSpec, name: str) -> bool:
        """Whether an engine holds a spec without leaving anything to be checked."""
        try:
            return not self._cache(name).compile(spec).unenforced
        except (UnsupportedValue, UnsupportedConstraint):
            return False
        except (InvalidConstraint, ConstraintTooComplex):
            return name == DEFAULT  # which then says so

    def _cache(self, name: str) -> GrammarCache:
        if name not in _BACKENDS:
            raise UnsupportedValue(
                f"`{PARAM}` is {name[:100]!r}; there are {', '.join(ENGINE_NAMES)}.", param=PARAM
            )
        with self._lock:
            if name not in self._caches:
                self._caches[name] = self._new_cache(name)
            return self._caches[name]

    def _new_cache(self, name: str) -> GrammarCache:
        try:
            self._backends[name] = _BACKENDS[name](self._vocabulary)
        except MissingExtra as error:
            raise UnsupportedValue(error.message, param=PARAM) from error
        return GrammarCache(self._backends[name], capacity=_CAPACITIES.get(name, MAX_GRAMMARS))
