"""GET /health: the server lives. GET /ready: its models can answer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from gallama.api.keys import caller_of
from gallama.pool.pool import WorkerPool
from gallama.pool.views import ServedModel

router = APIRouter()


@router.api_route("/health", methods=["GET", "HEAD"])
async def tell_health() -> dict[str, str]:
    return {"status": "ok"}


@router.api_route("/ready", methods=["GET", "HEAD"])
async def tell_readiness(request: Request) -> Response:
    """200 when every model that is loaded at the start can answer, else 503."""
    pool: WorkerPool = request.app.state.pool
    is_ready = all("ready" in model.states for model in pool.loads_at_start)
    caller = caller_of(request)
    models = {model.name: _to_readiness(model) for model in pool.models if caller.may_ask(model)}
    status = "ready" if is_ready else "not_ready"
    return JSONResponse({"status": status, "models": models}, 200 if is_ready else 503)


def _to_readiness(model: ServedModel) -> dict[str, Any]:
    return {
        "states": list(model.states),
        "problem": model.problem or None,
        "busy": model.busy,
        "waiting": model.waiting,
    }
