"""A server in a thread, and clients that speak to it over a bare socket, as slowly as they like."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

HEAD = b"POST /v1/recommend HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"


@contextmanager
def serving(application: object, port: int, http: Any = "auto") -> Iterator[None]:
    """Runs an ASGI application on a port of loopback, as a replica does: with uvicorn, and `http` as its protocol."""
    config = uvicorn.Config(application, port=port, http=http, log_level="critical", lifespan="off")  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join()


def trickle(port: int, start: bytes, *, every_s: float = 0.1, limit_s: float = 10.0) -> tuple[bytes, float]:
    """Sends `start`, then a letter now and then; all that is answered until the server hangs up, and after how long."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=every_s) as client:
        client.sendall(start)
        answer = b""
        while time.monotonic() - began < limit_s:
            try:
                part = client.recv(65536)
            except TimeoutError:
                with suppress(OSError):  # the server hung up in this moment, which the next recv tells
                    client.sendall(b"x")
                continue
            except ConnectionResetError:  # it hung up on a letter that it had not read, which may cost the answer
                break
            if not part:
                break
            answer += part
    return answer, time.monotonic() - began
