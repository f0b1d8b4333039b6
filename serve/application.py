"""The HTTP application: recommendations and health, from a Recommender alone, without Ray."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from seqray.errors import BundleError
from seqray.recommender import Query, Recommendation, Recommender
from serve.batcher import Batcher
from serve.openapi import openapi_document
from serve.problems import Problem
from serve.request_id import fit_or_new
from serve.schemas import parse_request

MAX_BODY_BYTES = 2**20
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


class Service:
    """What the endpoints need: the recommender behind its batcher, and whether it may be asked."""

    def __init__(self, recommender: Recommender, name: str, max_batch_size: int) -> None:
        self.recommender = recommender
        self.version = recommender.bundle.version
        self.model = {"name": name, "version": self.version, "variant": "champion"}
        self.batcher: Batcher[Query, Recommendation] = Batcher(recommender.recommend, max_batch_size)
        self.ready = False
        self._max_batch_size = max_batch_size

    def warm_up(self) -> None:
        """Answers requests of several sizes, checks that one was ranked by the model, then opens; or BundleError."""
        [popular] = self.recommender.recommend([Query((), k=1)])
        history = tuple(item.item_id for item in popular.items)
        query = Query(history, k=10, exclude_seen=False)
        for size in {1, min(4, self._max_batch_size), self._max_batch_size}:
            answers = self.recommender.recommend([query] * size)
        items = answers[0].items
        if not items or not all(item.source == "model" and math.isfinite(item.score) for item in items):
            raise BundleError(f"{self.recommender.bundle.folder}: the model did not rank the warm-up request: {items}")
        self.ready = True


def build_application(service: Service) -> FastAPI:
    """The application over `service`; POST /v1/recommend, /healthz/live, /healthz/ready, /openapi.json, /docs."""

    async def recommend(request: Request) -> Response:
        return await _recommend(service, request)

    async def live(request: Request) -> Response:
        return Response(b'{"status":"live"}', headers=_headers(request), media_type="application/json")

    async def ready(request: Request) -> Response:
        if not service.ready:
            return Problem(503, "The model is not ready.", headers={"Retry-After": "1"}).response(_headers(request))
        body = json.dumps({"status": "ready", "model": service.model}).encode("ascii")
        return Response(body, headers=_headers(request, service.version), media_type="application/json")

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        problem = Problem(error.status_code, str(error.detail), headers=error.headers)
        return problem.response(_headers(request))

    async def own_fault(request: Request, _error: Exception) -> Response:
        return Problem(500, "The server failed on this request.").response(_headers(request))

    application = FastAPI(
        title="seqray",
        version="1",
        redoc_url=None,
        exception_handlers={HTTPException: http_error, Exception: own_fault},
    )
    application.openapi = lambda: openapi_document(service.model["name"])  # type: ignore[method-assign]
    # Starlette's own routes: FastAPI would read and check the body itself, more slowly and with other errors.
    application.router.add_route("/v1/recommend", recommend, methods=["POST"])
    for path in ("/healthz/live", "/v2/health/live"):
        application.router.add_route(path, live, methods=["GET"])
    for path in ("/healthz/ready", "/v2/health/ready"):
        application.router.add_route(path, ready, methods=["GET"])
    return application


async def _recommend(service: Service, request: Request) -> Response:
    headers = _headers(request, service.version)
    try:
        _check_media_type(request)
        asked, warnings = parse_request(await _read_body(request))
        if not service.ready:
            raise Problem(503, "The model is not ready.", headers={"Retry-After": "1"})
        answer = await service.batcher.submit(asked.query())
    except Problem as problem:
        return problem.response(headers)
    except ClientDisconnect:
        return Response(status_code=400)  # nobody is there to read it
    metadata = None
    if "metadata" in asked.include:
        metadata = service.recommender.metadata(item.item_id for item in answer.items)
    body = {
        "recommendation_id": new_recommendation_id(),
        "model": service.model,
        "items": _items(answer, "score" in asked.include, metadata),
        "unknown_items": answer.unknown_items,
        "fallback_used": answer.fallback_used,
        "warnings": warnings,
    }
    # ASCII with escapes: no id or title can then fail to be encoded.
    encoded = json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")
    return Response(encoded, headers=headers, media_type="application/json")


def new_recommendation_id() -> str:
    """rec_ and a ULID: 48 bits of milliseconds and 80 random ones, so that ids sort by time."""
    number = (time.time_ns() // 1_000_000 << 80) | int.from_bytes(os.urandom(10))
    return "rec_" + "".join(CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def _items(answer: Recommendation, score: bool, metadata: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    items = []
    for rank, item in enumerate(answer.items, start=1):
        shown: dict[str, Any] = {"item_id": _plain_id(item.item_id), "rank": rank}
        if score:
            shown["score"] = item.score
        shown["source"] = item.source
        if metadata is not None:
            shown["metadata"] = _plain(metadata[rank - 1])
        items.append(shown)
    return items


def _plain_id(item_id: Any) -> str | int:
    return item_id if isinstance(item_id, str | int) else str(item_id)


def _plain(value: Any) -> Any:
    """A value of the item table as JSON has it: dates, decimals and bytes as text, NaN as null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _check_media_type(request: Request) -> None:
    media_type, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower()
    if media_type.strip().lower() != "application/json" or charset not in ("", "charset=utf-8", 'charset="utf-8"'):
        raise Problem(415, "The body must be application/json in UTF-8.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(415, "The body must not be compressed.")


async def _read_body(request: Request) -> bytes:
    """The body; Problem 413 as soon as it is known to be too large."""
    too_large = Problem(413, f"The body is larger than {MAX_BODY_BYTES} bytes.", headers={"Connection": "close"})
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 9 or int(announced) > MAX_BODY_BYTES):
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def _headers(request: Request, version: str | None = None) -> dict[str, str]:
    headers = {"X-Request-Id": fit_or_new(request.headers.get("x-request-id", ""))}
    if version is not None:
        headers["X-Model-Version"] = version
    return headers
