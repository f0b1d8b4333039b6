"""A Ray cluster of the tests' own from `ray start`: a head and a node, with tokens, its own ports and folders."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
HEAD_CPUS, NODE_CPUS = 1, 1


@dataclass(frozen=True)
class OwnCluster:
    """What is needed to speak to it."""

    address: str
    """Of its dashboard, which takes jobs."""
    environment: dict[str, str]
    """For the `ray` command: the token's file among it."""
    metrics: tuple[str, ...]
    """Where each node tells its metrics."""

    def ray(self, *arguments: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
        """Runs `ray ARGUMENTS` from the checkout."""
        return subprocess.run(
            [str(BIN / "ray"), *arguments], env=self.environment, cwd=Path(__file__).parent.parent,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nothing listens on, outside the range of Ray's workers."""
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
            if port >= 20_000:
                found.append(port)
    return found


@contextmanager
def own_cluster(more: Mapping[str, str]) -> Iterator[OwnCluster]:
    """A head with HEAD_CPUS and a node with NODE_CPUS that live as long as the block; `more` is their environment."""
    folder = tempfile.mkdtemp(prefix="sj", dir="/tmp")
    token = Path(folder, "token")
    token.write_text(secrets.token_hex(32))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {
        **more, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{environment['PATH']}", "XDG_CACHE_HOME": f"{folder}/cache",
    }  # fmt: skip
    port, dashboard, client, *agents = free_ports(9)
    head = [
        "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        f"--ray-client-server-port={client}", f"--temp-dir={folder}/r", f"--num-cpus={HEAD_CPUS}",
    ]  # fmt: skip
    node = [f"--address=127.0.0.1:{port}", f"--num-cpus={NODE_CPUS}"]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for arguments, ports in ((head, agents[:3]), (node, agents[3:])):
            stack.enter_context(_started(arguments, ports, environment, Path(folder)))
            _wait(f"http://127.0.0.1:{dashboard}/nodes?view=summary", token.read_text(), 1 if arguments is head else 2)
        yield OwnCluster(
            f"http://127.0.0.1:{dashboard}", environment, tuple(f"http://127.0.0.1:{agents[i]}/metrics" for i in (2, 5))
        )


@contextmanager
def _started(arguments: list[str], ports: list[int], environment: dict[str, str], folder: Path) -> Iterator[None]:
    command = [
        str(BIN / "ray"), "start", *arguments, "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
        "--object-store-memory=200000000", f"--dashboard-agent-listen-port={ports[0]}",
        f"--dashboard-agent-grpc-port={ports[1]}", f"--metrics-export-port={ports[2]}",
    ]  # fmt: skip
    with (folder / f"start-{ports[0]}.txt").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs([*family, psutil.Process(process.pid)], timeout=20)
        for left in alive:
            left.kill()
        process.wait()


def _wait(url: str, token: str, nodes: int) -> None:
    """Until the dashboard tells of so many nodes that are alive."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                summary = json.load(answer)["data"]["summary"]
        except (OSError, ValueError, KeyError):
            summary = []
        if sum(node.get("raylet", {}).get("state") == "ALIVE" for node in summary) >= nodes:
            return
        time.sleep(0.3)
    raise AssertionError(f"no {nodes} nodes after 200 s")
