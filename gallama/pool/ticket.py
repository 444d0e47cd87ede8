"""One request on its way through the pool: what its door says of it, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["completed", "failed", "refused", "cancelled"]
"""refused: it never reached a worker; failed: it did, and ended in an error; cancelled: its client left."""

Operation = Literal["chat", "text_completion", "embeddings", "rerank", "tokenize", "detokenize"]
"""What was asked for; the first three are OpenTelemetry's names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What became of one request. Without its text, and without its key."""

    request_id: str
    operation: Operation
    model: str
    """The model that answered, or was to answer."""
    instance: int | None
    """The number of the instance that had it last; None: it never had one."""
    key_name: str
    """Whose key it came with; "" without one."""
    outcome: Outcome
    error_code: str
    """"" where it was completed or cancelled."""
    entered_at: float
    """Seconds since 1970."""
    queue_seconds: float
    """How long it waited for its slot, all told."""
    first_token_seconds: float | None
    """From entering to the first piece of the answer; None: there was none."""
    seconds: float
    """From entering to the end."""
    tries: int
    """How many workers were asked."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    """These three as the worker counted them; 0 where it did not come to that."""
    forced_tokens: int = 0
    """Tokens of constrained answers that were not sampled."""
    accepted_draft_tokens: int = 0
    rejected_draft_tokens: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """What the pool is told of a request beside its content, and where it stands."""

    deadline: float | None = None
    """When it must have ended, in `time.monotonic()`'s seconds; None: whenever."""
    key_name: str = ""
    on_end: Callable[[RequestRecord], None] | None = None
    """Called once, when all is over; never for a dry run."""
    find_position: Callable[[], int | None] = lambda: None
    """The pool's to set."""

    @property
    def position(self) -> int | None:
        """Its place in the line, from 1; None while it does not wait."""
        return self.find_position()
