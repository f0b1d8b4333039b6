"""A response leaves uvicorn in one write, whatever it looks like."""

import http.client
from collections.abc import Iterator
from typing import Any

import pytest
from raw_http import serving
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.asgi import Message, Receive, Send
from serve.middleware import ProblemMiddleware

START = {"type": "http.response.start", "status": 200}
LENGTH = (b"content-length", b"5")
RESPONSES: dict[str, list[Message]] = {
    "/usual": [{**START, "headers": [LENGTH]}, {"type": "http.response.body", "body": b"hello"}],
    "/closing": [
        {**START, "headers": [LENGTH, (b"connection", b"close")]}, {"type": "http.response.body", "body": b"hello"},
    ],
    "/empty": [{**START, "status": 204, "headers": []}, {"type": "http.response.body"}],
    "/parts": [
        {**START, "headers": []},
        *({"type": "http.response.body", "body": part, "more_body": True} for part in (b"he", b"ll")),
        {"type": "http.response.body", "body": b"o"},
    ],
}  # fmt: skip
WRITES: list[bytes] = []


class Spy:
    """A transport that notes what is written."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        WRITES.append(bytes(data))
        self._transport.write(data)


class Protocol(HttpToolsProtocol):
    def connection_made(self, transport: Any) -> None:
        super().connection_made(Spy(transport))  # type: ignore[arg-type]


async def application(scope: Any, _receive: Receive, send: Send) -> None:
    for message in RESPONSES[scope["path"]]:
        await send(dict(message))


@pytest.fixture(scope="module")
def connection(module_port: int) -> Iterator[http.client.HTTPConnection]:
    with serving(ProblemMiddleware(application), module_port, Protocol):
        client = http.client.HTTPConnection("127.0.0.1", module_port, timeout=10)
        yield client
        client.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "writes"),
    [
        ("GET", "/usual", b"hello", 1),
        ("POST", "/usual", b"hello", 1),
        ("HEAD", "/usual", b"", 1),
        ("GET", "/empty", b"", 1),
        ("GET", "/parts", b"hello", 3),
        ("GET", "/closing", b"hello", 1),
        ("GET", "/usual", b"hello", 1),
    ],
)
def test_head_and_body_are_one_write(
    method: str, path: str, body: bytes, writes: int, connection: http.client.HTTPConnection
) -> None:
    WRITES.clear()
    connection.request(method, path, b"{}" if method == "POST" else None)
    response = connection.getresponse()
    assert response.read() == body
    assert response.headers["x-request-id"]
    assert len(WRITES) == writes
