"""JSON in and out: bodies read within their limits and parsed strictly, mistakes named by their JSON pointers."""

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serve.depth import MAX_DEPTH, is_deeper
from serve.fields import EVENT_TAG, ID_TAG, Strict
from serve.problems import SHOWN_ERRORS, FieldError, Problem, pointer
from serve.record import current

MAX_BODY_BYTES = 2**20

Model = TypeVar("Model", bound=Strict)
Path = tuple[str | int, ...]


async def read_json(request: Request) -> Any:
    """The JSON of the body; Problem 400, 413 or 415 when it is none, too large, or of another type."""
    return parse_json(await read_body(request))


async def read_body(request: Request) -> bytes:
    """The body; Problem 415 when it is no JSON by its headers, 413 as soon as it is known to be too large."""
    _check_headers(request.scope["headers"])
    size, parts, more = 0, [], True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise _too_large()
        parts.append(part)
    current().lap("read")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def parse_json(body: bytes) -> Any:
    """What a body says; Problem 400 for all that is not JSON, NaN and a field given twice among it."""
    if is_deeper(body):
        text = f"nested more than {MAX_DEPTH} deep"
        raise Problem(400, f"The body is {text}.", [FieldError("", text)])
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Problem(400, "The body is not UTF-8.", [FieldError("", f"byte {error.start} is not UTF-8")]) from error
    except ValueError as error:  # JSONDecodeError, our own two, and whole numbers of thousands of digits
        raise Problem(400, "The body is not JSON.", [FieldError("", str(error))]) from error


def parse(model: type[Model], data: Any, path: Path = ()) -> Model:
    """`data` as a `model`; Problem 400 names every field that is wrong. `path`: where in the body it was."""
    if not isinstance(data, dict):
        text = "not a JSON object"
        raise Problem(400, f"{pointer(path) or 'The body'} is {text}.", [FieldError(pointer(path), text)])
    fields = model.model_fields
    unknown = [name for name in data if name not in fields]
    errors = [FieldError(pointer((*path, name)), _unknown(name, fields)) for name in unknown[:SHOWN_ERRORS]]
    try:
        parsed = model.model_validate({name: value for name, value in data.items() if name in fields})
    except ValidationError as error:
        errors += _field_errors(error, path)
    if errors:
        raise invalid(errors, len(errors) + max(0, len(unknown) - SHOWN_ERRORS))
    current().lap("parse")
    return parsed


def invalid(errors: Sequence[FieldError], total: int | None = None) -> Problem:
    """The Problem 400 of fields that are wrong; `total`: how many are, when not all of them are in `errors`."""
    fields = ", ".join(error.pointer or "the body" for error in errors[:3])
    return Problem(400, f"The request has {total or len(errors)} invalid field(s): {fields[:200]}", errors)


def answer(body: Mapping[str, Any], headers: Mapping[str, str], status: int = 200) -> Response:
    """A JSON answer."""
    try:
        encoded = orjson.dumps(body)
    except TypeError:  # half of a surrogate pair in an id or a title, or a whole number of more than 64 bits
        encoded = json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")
    current().lap("encode")
    return JsonAnswer(encoded, status, headers)


class JsonAnswer(Response):
    """JSON with its headers as they are sent, made in a few steps."""

    def __init__(self, body: bytes, status: int, headers: Mapping[str, str]) -> None:
        self.body, self.status_code, self.background = body, status, None
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        for name, value in headers.items():
            self.raw_headers.append((name.lower().encode("latin-1"), value.encode("latin-1")))


def answer_headers(version: str | None = None) -> dict[str, str]:
    """What every answer carries: the id of the request, and the version of the model that it was put to."""
    record = current()
    headers = {"X-Request-Id": record.request_id}
    if version is not None:
        headers["X-Model-Version"] = record.version = version
    return headers


def plain(value: Any) -> Any:
    """A value of the item table as JSON has it: dates, decimals and bytes as text, NaN as null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _check_headers(headers: Iterable[tuple[bytes, bytes]]) -> None:
    media_type = encoding = announced = b""
    for name, value in headers:
        if name == b"content-type":
            media_type = media_type or value
        elif name == b"content-encoding":
            encoding = encoding or value
        elif name == b"content-length":
            announced = announced or value
    if media_type != b"application/json" and not _is_json(media_type):
        raise Problem(415, "The body must be application/json in UTF-8.")
    if encoding and encoding.lower() != b"identity":
        raise Problem(415, "The body must not be compressed.")
    if announced.isdigit() and (len(announced) > 9 or int(announced) > MAX_BODY_BYTES):
        raise _too_large()


def _is_json(media_type: bytes) -> bool:
    name, _, parameters = media_type.lower().partition(b";")
    charset = parameters.strip()
    return name.strip() == b"application/json" and charset in (b"", b"charset=utf-8", b'charset="utf-8"')


def _too_large() -> Problem:
    return Problem(413, f"The body is larger than {MAX_BODY_BYTES} bytes.", headers={"Connection": "close"})


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = Counter(name for name, _ in pairs)
        twice = names.most_common(1)[0][0]
        raise ValueError(f"field {twice!r} is given twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _unknown(name: str, fields: Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(name[:64], fields, 1)
    return f"unknown field; nearest: {nearest[0]}" if nearest else "unknown field"


def _field_errors(error: ValidationError, path: Path) -> list[FieldError]:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return [
        FieldError(pointer((*path, *(step for step in one["loc"] if step not in (ID_TAG, EVENT_TAG)))), one["msg"])
        for one in found
    ]
