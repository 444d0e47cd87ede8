"""What must hold -> grammar -> state. Admission refuses, an engine compiles, the cache shares."""

from gallama.constraints.admission import admit_constraint, admit_tools
from gallama.constraints.cache import Compiled, GrammarCache
from gallama.constraints.envelope import ToolEnvelope
from gallama.constraints.llguidance import LLGuidanceBackend
from gallama.constraints.specs import ConstraintSpec

__all__ = [
    "Compiled",
    "ConstraintSpec",
    "GrammarCache",
    "LLGuidanceBackend",
    "ToolEnvelope",
    "admit_constraint",
    "admit_tools",
]
