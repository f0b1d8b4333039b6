"""What an endpoint answers while parts of it are killed and while it is asked for far more than it can do.

    python -m benchmarks.serve_faults [--items 20000] [--rate 60] [--only replica controller haproxy overload node]

`python -m serve` with two replicas is asked at a steady rate; each answer is compared with the offline one. Meanwhile a
replica, Ray Serve's controller or HAProxy gets SIGKILL, or the load rises to ten times what the endpoint can do; `node`
does it in a cluster of two nodes, of which one is lost. Printed: requests sent, answered, refused as the API says (503,
504 with Retry-After), failed in any other way, wrong answers, and the seconds until all was well again: until the last
request that failed, and until as many processes were up as before.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.promote_under_load import Answer, Expected, Load, Server, answers_of, requests_of
from benchmarks.serve_targets import make_bundle

REFUSED = (429, 503, 504)
PATIENCE_S = 60.0
HOLD_S = 4.0

Row = dict[str, Any]


def main() -> None:
    """Injects the faults one after the other and prints their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--rate", type=float, default=60, help="requests a second")
    parser.add_argument(
        "--only", nargs="+", choices=[*KILLED, "overload", "node"], default=[*KILLED, "overload", "node"]
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sf", dir="/tmp"))  # short: Ray's sockets are below it
    try:
        rows = run(folder, arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_rows(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if any(row["wrong"] for row in rows):
        sys.exit("wrong answers")


def run(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """The rows of the table."""
    bundle = make_bundle(folder / "bundle", arguments.items, 1)
    asked = requests_of(bundle, 200, 50, 20)
    expected = answers_of({"1": bundle}, asked)
    settings = [f"serve.bundle={bundle.folder}", "serve.min_replicas=2", "serve.max_replicas=2"]
    rows: list[Row] = []
    alone = [name for name in arguments.only if name != "node"]
    if alone:
        with serving(
            folder / "one", *settings, "serve.max_ongoing_requests=8", "serve.max_queued_requests=16"
        ) as served:
            for name in alone:
                load = Load(served.port, arguments.rate, 16, asked, expected)
                if name == "overload":
                    rows.append(overload(served, load, asked, expected))
                else:
                    rows.append(kill(served, load, name))
    if "node" in arguments.only:
        rows.append(lose_a_node(folder / "two", settings, arguments.rate, asked, expected))
    return rows


class Served(Server):
    """A server whose processes can be found."""

    def __init__(self, folder: Path, port: int, *settings: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, port, *settings)
        self.port = port

    def processes(self, word: str) -> list[psutil.Process]:
        """Of its own family, those whose command line holds a word."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if word in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found


KILLED = {"replica": "ServeReplica", "controller": "ServeController", "haproxy": "haproxy.cfg"}
"""What is killed, and a word of its command line."""


@contextmanager
def serving(folder: Path, *settings: str) -> Iterator[Served]:
    """A server that is ended after the block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    served = Served(folder, port, *settings)
    try:
        yield served
    finally:
        served.stop()


def kill(served: Served, load: Load, name: str) -> Row:
    """SIGKILL of one process under load."""
    word = KILLED[name]
    with load:
        time.sleep(HOLD_S)
        before = served.processes(word)
        victim = before[0]
        began = time.monotonic()
        victim.send_signal(signal.SIGKILL)

        def is_whole() -> bool:
            now = served.processes(word)
            return len(now) >= len(before) and victim.pid not in {process.pid for process in now}

        whole_s = seconds_until(is_whole)
        time.sleep(HOLD_S)
    return row_of(f"SIGKILL of {'a replica of two' if name == 'replica' else name}", load.answers, began, whole_s)


def overload(served: Served, load: Load, asked: Sequence[dict[str, Any]], expected: Expected) -> Row:
    """Ten times what the endpoint can do for some seconds."""
    peak = Load(served.port, 10_000, 8, asked, expected)  # as fast as 8 connections can
    with peak:
        time.sleep(HOLD_S)
    capacity = sum(answer.status == 200 for answer in peak.answers) / HOLD_S
    flood = Load(served.port, 10 * capacity, 400, asked, expected)
    with load:
        time.sleep(HOLD_S)
        with flood:
            time.sleep(2 * HOLD_S)
        ended = time.monotonic()
        time.sleep(HOLD_S)
    return row_of(f"10 x overload ({10 * capacity:,.0f}/s asked)", [*load.answers, *flood.answers], ended)


def lose_a_node(
    folder: Path, settings: list[str], rate: float, asked: Sequence[dict[str, Any]], expected: Expected
) -> Row:
    """A cluster of two nodes with a replica on each loses one of them."""
    from serve.profile import set_environment

    set_environment(True, 1, 10.0)  # before the cluster starts, as its own processes read it
    os.environ["RAY_AUTH_MODE"] = "disabled"
    Path("/tmp/ray").mkdir(exist_ok=True)  # noqa: S108 - Ray writes there whatever temp_dir says
    from ray.cluster_utils import Cluster

    temporary = tempfile.mkdtemp(prefix="sn", dir="/tmp")
    head = {"num_cpus": 1, "temp_dir": temporary, "include_dashboard": False, "object_store_memory": 200 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        node = cluster.add_node(num_cpus=1, object_store_memory=200 * 2**20)
        with serving(folder, *settings, f"cluster.address={cluster.address}") as served:
            load = Load(served.port, rate, 16, asked, expected)
            with load:
                time.sleep(HOLD_S)
                began = time.monotonic()
                cluster.remove_node(node, allow_graceful=False)
                time.sleep(4 * HOLD_S)
        return row_of("a node of two lost, with its replica", load.answers, began)
    finally:
        cluster.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


def seconds_until(holds: Callable[[], bool]) -> float:
    """How long it took, or infinity after PATIENCE_S."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE_S:
        if holds():
            return time.monotonic() - began
        time.sleep(0.1)
    return float("inf")


def row_of(name: str, answers: Sequence[Answer], began: float, whole_s: float | None = None) -> Row:
    """The counts of a fault that was injected at `began`; whole_s: not given where nothing has to come back."""
    statuses = Counter(answer.status for answer in answers)
    refused = sum(statuses[status] for status in REFUSED)
    ill = [answer.done - began for answer in answers if answer.status != 200 and answer.done > began]
    waits = sorted(1000 * (answer.done - answer.sent) for answer in answers if answer.status == 200)
    return {
        "fault": name, "sent": len(answers), "answered": statuses[200], "refused": refused,
        "failed": len(answers) - statuses[200] - refused,
        "wrong": sum(answer.status == 200 and not answer.is_right for answer in answers),
        "p99_ms": round(waits[int(0.99 * (len(waits) - 1))], 1) if waits else None,
        "well_s": round(max(ill, default=0.0), 2), "whole_s": None if whole_s is None else round(whole_s, 2),
    }  # fmt: skip


def print_rows(rows: Sequence[Row]) -> None:
    """The table."""
    table = Table(title="faults under load", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "fault" else "right")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
