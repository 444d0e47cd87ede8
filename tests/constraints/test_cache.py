import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from gallama.constraints import GrammarCache
from gallama.constraints.cache import Compiled
from gallama.constraints.specs import ChoiceSpec, ConstraintSpec
from gallama.errors import InvalidConstraint
from gallama.generation import State


def spec(*options: str) -> ChoiceSpec:
    return ChoiceSpec(kind="choice", options=options, prefix_only=False, param="choice")


class CountingBackend:
    """Compiles nothing, counts how often it was asked, and refuses the choice "bad"."""

    def __init__(self) -> None:
        self.compiled: list[ConstraintSpec] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def compile(self, spec: ConstraintSpec) -> Compiled:
        self.may_go_on.wait(5)
        self.compiled.append(spec)
        if isinstance(spec, ChoiceSpec) and "bad" in spec.options:
            raise InvalidConstraint("bad")
        return NothingCompiled()


class NothingCompiled:
    backend = "counting"

    def start(self) -> State:
        raise NotImplementedError


def test_the_same_grammar_is_compiled_once() -> None:
    backend = CountingBackend()
    cache = GrammarCache(backend)
    assert cache.compile(spec("a")) is cache.compile(spec("a"))
    assert len(backend.compiled) == 1


def test_all_who_ask_meanwhile_share_one_compilation() -> None:
    backend = CountingBackend()
    backend.may_go_on.clear()
    cache = GrammarCache(backend)
    with ThreadPoolExecutor(4) as threads:
        grammars = [threads.submit(cache.compile, spec("a")) for _ in range(4)]
        backend.may_go_on.set()
        assert len({id(grammar.result()) for grammar in grammars}) == 1
    assert len(backend.compiled) == 1


def test_a_refusal_reaches_everyone_and_is_not_kept() -> None:
    backend = CountingBackend()
    cache = GrammarCache(backend)
    for _ in range(2):
        with pytest.raises(InvalidConstraint):
            cache.compile(spec("bad"))
    assert len(backend.compiled) == 2
    assert len(cache) == 0


def test_the_least_recently_used_grammar_goes_first() -> None:
    backend = CountingBackend()
    cache = GrammarCache(backend, capacity=2)
    for option in ("a", "b", "a", "c", "a"):
        cache.compile(spec(option))
    assert [spec.options[0] for spec in backend.compiled if isinstance(spec, ChoiceSpec)] == ["a", "b", "c"]
