"""Programs that the demo starts: one at a time in the foreground, or the server beside it; none outlives the demo."""

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

READY_SECONDS = 180.0
GRACE_SECONDS = 60.0
INTERRUPTED = 128 + signal.SIGINT  # the status of a command that was told to stop before it waited for that


class DemoError(Exception):
    """A step that failed."""


@contextmanager
def child(command: Sequence[str], output: IO[bytes] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A started program, terminated when the block is left before it ended, and killed when it does not obey.

    By SIGTERM: where the demo itself runs in the background, its children inherit that SIGINT is ignored.
    """
    # In a session of its own, Ctrl-C reaches it once, by us, and whatever it leaves can be found.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run(command: Sequence[str]) -> None:
    """Runs a program to its end; DemoError when it fails."""
    with child(command) as process:
        status = process.wait()
    if status:
        raise DemoError(f"the command ended with status {status}")


@contextmanager
def server(command: Sequence[str], port: int, log: Path, ready_seconds: float = READY_SECONDS) -> Iterator[None]:
    """A server that is ready at `port`; DemoError with its last output when it does not become so, or ends badly."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output, child(command, output) as process:
        deadline = time.monotonic() + ready_seconds
        while not _is_ready(port):
            if process.poll() is not None:
                raise DemoError(f"the server ended with status {process.returncode}; its last output:\n{_tail(log)}")
            if time.monotonic() > deadline:
                raise DemoError(f"the server was not ready after {ready_seconds:g} s; its last output:\n{_tail(log)}")
            time.sleep(0.3)
        yield
        process.terminate()
        try:
            status = process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            raise DemoError(f"the server did not stop in {GRACE_SECONDS:g} s:\n{_tail(log)}") from None
        if status not in (0, INTERRUPTED):
            raise DemoError(f"the server ended with status {status}; its last output:\n{_tail(log)}")


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a JSON request; DemoError when it is not 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    if answer.status != http.client.OK:
        raise DemoError(f"POST {path} was answered {answer.status}: {text[:500]}")
    found: dict[str, Any] = json.loads(text)
    return found


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/healthz/ready")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
