"""GET /v1/models: what can be asked for, loaded or not."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from gallama.api.error_answers import shown
from gallama.api.keys import caller_of
from gallama.errors import ModelNotFound
from gallama.pool.pool import WorkerPool
from gallama.pool.views import ServedModel

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """Those that the caller's key opens."""
    pool: WorkerPool = request.app.state.pool
    caller = caller_of(request)
    return {"object": "list", "data": [_to_model(model) for model in pool.models if caller.may_ask(model)]}


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> dict[str, Any]:
    model = find_exactly(request.app.state.pool, name, param="model")
    caller_of(request).check_model(model)
    return _to_model(model)


def find_exactly(pool: WorkerPool, name: str, *, param: str) -> ServedModel:
    """The model with this name or alias; no other answers in its place, as one does to a question.

    Raises:
        ModelNotFound: there is none.
    """
    for model in pool.models:
        if name == model.name or name in model.aliases:
            return model
    raise ModelNotFound(f"No model is called {shown(name)}.", param=param)


def _to_model(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "gallama",
        "aliases": list(model.aliases),
        "states": list(model.states),
    }
