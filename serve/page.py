"""GET /: the playground, a page that asks the API of the server it came from, and nothing else."""

from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from serve.bodies import answer_headers
from serve.problems import Problem
from serve.service import Service

FOLDER = Path(__file__).parent / "playground"
MEDIA_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "playground.css": "text/css; charset=utf-8",
    "playground.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "parts.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    # Titles are data: were one ever taken for markup, nothing inline and nothing from elsewhere could run.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


async def index(_service: Service, _request: Request) -> Response:
    """The page itself."""
    return _file("index.html")


async def part(_service: Service, request: Request) -> Response:
    """Its styles, scripts and icon."""
    return _file(request.path_params["name"])


def _file(name: str) -> Response:
    if name not in MEDIA_TYPES:
        raise Problem(404, "There is nothing at this path.")
    return Response(_content(name), headers={**answer_headers(), **HEADERS}, media_type=MEDIA_TYPES[name])


@cache
def _content(name: str) -> bytes:
    return (FOLDER / name).read_bytes()
