"""From the bytes of a request to a validated model: bounded, strict, and with errors that say where.

Python's own JSON reader takes more than JSON (NaN, Infinity, duplicate keys, half surrogates), and our wire
takes less (numbers of 64 bits); all of these are refused here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import ErrorDetails, core_schema
from starlette.requests import ClientDisconnect, Request

from gallama.api.error_answers import ClientLeft, shown
from gallama.errors import InvalidRequest, RequestTimeout, RequestTooLarge, ServerFull, UnsupportedValue

MAX_DEPTH = 128
"""Of objects and lists in each other."""
SILENCE_SECONDS = 60.0
"""How long a client may pause in the middle of its body."""
MIN_BYTES_PER_SECOND = 16 * 1024
"""How fast a body must come, all in all, after its first `SILENCE_SECONDS`."""
MAX_BODIES = 16
"""So many bodies of the largest size may be in memory at the same time, or more of smaller ones."""
MAX_TOKENS = 2**20
"""In one list of token ids: more than a model's context holds."""

_SMALL_BYTES = 64 * 1024
_RETRY_SECONDS = 1
_MAX_PATH_LENGTH = 200
_PARSED_ASIDE_BYTES = 256 * 1024
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_MIN_INTEGER, _MAX_INTEGER = -(2**63), 2**64 - 1

T = TypeVar("T")
Body = TypeVar("Body", bound="StrictBody")
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MAX_TOKENS)]
_STOPPABLE = ("list", "dict")


def _stop_at_first_problem(schema: Any) -> None:
    """Have lists and objects checked only up to what is wrong: a million problems, of which one is told,
    would take as many kilobytes."""
    if isinstance(schema, dict):
        if schema.get("type") in _STOPPABLE:
            schema["fail_fast"] = True
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for part in schema:
            _stop_at_first_problem(part)


class StrictBody(BaseModel):
    """What all bodies share: no unknown fields, no values turned into other types, and null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=False)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        schema = handler(source)
        _stop_at_first_problem(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _take_null_as_absent(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((name for name in values if name not in known), None)
        return {
            name: value
            for name, value in values.items()
            # One that is unknown is enough to refuse them all.
            if (value is not None if name in known else name == unknown)
        }


class BodyRoom:
    """The memory for bodies that are being read and parsed. Small ones, of which there cannot be more than
    connections, always have some: nobody can lock others out by sending large ones."""

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """The room of one body: a function to be told how many bytes there are by now.

        Raises:
            ServerFull: from that function; others have taken all there is.
        """
        held = 0

        def hold(total_bytes: int) -> None:
            nonlocal held
            wanted = max(total_bytes - _SMALL_BYTES, 0) - held
            if wanted > self._left:
                raise ServerFull(
                    "The server reads as many large requests as it may; try again soon.",
                    retry_after_seconds=_RETRY_SECONDS,
                )
            self._left -= wanted
            held += wanted

        try:
            yield hold
        finally:
            self._left += held


async def read_body(request: Request, body_type: type[Body], *, max_bytes: int) -> Body:
    """Read, parse and validate the body of a request.

    Raises:
        RequestTooLarge, RequestTimeout: it is too long, or does not arrive.
        ServerFull: there is no room for it now.
        InvalidRequest: it is not JSON, or not what `body_type` describes; `param` is the path to the value.
        ClientLeft: the client hung up.
    """
    return await _read_and_parse(request, lambda raw: parse_body(raw, body_type), max_bytes)


async def read_body_of(
    request: Request, choose: Callable[[Mapping[str, Any]], type[Body]], *, max_bytes: int
) -> Body:
    """As `read_body`, where what else is in the body may depend on what is.

    Raises:
        GallamaError: as for `read_body`, and from `choose`.
    """
    return await _read_and_parse(request, lambda raw: _parse_body_of(raw, choose), max_bytes)


async def read_json(request: Request, *, max_bytes: int) -> Any:
    """Read and parse the body of a request that may be a list as well.

    Raises:
        RequestTooLarge, RequestTimeout: it is too long, or does not arrive.
        ServerFull: there is no room for it now.
        InvalidRequest: it is not JSON.
        ClientLeft: the client hung up.
    """
    return await _read_and_parse(request, parse_json, max_bytes)


async def _read_and_parse(request: Request, parse: Callable[[bytes], T], max_bytes: int) -> T:
    _check_headers(request)
    room: BodyRoom = request.app.state.body_room
    with room.share() as hold:
        raw = await _read_bytes(request, max_bytes, hold)
        if len(raw) > _PARSED_ASIDE_BYTES:
            return await asyncio.to_thread(parse, raw)
        return parse(raw)


def parse_body(raw: bytes, body_type: type[Body]) -> Body:
    """
    Raises:
        InvalidRequest: as for `read_body`.
    """
    return _parse_body_of(raw, lambda _: body_type)


def _parse_body_of(raw: bytes, choose: Callable[[Mapping[str, Any]], type[Body]]) -> Body:
    values = parse_json(raw)
    if not isinstance(values, dict):
        raise InvalidRequest("The body must be a JSON object.")
    try:
        return choose(values).model_validate(values)
    except ValidationError as error:
        raise _to_invalid_request(error, values) from None


def parse_json(raw: bytes) -> Any:
    """Parse strict JSON.

    Raises:
        InvalidRequest: it is not JSON, or not such that every reader understands it in the same way.
    """
    try:
        values = json.loads(
            raw.decode(),
            object_pairs_hook=_to_dict,
            parse_constant=_refuse_constant,
            parse_int=_parse_integer,
            parse_float=_parse_float,
        )
        _check_tree(values, check_text=_SURROGATE_ESCAPE.search(raw) is not None)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8: byte {error.start} is wrong.") from None
    except UnicodeEncodeError:
        raise InvalidRequest("The body has half of a surrogate pair in a string.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"The body is not JSON: {error.msg} at {where}.") from None
    except RecursionError:
        raise _too_deep() from None
    return values


def _check_headers(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise UnsupportedValue(
            f"Content-Encoding {shown(encoding)} is not supported; send the body as it is."
        )
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise UnsupportedValue(f"Content-Type must be application/json, not {shown(content_type)}.")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal():
        raise InvalidRequest("Content-Length is not a number.")


async def _read_bytes(request: Request, max_bytes: int, hold: Callable[[int], None]) -> bytes:
    announced = int(request.headers.get("content-length", "0"))
    if announced > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    chunks = aiter(request.stream())
    began = time.monotonic()
    try:
        while True:
            async with asyncio.timeout(SILENCE_SECONDS):
                chunk = await anext(chunks)
            body += chunk
            if len(body) > max_bytes:
                raise _too_large(max_bytes)
            hold(len(body))
            _check_pace(len(body), time.monotonic() - began)
    except StopAsyncIteration:
        return bytes(body)
    except TimeoutError:
        raise RequestTimeout(f"No more of the body came for {SILENCE_SECONDS:.0f} s.") from None
    except ClientDisconnect:
        raise ClientLeft from None


def _check_pace(received_bytes: int, seconds: float) -> None:
    """
    Raises:
        RequestTimeout: a body comes so slowly that it may never end.
    """
    if seconds > SILENCE_SECONDS + received_bytes / MIN_BYTES_PER_SECOND:
        raise RequestTimeout(
            f"The body comes too slowly: {received_bytes} bytes in {seconds:.0f} s; send at least"
            f" {MIN_BYTES_PER_SECOND} bytes per second."
        )


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body is larger than the {max_bytes} bytes that this server reads.")


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"The body nests objects or lists more than {MAX_DEPTH} deep.")


def _to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"The body has the key {shown(twice)} twice in one object.")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"The body has {name}, which is not JSON.")


def _parse_integer(digits: str) -> int:
    # The length first: turning a million digits into a number takes long.
    if len(digits) > 20 or not _MIN_INTEGER <= (value := int(digits)) <= _MAX_INTEGER:
        raise InvalidRequest(f"The body has the integer {digits[:40]}, which is beyond 64 bits.")
    return value


def _parse_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise InvalidRequest(f"The body has the number {digits[:40]}, which is too large.")
    return value


def _check_tree(root: Any, *, check_text: bool) -> None:
    """
    Raises:
        InvalidRequest: nested too deep.
        UnicodeEncodeError: a string is no text; only noticed with `check_text`.
    """
    level = [root]
    for _ in range(MAX_DEPTH + 1):
        if check_text:
            _check_text(level)
        level = [child for value in level if isinstance(value, dict | list) for child in _children(value)]
        if not level:
            return
    raise _too_deep()


def _children(value: dict[str, Any] | list[Any]) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _check_text(values: list[Any]) -> None:
    for value in values:
        if isinstance(value, str):
            value.encode()
        elif isinstance(value, dict):
            "".join(value).encode()


def _to_invalid_request(error: ValidationError, values: dict[str, Any]) -> InvalidRequest:
    """The problem at the deepest place: among the variants of a union, the one that the client meant."""
    problems = [
        (_path(problem["loc"], values, is_missing=problem["type"] == "missing"), problem)
        for problem in error.errors(include_url=False)
    ]
    deepest = max(len(path) for path, _ in problems)
    path = next(path for path, _ in problems if len(path) == deepest)
    words = dict.fromkeys(_words(problem) for other, problem in problems if other == path)
    name = _as_text(path)
    return InvalidRequest(
        f"{name}: {', or: '.join(words)}." if name else f"{'; '.join(words)}.", param=name or None
    )


def _path(location: Sequence[str | int], values: Any, *, is_missing: bool) -> tuple[str | int, ...]:
    """The place of a problem in the body: pydantic's own, without the names of a union's variants.

    Such a name may also be a key of the values; the reading that leaves out less is the right one.
    """
    if not location:
        return ()
    part, rest = location[0], location[1:]
    left_out = _path(rest, values, is_missing=is_missing)
    if _has(values, part):
        return max(left_out, (part, *_path(rest, values[part], is_missing=is_missing)), key=len)
    return (part,) if is_missing and not rest else left_out


def _has(values: Any, part: str | int) -> bool:
    if isinstance(values, list):
        return isinstance(part, int) and part < len(values)
    return isinstance(values, dict) and part in values


def _as_text(path: Sequence[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")[:_MAX_PATH_LENGTH]


def _words(problem: ErrorDetails) -> str:
    if problem["type"] == "extra_forbidden":
        return "there is no such field"
    message = problem["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
