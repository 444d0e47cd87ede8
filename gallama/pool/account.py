"""Takes down what becomes of one request, from its events."""

from __future__ import annotations

import time

from gallama.conversation import (
    AnswerText,
    ChatEvent,
    ChatRequest,
    Completed,
    Failure,
    Finished,
    ReasoningText,
    ToolArguments,
    ToolCallStarted,
    Usage,
)
from gallama.embedding import Embeddings, EmbedRequest, Relevances, RerankRequest
from gallama.pool.ticket import Operation, Outcome, RequestRecord
from gallama.tokenization import DetokenizeRequest, TokenizeRequest
from gallama.wire import UnaryReply, UnaryRequest

_NO_USAGE = Usage(prompt_tokens=0, completion_tokens=0)


class Account:
    """One request. It counts as cancelled until it is known to have ended in another way."""

    def __init__(self, request: ChatRequest | UnaryRequest, *, model: str, key_name: str) -> None:
        self.tries = 0
        self._request_id = request.request_id
        self._operation = _operation(request)
        self._model = model
        self._key_name = key_name
        self._entered_at = time.time()
        self._began = self._waits_since = time.monotonic()
        self._queue_seconds = 0.0
        self._instance: int | None = None
        self._first_token_seconds: float | None = None
        self._outcome: Outcome = "cancelled"
        self._error_code = ""
        self._usage = _NO_USAGE
        self._forced_tokens = 0

    def waits(self) -> None:
        """It enters a line."""
        self._waits_since = time.monotonic()

    def is_given_to(self, instance: int) -> None:
        """It has its slot."""
        self.tries += 1
        self._instance = instance
        self._queue_seconds += time.monotonic() - self._waits_since

    def take(self, event: ChatEvent) -> None:
        """An event of its answer."""
        match event:
            case AnswerText() | ReasoningText() | ToolCallStarted() | ToolArguments():
                if self._first_token_seconds is None:
                    self._first_token_seconds = time.monotonic() - self._began
            case Finished(guarantee=guarantee) if guarantee is not None:
                self._forced_tokens += guarantee.forced_tokens
            case Completed(usage=usage):
                self._outcome, self._usage = "completed", usage
            case Failure(error=error):
                self.ends_in_error(error.code)
            case _:
                pass

    def take_reply(self, reply: UnaryReply) -> None:
        """Its whole answer. Only what the model has computed counts as tokens."""
        self._outcome = "completed"
        if isinstance(reply, Embeddings | Relevances):
            self._usage = Usage(prompt_tokens=reply.prompt_tokens, completion_tokens=0)

    def ends_in_error(self, code: str) -> None:
        self._outcome = "failed" if self.tries else "refused"
        self._error_code = code

    def close(self) -> RequestRecord:
        """All is over."""
        now = time.monotonic()
        return RequestRecord(
            request_id=self._request_id,
            operation=self._operation,
            model=self._model,
            instance=self._instance,
            key_name=self._key_name,
            outcome=self._outcome,
            error_code=self._error_code,
            entered_at=self._entered_at,
            queue_seconds=self._queue_seconds if self.tries else now - self._waits_since,
            first_token_seconds=self._first_token_seconds,
            seconds=now - self._began,
            tries=self.tries,
            prompt_tokens=self._usage.prompt_tokens,
            cached_tokens=self._usage.cached_tokens,
            completion_tokens=self._usage.completion_tokens,
            forced_tokens=self._forced_tokens,
            accepted_draft_tokens=self._usage.accepted_draft_tokens or 0,
            rejected_draft_tokens=self._usage.rejected_draft_tokens or 0,
        )


def _operation(request: ChatRequest | UnaryRequest) -> Operation:
    match request:
        case ChatRequest():
            return "chat" if request.prompt is None else "text_completion"
        case EmbedRequest():
            return "embeddings"
        case RerankRequest():
            return "rerank"
        case TokenizeRequest():
            return "tokenize"
        case DetokenizeRequest():
            return "detokenize"
