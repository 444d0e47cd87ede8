"""Every error that a user can cause or must hear of: HTTP status, code, parameter, hint.

An error travels from a worker to the gateway as its `ErrorReport`, and from there to the client
in OpenAI's envelope. What only a bug can cause is an `assert`, not one of these.
"""

from __future__ import annotations

from typing import ClassVar

from msgspec import Struct


class ErrorReport(Struct, frozen=True, kw_only=True):
    """An error as plain data, the same on the wire, in a stream and in an HTTP body."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    retry_after_seconds: float | None = None


class GallamaError(Exception):
    """An expected error. The class tells what can be done; the message has names and numbers."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    hint: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.specific_code = code or self.code
        self.retry_after_seconds = retry_after_seconds

    def report(self) -> ErrorReport:
        return ErrorReport(
            status=self.status,
            type=self.type,
            code=self.specific_code,
            message=f"{self.message} {self.hint}".strip(),
            param=self.param,
            retry_after_seconds=self.retry_after_seconds,
        )


class ReportedError(GallamaError):
    """An error that another process reported; it keeps that error's status and words."""

    def __init__(self, report: ErrorReport) -> None:
        super().__init__(report.message, param=report.param)
        self._report = report

    def report(self) -> ErrorReport:
        return self._report


class InvalidRequest(GallamaError):
    """The request says something that we do not understand. Not worth a retry."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedValue(InvalidRequest):
    """The request asks for something that this model or this version does not do."""

    code = "unsupported_value"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together do not fit the model's context."""

    code = "context_length_exceeded"
    hint = "Send fewer or shorter messages, or lower `max_tokens`."


class TextTooLong(ContextLengthExceeded):
    """A text to embed, or to rank, has more tokens than the model takes."""

    hint = "Nothing is ever cut: send it in shorter pieces."


class InvalidConstraint(InvalidRequest):
    """A schema, regex or grammar is malformed, contradicts itself or has no finite answer."""

    code = "invalid_constraint"


class UnsupportedConstraint(InvalidRequest):
    """A constraint is well-formed, but no grammar of ours can hold it."""

    code = "unsupported_constraint"


class ConstraintTooComplex(InvalidRequest):
    """A constraint would take more time or memory than one request may have."""

    code = "constraint_too_complex"
    hint = "Make the schema, regex or grammar smaller."


class RequestTooLarge(InvalidRequest):
    """The body is larger than the server reads."""

    status = 413
    code = "request_too_large"


class AuthenticationFailed(GallamaError):
    """No key, or a key that the server does not know."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotAllowed(GallamaError):
    """The key is known, but may not do this."""

    status = 403
    type = "permission_error"
    code = "not_allowed"


class RateLimited(GallamaError):
    """The key has used up what it may use for now. Worth a retry."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class TaskNotFound(GallamaError):
    """No load task has this id."""

    status = 404
    type = "invalid_request_error"
    code = "task_not_found"


class InstanceNotFound(GallamaError):
    """No instance has this number or port."""

    status = 404
    type = "invalid_request_error"
    code = "instance_not_found"
    hint = "GET /list_models tells them."


class ModelNotFound(GallamaError):
    """No model of this name can be asked."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"
    hint = "GET /v1/models lists the names."


class NotSupported(GallamaError):
    """The path exists so that clients get a clear answer; this version does not do what it stands for."""

    status = 501
    type = "invalid_request_error"
    code = "not_supported"


class GatewayUnreachable(GallamaError):
    """No gateway answers where one was looked for, or what answers is none."""

    status = 503
    code = "gateway_unreachable"
    hint = "Start it with `gallama serve`, or name its address with --url."


class WorkerBusy(GallamaError):
    """Every instance of the model is full, and so is its queue. Worth a retry."""

    status = 429
    type = "rate_limit_error"
    code = "model_overloaded"


class ServerFull(GallamaError):
    """The server has as many connections as it may have. Worth a retry."""

    status = 503
    code = "server_full"


class DeadlineExceeded(GallamaError):
    """The time that the client gave has passed."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class WorkerUnavailable(GallamaError):
    """No instance of the model can answer now. Worth a retry."""

    status = 503
    type = "server_error"
    code = "model_unavailable"


class WorkerDied(WorkerUnavailable):
    """The worker ended while it answered; nothing is known of the rest of the answer."""

    code = "worker_died"


class ModelUnloaded(WorkerUnavailable):
    """The model was unloaded before the answer had ended."""

    code = "model_unloaded"


class CrashLoop(WorkerUnavailable):
    """The worker has died again and again, and is not started for a while."""

    code = "crash_loop"


class ConstraintFailed(GallamaError):
    """The constraint engine gave up in the middle of an answer; the answer is not to be used."""

    code = "constraint_failed"


class EngineFailed(GallamaError):
    """What a model computes is not what it should be."""

    code = "engine_failed"


class InvalidConfig(GallamaError):
    """A flag, an environment variable or a line of the config file is wrong."""

    code = "invalid_config"


class MissingExtra(GallamaError):
    """A library that an engine needs is not installed; the message names the extra."""

    code = "missing_extra"


class SetupFailed(GallamaError):
    """An environment for an engine could not be built; what there was before is as it was."""

    code = "setup_failed"


class ModelLoadFailed(GallamaError):
    """The worker could not load its model."""

    status = 503
    code = "model_load_failed"


class NotEnoughMemory(GallamaError):
    """The GPUs have too little free memory for the model. Worth a retry once others are unloaded."""

    status = 503
    code = "insufficient_memory"
    hint = "Unload a model, set a smaller `cache_size` or `cache_quant`, or use the CPU with `gpus=0`."


class HostNotAllowed(GallamaError):
    """A browser was led here by a foreign page; only this machine's own names are answered."""

    status = 403
    type = "invalid_request_error"
    code = "host_not_allowed"
    hint = "Use localhost or 127.0.0.1, or start the server with another --host."


class RequestTimeout(GallamaError):
    """The client began a request and did not send the rest of it."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"
