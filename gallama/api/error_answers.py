"""Errors as OpenAI writes them: {"error": {"message", "type", "param", "code"}} with a true status."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gallama.api.request_id import request_id_of
from gallama.errors import ErrorReport, GallamaError

CLIENT_LEFT_STATUS = 499
"""What logs say of a request whose client has hung up; nobody receives it."""


class ClientLeft(Exception):
    """The client hung up before there was an answer."""


def shown(text: str) -> str:
    """What a client sent, quoted, and short enough for a message."""
    return repr(text if len(text) <= 80 else text[:80] + "…")


def error_body(report: ErrorReport) -> dict[str, Any]:
    return {
        "error": {
            "message": report.message,
            "type": report.type,
            "param": report.param,
            "code": report.code,
        }
    }


def error_answer(report: ErrorReport) -> JSONResponse:
    headers = {}
    if report.retry_after_seconds is not None:
        headers["Retry-After"] = str(math.ceil(report.retry_after_seconds))
    if report.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(report), report.status, headers)


def answer_errors(app: FastAPI) -> None:
    """Make every error of the application an answer in OpenAI's form."""
    app.add_exception_handler(GallamaError, _answer_expected)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientLeft, _answer_nobody)
    app.add_exception_handler(Exception, _answer_unexpected)


async def _answer_expected(_request: Request, error: Exception) -> Response:
    assert isinstance(error, GallamaError)
    return error_answer(error.report())


async def _answer_http(request: Request, error: Exception) -> Response:
    """What the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    answer = error_answer(
        ErrorReport(
            status=error.status_code,
            type="invalid_request_error",
            code=code,
            message=f"{error.detail}: {request.method} {shown(request.scope['path'])}",
        )
    )
    answer.headers.update(error.headers or {})
    return answer


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT_STATUS)


async def _answer_unexpected(request: Request, _error: Exception) -> Response:
    """A bug; the server logs it with its traceback."""
    request_id = request_id_of(request)
    answer = error_answer(
        ErrorReport(
            status=500,
            type="server_error",
            code="internal_error",
            message=f"The server failed on request {request_id}; its log says why.",
        )
    )
    answer.headers["x-request-id"] = request_id
    return answer
