"""Which constraint engine is asked: the one that is named, or the first that holds all."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from gallama.constraints.admission import admit_constraint, admit_tools
from gallama.constraints.engines import ENGINE_NAMES, ConstraintEngines
from gallama.constraints.specs import AnswerSpec
from gallama.conversation import Constraint, ToolChoice, ToolSpec, UnsupportedPolicy
from gallama.dialects import DIALECTS
from gallama.errors import UnsupportedConstraint, UnsupportedValue
from gallama.generation import Vocabulary

# llguidance leaves `oneOf` of objects to be checked; that two constants differ the others see.
HELD_BY_OTHERS = {"oneOf": [{"const": {"a": 1}}, {"const": {"a": 2}}]}


@pytest.fixture
def engines(byte_vocabulary: Vocabulary) -> Iterator[ConstraintEngines]:
    engines = ConstraintEngines(byte_vocabulary)
    yield engines
    engines.close()


def spec(kind: Any, source: Any, policy: UnsupportedPolicy | None = None) -> AnswerSpec:
    return AnswerSpec(body=admit_constraint(Constraint(kind=kind, source=source), policy))


def test_the_default_engine_is_made_before_the_first_request_if_asked_to(
    byte_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = ConstraintEngines(byte_vocabulary)
    engines.prepare()
    # From here on none can be made.
    monkeypatch.setattr("gallama.constraints.engines._BACKENDS", dict.fromkeys(ENGINE_NAMES[1:]))
    assert engines.compile(spec("choice", ["a"])).backend == "llguidance"


@pytest.mark.parametrize("name", ENGINE_NAMES[1:])
def test_the_engine_that_is_named_is_asked(engines: ConstraintEngines, name: str) -> None:
    assert engines.compile(spec("choice", ["a"]), name).backend == name


def test_without_a_name_llguidance_is_asked(engines: ConstraintEngines) -> None:
    assert engines.compile(spec("json_object", None)).backend == "llguidance"


def test_what_llguidance_cannot_hold_is_held_by_another(engines: ConstraintEngines) -> None:
    assert engines.compile(spec("regex", "(?!ab)[a-z]+")).backend == "lm-format-enforcer"
    assert engines.compile(spec("json_schema", HELD_BY_OTHERS, "reject")).backend == "lm-format-enforcer"


def test_what_llguidance_would_leave_to_be_checked_is_held_by_another(engines: ConstraintEngines) -> None:
    compiled = engines.compile(spec("json_schema", HELD_BY_OTHERS, "validate"))
    assert (compiled.backend, compiled.unenforced) == ("lm-format-enforcer", ())


def test_what_none_holds_is_left_to_be_checked_by_llguidance(engines: ConstraintEngines) -> None:
    compiled = engines.compile(spec("json_schema", {"type": "string", "not": {"const": "a"}}, "validate"))
    assert compiled.backend == "llguidance"
    assert [place.pointer for place in compiled.unenforced] == ["/not"]


def test_what_none_can_do_is_refused_as_llguidance_says(engines: ConstraintEngines) -> None:
    with pytest.raises(UnsupportedConstraint, match=r"`response_format` cannot be held"):
        engines.compile(spec("regex", "(?<=a)b"))
    with pytest.raises(UnsupportedConstraint, match="llguidance cannot hold `/not`"):
        engines.compile(spec("json_schema", {"type": "string", "not": {"const": "a"}}, "reject"))


def test_a_grammar_is_compiled_once(engines: ConstraintEngines) -> None:
    for name in ENGINE_NAMES:
        assert engines.compile(spec("choice", ["a"]), name) is engines.compile(spec("choice", ["a"]), name)


def test_an_unknown_name_is_refused_with_those_that_there_are(engines: ConstraintEngines) -> None:
    with pytest.raises(
        UnsupportedValue, match=r"'magic'.*auto, llguidance, lm-format-enforcer, outlines"
    ) as refused:
        engines.compile(spec("choice", ["a"]), "magic")
    assert refused.value.param == "guided_decoding_backend"


@pytest.mark.parametrize(
    ("name", "module"), [("lm-format-enforcer", "lmformatenforcer"), ("outlines", "outlines_core")]
)
def test_an_engine_that_is_not_installed_is_refused_with_its_extra(
    engines: ConstraintEngines, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedValue, match=rf"gallama\[{name}\]") as refused:
        engines.compile(spec("choice", ["a"]), name)
    assert refused.value.param == "guided_decoding_backend"


def test_without_the_others_llguidance_does_what_it_can(
    engines: ConstraintEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("lmformatenforcer", "outlines_core"):
        monkeypatch.setitem(sys.modules, module, None)
    assert engines.compile(spec("json_schema", HELD_BY_OTHERS, "validate")).backend == "llguidance"
    with pytest.raises(UnsupportedConstraint):
        engines.compile(spec("regex", "(?!ab)[a-z]+"))


@pytest.mark.parametrize("name", ["lm-format-enforcer", "outlines"])
@pytest.mark.parametrize("dialect", ["hermes", "llama3"])
def test_an_engine_that_cannot_keep_text_from_looking_like_a_call_refuses_it(
    engines: ConstraintEngines, name: str, dialect: str
) -> None:
    def beside_a_tool(kind: Any, source: Any) -> AnswerSpec:
        text = admit_constraint(Constraint(kind=kind, source=source), None)
        envelope = DIALECTS[dialect].envelope
        tools = [ToolSpec(name="now")]
        body = admit_tools(tools, ToolChoice(), parallel=False, envelope=envelope, text=text)
        return AnswerSpec(body=body)

    assert engines.compile(beside_a_tool("json_object", None), name).backend == name
    with pytest.raises(UnsupportedConstraint, match="may begin as this model's calls"):
        engines.compile(beside_a_tool("regex", r"[\s\S]*"), name)
