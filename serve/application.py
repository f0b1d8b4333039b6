"""The HTTP application: the table of endpoints over a Service, without Ray."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from seqray.serve_config import ServeConfig
from serve import events, health, metrics_page, models, page, recommending, searching
from serve.asgi import Application, Receive, Send
from serve.bodies import answer_headers
from serve.client import ClientLeft
from serve.entrance import CLIENT_LEFT, Entrance
from serve.guard import Guard
from serve.journal import Journal
from serve.openapi import openapi_document
from serve.problems import Problem
from serve.service import Service

Handler = Callable[[Service, Request], Awaitable[Response]]

ENDPOINTS: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/recommend", recommending.recommend),
    ("POST", "/v1/recommend:batch", recommending.batch),
    ("POST", "/v1/similar-items", recommending.similar_items),
    ("POST", "/v1/rank", recommending.rank),
    ("POST", "/v1/explain", recommending.explain),
    ("POST", "/v1/events", events.record),
    ("GET", "/v1/items", searching.items),
    ("GET", "/v1/models", models.models),
    ("GET", "/healthz/live", health.live),
    ("GET", "/v2/health/live", health.live),
    ("GET", "/healthz/ready", health.ready),
    ("GET", "/v2/health/ready", health.ready),
    ("GET", "/metrics", metrics_page.metrics),
)
PLAYGROUND: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/", page.index),
    ("GET", "/playground/{name}", page.part),
)


def build_application(service: Service, playground: bool = False, settings: ServeConfig | None = None) -> Application:
    """The endpoints of `ENDPOINTS`, /openapi.json and /docs; with `playground` its page at /.

    All of it behind an Entrance, which without settings asks for no keys.
    """
    settings = settings or ServeConfig()
    guard = Guard.of(settings)
    pages = FastAPI(
        title="seqray",
        version="1",
        redoc_url=None,
        exception_handlers={HTTPException: _http_error, Exception: _own_fault},
    )
    pages.openapi = lambda: openapi_document(service.name, guard is not None)  # type: ignore[method-assign]
    # Starlette's own routes: FastAPI would read and check the body itself, more slowly and with other errors.
    for method, path, handler in ENDPOINTS + (PLAYGROUND if playground else ()):
        pages.router.add_route(path, _endpoint(service, handler), methods=[method])
    return Entrance(
        _StraightToHandlers(service, pages),
        measures=service.measures,
        guard=guard,
        journal=Journal(settings.log.sample, service.measures.replica),
        body_timeout_s=settings.body_timeout_s,
    )


class _StraightToHandlers:
    """ASGI: a request that names an endpoint exactly meets its handler at once. FastAPI in between took 24 of 112 µs.

    Everything else (other methods, other paths, the documentation) goes the way through FastAPI.
    """

    def __init__(self, service: Service, pages: FastAPI) -> None:
        self._pages = pages
        self._endpoints = {(method, path): _endpoint(service, handler) for method, path, handler in ENDPOINTS}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        endpoint = self._endpoints.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if endpoint is None:
            await self._pages(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await endpoint(request)
        except Exception:
            await (await _own_fault(request, None))(scope, receive, send)
            raise  # for the log of the server
        await response(scope, receive, send)


def _endpoint(service: Service, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(service, request)
        except Problem as problem:
            return problem.response(answer_headers())
        except (ClientDisconnect, ClientLeft):
            return Response(status_code=CLIENT_LEFT)  # for the counts: nobody is there to read it

    return endpoint


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = Problem(error.status_code, str(error.detail), headers=error.headers)
    return problem.response(answer_headers())


async def _own_fault(request: Request, _error: Exception | None) -> Response:
    return Problem(500, "The server failed on this request.").response(answer_headers())
