"""Loading, unloading and listing models over HTTP; each path also stands behind /v1.

A call is checked whole before anything of it is done: of several models, all are loaded or none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import model_validator
from starlette.requests import Request
from starlette.responses import Response

from gallama.api.error_answers import shown
from gallama.api.keys import KeyRing
from gallama.api.models import find_exactly
from gallama.api.request_bodies import StrictBody, read_body, read_json
from gallama.catalog import UNKNOWN_MODEL, ResolvedModel, resolve_anew, resolve_model
from gallama.catalog.embedded import installed_embedded
from gallama.catalog.memory_need import estimate_memory
from gallama.config import ModelSpec, ServerConfig
from gallama.config.problems import explain_unknown_key
from gallama.errors import (
    InstanceNotFound,
    InvalidConfig,
    InvalidRequest,
    ModelNotFound,
    NotAllowed,
    NotSupported,
)
from gallama.pool.pool import WorkerPool
from gallama.pool.views import LoadingModel, LoadTask, ServedInstance, ServedModel, Unloaded
from gallama.wire import WorkerStatus

MAX_SPECS = 50
"""Models that one call may load."""
MAX_BODY_BYTES = 256 * 1024
_MAX_MESSAGE_CHARACTERS = 4000

_routes = APIRouter()


class RemoveBody(StrictBody):
    """Which model to unload."""

    model_id: str | None = None
    """A name, an alias, or what it was loaded by: a name of the config file or a path."""
    model_name: str | None = None
    """A name or an alias."""

    @model_validator(mode="after")
    def _name_one(self) -> RemoveBody:
        if (self.model_id is None) == (self.model_name is None):
            raise ValueError("send either `model_id` or `model_name`")
        return self


class StopBody(StrictBody):
    port: int


@_routes.post("/add_model")
async def add_models(request: Request) -> Response:
    """Begin to load one model, or a list of them; `task_status` tells how far it is."""
    config: ServerConfig = request.app.state.config
    pool: WorkerPool = request.app.state.pool
    keys: KeyRing = request.app.state.keys
    specs = _specs_in(await read_json(request, max_bytes=MAX_BODY_BYTES))
    if not keys.has_admin_keys:
        _refuse_interpreters(specs)
    models = await asyncio.to_thread(_resolve_all, specs, config, pool.resolved_models)
    with _refused_as_request(""):
        task = pool.add(models)
    return JSONResponse(_to_task(task), 202)


@_routes.get("/task_status/{task_id}")
async def tell_task(request: Request, task_id: str) -> dict[str, Any]:
    pool: WorkerPool = request.app.state.pool
    return _to_task(pool.task(task_id))


@_routes.get("/loading_status")
async def list_tasks(request: Request) -> dict[str, Any]:
    """The tasks under way and the last ones that have ended, the newest last."""
    pool: WorkerPool = request.app.state.pool
    return {"tasks": [_to_task(task) for task in pool.tasks]}


@_routes.post("/remove_model")
async def remove_model(request: Request) -> dict[str, Any]:
    """Unload a model; answers when its running answers have ended or were cut, and its processes are gone."""
    config: ServerConfig = request.app.state.config
    pool: WorkerPool = request.app.state.pool
    body = await read_body(request, RemoveBody, max_bytes=MAX_BODY_BYTES)
    if body.model_id is None:
        assert body.model_name is not None
        name = find_exactly(pool, body.model_name, param="model_name").name
    else:
        name = await asyncio.to_thread(_name_by_id, body.model_id, pool.models, config)
    return {"removed": [_to_removed(unloaded) for unloaded in await pool.remove(name)]}


@_routes.post("/stop_model_by_port")
async def stop_instance(request: Request) -> dict[str, Any]:
    """Unload one instance, by the port that the lists show for it."""
    pool: WorkerPool = request.app.state.pool
    body = await read_body(request, StopBody, max_bytes=MAX_BODY_BYTES)
    instances = [instance for model in pool.models for instance in model.instances]
    number = next((instance.number for instance in instances if instance.port == body.port), None)
    if number is None:
        raise InstanceNotFound(f"No instance has the port {body.port}.", param="port")
    return {"removed": [_to_removed(await pool.remove_instance(number))]}


@_routes.get("/list_models")
async def list_all(request: Request) -> dict[str, Any]:
    """Every model that can be asked for, loaded or not."""
    pool: WorkerPool = request.app.state.pool
    return {"models": [_to_model(model) for model in pool.models]}


@_routes.get("/list_loaded_models")
async def list_loaded(request: Request) -> dict[str, Any]:
    pool: WorkerPool = request.app.state.pool
    return {"models": [_to_model(model) for model in pool.models if model.is_loaded]}


@_routes.get("/list_available_models")
async def list_available(request: Request) -> dict[str, Any]:
    """What can be loaded by its name: the models of the config file, and those that are embedded or known."""
    config: ServerConfig = request.app.state.config
    pool: WorkerPool = request.app.state.pool
    models = await asyncio.to_thread(_find_available, config, pool.resolved_models)
    loaded = {model.name for model in pool.models if model.is_loaded}
    return {"models": [{**entry, "loaded": name in loaded} for name, entry in models.items()]}


@_routes.post("/download_model")
async def download_model() -> Response:
    raise NotSupported(
        "This version downloads no models. Put a GGUF file where the server can read it, and send its path as"
        " `model_id` to /add_model."
    )


router = APIRouter()
router.include_router(_routes)
router.include_router(_routes, prefix="/v1")


def _specs_in(body: Any) -> list[tuple[str, dict[str, Any]]]:
    """The specs of a call, each with its place in the body: "" or as in "[2]".

    Raises:
        InvalidRequest: it is neither a spec nor a list of them.
    """
    if isinstance(body, list) and not 1 <= len(body) <= MAX_SPECS:
        raise InvalidRequest(f"Send 1 to {MAX_SPECS} models in one call, not {len(body)}.")
    places = (
        [(f"[{index}]", part) for index, part in enumerate(body)] if isinstance(body, list) else [("", body)]
    )
    specs = []
    for place, values in places:
        if not isinstance(values, dict):
            raise InvalidRequest(
                'A model is an object as in {"model_id": "mistral"}; send one, or a list of them.',
                param=place or None,
            )
        unknown = next((key for key in values if key not in ModelSpec.model_fields), None)
        if unknown is not None:
            raise InvalidRequest(
                explain_unknown_key(unknown[:80], ModelSpec.model_fields), param=_param(place, unknown[:80])
            )
        # null means absent, as everywhere in the API
        specs.append((place, {key: value for key, value in values.items() if value is not None}))
    return specs


def _refuse_interpreters(specs: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """
    Raises:
        NotAllowed: a spec names a program to start, which whoever may only ask models must not.
    """
    for place, values in specs:
        if "python" in values:
            raise NotAllowed(
                "`python` may be set in the config file and on the server's command line, and here only where"
                " the server has admin keys.",
                param=_param(place, "python"),
            )


def _resolve_all(
    specs: Sequence[tuple[str, Mapping[str, Any]]], config: ServerConfig, served: Sequence[ResolvedModel]
) -> list[ResolvedModel]:
    """
    Raises:
        InstanceNotFound,
    InvalidRequest, ModelNotFound: a spec is wrong, or there is no such model.
    """
    models = []
    for place, values in specs:
        with _refused_as_request(place):
            models.append(_resolve(values, config, served))
    return models


def _resolve(
    values: Mapping[str, Any], config: ServerConfig, served: Sequence[ResolvedModel]
) -> ResolvedModel:
    """What the values name: as in the config file, or by the name that it is served by.

    Raises:
        InvalidConfig: a value is wrong, or there is no such model.
    """
    try:
        return resolve_model(values, config)
    except InvalidConfig as error:
        name = values.get("model_id")
        named = next((model for model in served if name in (model.name, *model.aliases)), None)
        if error.specific_code != UNKNOWN_MODEL or named is None:
            raise
    return resolve_anew(named, values, config)


@contextlib.contextmanager
def _refused_as_request(place: str) -> Iterator[None]:
    """What is wrong with a spec is here the client's mistake, not the server's."""
    try:
        yield
    except InvalidConfig as error:
        message = (f"{place}: {error.message}" if place else error.message)[:_MAX_MESSAGE_CHARACTERS]
        param = _param(place, error.param or "model_id")
        if error.specific_code == UNKNOWN_MODEL:
            raise ModelNotFound(message, param=param) from None
        raise InvalidRequest(message, param=param) from None


def _param(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _name_by_id(model_id: str, models: Sequence[ServedModel], config: ServerConfig) -> str:
    """The name of the model that has this name or alias, or that was loaded by this id.

    Raises:
        ModelNotFound: there is none.
        InvalidRequest: there are several.
    """
    for model in models:
        if model_id == model.name or model_id in model.aliases:
            return model.name
    path = _path_of(model_id, config)
    found = [model for model in models if model.path == path]
    found = [model for model in found if model.is_loaded] or found
    if not found:
        raise ModelNotFound(f"No model is called {shown(model_id)} or was loaded by it.", param="model_id")
    if len(found) > 1:
        names = ", ".join(model.name for model in found)
        raise InvalidRequest(
            f"Several models were loaded by {shown(model_id)}: {names}. Send one as `model_name`.",
            param="model_id",
        )
    return found[0].name


def _path_of(model_id: str, config: ServerConfig) -> str:
    """The file of a name of the config file, an embedded model or a folder; any other path as a whole one."""
    with contextlib.suppress(InvalidConfig):
        return str(resolve_model({"model_id": model_id}, config).path)
    return os.path.abspath(os.path.expanduser(model_id))


def _find_available(config: ServerConfig, served: Sequence[ResolvedModel]) -> dict[str, dict[str, Any]]:
    """What is known of each model that can be loaded by its name, by that name.

    One that is not there, or wrong, is listed with the reason, and hides no other.
    """
    available: dict[str, dict[str, Any]] = {}
    for name in (*config.models, *installed_embedded(), *(model.name for model in served)):
        if name in available:
            continue
        try:
            entry = _to_available(_resolve({"model_id": name}, config, served))
        except InvalidConfig as error:
            available[name] = {"name": name, "problem": error.message}
        else:
            available.setdefault(entry["name"], entry)
    return available


def _to_available(model: ResolvedModel) -> dict[str, Any]:
    """
    Raises:
        InvalidConfig: its file cannot be read.
    """
    return {
        "name": model.name,
        "aliases": list(model.aliases),
        "model_type": model.spec.model_type,
        "backend": model.spec.backend,
        "path": str(model.path),
        "memory_need_bytes": estimate_memory(model).host_bytes,
        "problem": None,
    }


def _to_task(task: LoadTask) -> dict[str, Any]:
    return {
        "task_id": task.id,
        "status": task.status,
        "progress": task.progress,
        "created": task.created,
        "models": [_to_loading(model) for model in task.models],
        "error": next((model.problem for model in task.models if model.status == "failed"), None),
    }


def _to_loading(model: LoadingModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "instance": model.instance,
        "status": model.status,
        "progress": model.progress,
        "error": model.problem or None,
    }


def _to_removed(unloaded: Unloaded) -> dict[str, Any]:
    return {
        "name": unloaded.name,
        "instance": unloaded.instance,
        "memory_freed_bytes": unloaded.memory_bytes,
        "gpu_memory_freed_bytes": unloaded.gpu_bytes,
        "verified": unloaded.is_verified,
        "cut_requests": unloaded.cut_requests,
    }


def _to_model(model: ServedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "aliases": list(model.aliases),
        "model_type": model.model_type,
        "backend": model.backend,
        "path": model.path,
        "loaded": model.is_loaded,
        "states": list(model.states),
        "pinned": model.is_pinned,
        "ttl_seconds": model.ttl_seconds,
        "last_used": model.last_used,
        "busy": model.busy,
        "waiting": model.waiting,
        "waiting_tokens": model.waiting_tokens,
        "problem": model.problem or None,
        "instances": [_to_instance(instance) for instance in model.instances],
    }


def _to_instance(instance: ServedInstance) -> dict[str, Any]:
    return {
        "instance": instance.number,
        "port": instance.port,
        "state": instance.state,
        "progress": instance.progress,
        "busy": instance.busy,
        "served": instance.served,
        "capacity": instance.capacity,
        "context_length": instance.context_length,
        "ready_since": instance.ready_since,
        "starts": instance.starts,
        "process_id": instance.process_id,
        "memory_bytes": instance.memory_bytes,
        "gpus": list(instance.gpus),
        "problem": instance.problem or None,
        "engine": None if instance.status is None else _to_engine(instance.status),
    }


def _to_engine(status: WorkerStatus) -> dict[str, Any]:
    counters: dict[str, Any] = msgspec.structs.asdict(status)
    return counters
