"""What stands around the application in a replica, so that the answers of Ray Serve itself fit the API too."""

from collections.abc import Iterable, MutableMapping
from typing import Any

from starlette.middleware import Middleware
from starlette.responses import Response

from serve.asgi import Application, Header, Message, Receive, Send
from serve.one_write import send_together
from serve.problems import MEDIA_TYPE, Problem
from serve.request_id import fit_or_new

REQUEST_ID = b"x-request-id"
UNWATCHED = (b"x-request-disconnect-disabled", b"?1")
"""Tells Ray Serve not to watch whether the client leaves, for which it starts two tasks and waits for both."""
SELF_WATCHED = frozenset(
    ("/v1/recommend", "/v1/recommend:batch", "/v1/similar-items", "/v1/rank", "/v1/explain")
)  # fmt: skip
"""Where the batcher asks for clients that left, see `serve.client`."""
DETAILS = {
    408: "The request took too long.",
    404: "There is nothing at this path.",
    503: "Too many requests are waiting; try again later.",
}


def middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH: Ray Serve puts these around every HTTP entrance."""
    return [Middleware(ProblemMiddleware, in_replica=_in_replica())]


class ProblemMiddleware:
    """Turns plain-text errors, such as Ray Serve's own 503, into problem+json; their other headers stay.

    Headers that are not UTF-8 are answered 400: Ray Serve decodes all of them and would fail with 500. Ray Serve
    echoes any X-Request-Id beside the application's: it gets to see only a fit one, and the client one only.
    Whether Ray Serve watches the client is not the client's to say.
    """

    def __init__(self, application: Application, in_replica: bool = False) -> None:
        """in_replica: the application is in this process, and looks itself for clients that left.

        A proxy of Ray Serve in another process is the only one that can tell it.
        """
        self._application, self._self_watched = application, SELF_WATCHED if in_replica else frozenset()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._application(scope, receive, send)
        elif not _is_utf8(scope["headers"]):
            await Problem(400, "A header is not UTF-8.").response({})(scope, receive, send)
        else:
            given, headers = b"", []
            for header in scope["headers"]:
                if header[0] == REQUEST_ID:
                    given = given or header[1]
                elif header[0] != UNWATCHED[0]:
                    headers.append(header)
            request_id = fit_or_new(given.decode("utf-8")).encode("ascii")
            headers.append((REQUEST_ID, request_id))
            if scope["path"] in self._self_watched:
                headers.append(UNWATCHED)
            scope["headers"] = headers
            await self._application(scope, receive, _sender(scope, receive, send, request_id))


def _sender(scope: MutableMapping[str, Any], receive: Receive, send: Send, request_id: bytes) -> Send:
    replaced: Response | None = None
    start: Message | None = None

    async def send_fitting(message: Message) -> None:
        nonlocal replaced, start
        if message["type"] == "http.response.start":
            message["headers"] = [*_without(message["headers"], REQUEST_ID), (REQUEST_ID, request_id)]
            if message["status"] >= 400:
                replaced = _replacement(message)
            start = message  # goes with the first part of the body
        elif replaced is not None:
            if not message.get("more_body"):
                await replaced(scope, receive, send)
        elif start is None:
            await send(message)
        else:
            first, start = start, None
            await send_together(send, first, message)

    return send_fitting


def _replacement(start: Message) -> Response | None:
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start["headers"]}
    if headers.get("content-type", "").startswith(MEDIA_TYPE):
        return None
    request_id = headers.pop("x-request-id")
    kept = {name: value for name, value in headers.items() if name not in ("content-type", "content-length")}
    problem = Problem(start["status"], DETAILS.get(start["status"], "The request failed."))
    return problem.response({**kept, "X-Request-Id": request_id})


def _without(headers: Iterable[Header], name: bytes) -> list[Header]:
    return [header for header in headers if header[0].lower() != name]


def _is_utf8(headers: Iterable[Header]) -> bool:
    try:
        for _, value in headers:
            if not value.isascii():
                value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _in_replica() -> bool:
    import ray.serve  # here: whoever asks has imported it long ago
    from ray.serve.exceptions import RayServeException

    try:
        ray.serve.get_replica_context()
    except RayServeException:
        return False
    return True
