"""Errors over HTTP: RFC 9457 problem details with Google's code words and JSON pointers to the fields."""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"
CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "INVALID_ARGUMENT",
    408: "DEADLINE_EXCEEDED",
    413: "INVALID_ARGUMENT",
    415: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    431: "INVALID_ARGUMENT",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
SHOWN_ERRORS = 20
SHOWN_LETTERS = 200


class FieldError(NamedTuple):
    """What is wrong with one field; `pointer` is its JSON pointer, empty for the whole body."""

    pointer: str
    detail: str


class Problem(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        detail: str,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.errors, self.headers = status, detail, errors, dict(headers or {})

    def as_json(self, request_id: str | None = None) -> dict[str, Any]:
        """The problem as JSON data."""
        problem: dict[str, Any] = {
            "type": "about:blank",
            "title": _phrase(self.status),
            "status": self.status,
            "code": CODES.get(self.status, "INVALID_ARGUMENT" if self.status < 500 else "INTERNAL"),
            "detail": self.detail,
        }
        if self.errors:
            problem["errors"] = [
                {"pointer": _short(error.pointer), "detail": _short(error.detail)}
                for error in self.errors[:SHOWN_ERRORS]
            ]
        if request_id is not None:
            problem["request_id"] = request_id
        return problem

    def body(self, request_id: str | None = None) -> bytes:
        """The problem as a body, plain ASCII."""
        return json.dumps(self.as_json(request_id), separators=(",", ":")).encode("ascii")

    def response(self, headers: Mapping[str, str]) -> Response:
        """The problem as a response with further headers; their X-Request-Id stands in the body too."""
        return Response(self.body(headers.get("X-Request-Id")), self.status, {**headers, **self.headers}, MEDIA_TYPE)


def pointer(parts: Sequence[str | int]) -> str:
    """The JSON pointer (RFC 6901) of a path."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in HTTPStatus.__members__.values() else "Error"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_LETTERS else text[:SHOWN_LETTERS] + "..."
