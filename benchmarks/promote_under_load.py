"""What a promote and a rollback cost an endpoint under load: `python -m serve` with a registry, asked all the while.

    python -m benchmarks.promote_under_load [--items 20000] [--rate 100] [--connections 8] [--replicas 1] [--json FILE]

Two bundles of random weights are made; the first is served. Requests leave at a steady rate on connections that stay
open, whether answers come or not. `python -m serve promote` and `rollback` run meanwhile. Each answer is compared with
the offline answers of the bundle whose version it names, so that one of mixed models, or of the wrong one, is seen.
"""

import argparse
import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.serve_targets import make_bundle
from seqray.bundle import Bundle
from seqray.recommender import Query, Recommender

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-3
"""Of a score: batches of other sizes round otherwise. The scores of the two bundles are farther apart."""

Items = list[tuple[str, float]]
Expected = dict[tuple[str, int], Items]


@dataclass(frozen=True)
class Answer:
    """What came of a request."""

    sent: float
    """Seconds on the clock of time.monotonic."""
    done: float
    status: int
    """0: no answer."""
    version: str
    is_right: bool


@dataclass(frozen=True)
class Phase:
    """Answers to the requests of a stretch of time."""

    name: str
    answers: Sequence[Answer]
    swap_s: float | None = None
    """From the call of the command to the last request that the old version answered."""
    command_s: float | None = None

    def row(self) -> dict[str, Any]:
        answered = [answer for answer in self.answers if answer.status == 200]
        waits = [1000 * (answer.done - answer.sent) for answer in answered] or [float("nan")]
        p50, p99 = np.percentile(waits, [50, 99])
        return {
            "phase": self.name, "sent": len(self.answers), "answered": len(answered),
            "failed": len(self.answers) - len(answered), "wrong": sum(not answer.is_right for answer in answered),
            "versions": ", ".join(sorted({answer.version for answer in answered})), "p50_ms": round(float(p50), 1),
            "p99_ms": round(float(p99), 1), "max_ms": round(max(waits), 1), "swap_s": self.swap_s,
            "command_s": self.command_s,
        }  # fmt: skip


class Load:
    """Requests at a steady rate over several connections, each with a thread of its own, until told to stop."""

    def __init__(self, port: int, rate: float, connections: int, asked: Sequence[dict[str, Any]], expected: Expected):
        self.answers: list[Answer] = []
        self._port, self._asked, self._expected = port, asked, expected
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number, connections / rate)) for number in range(connections)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int, every_s: float) -> None:
        due = time.monotonic() + every_s * number / len(self._threads)
        connection: http.client.HTTPConnection | None = None
        while not self._ended.wait(max(0.0, due - time.monotonic())):
            place = random.randrange(len(self._asked))
            connection, answer = self._ask(connection, place, due)
            self.answers.append(answer)
            due += every_s
        if connection is not None:
            connection.close()

    def _ask(
        self, connection: http.client.HTTPConnection | None, place: int, due: float
    ) -> tuple[http.client.HTTPConnection | None, Answer]:
        connection = connection or http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            body = json.dumps(self._asked[place])
            connection.request("POST", "/v1/recommend", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            told = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            connection.close()
            return None, Answer(due, time.monotonic(), 0, "", False)
        done = time.monotonic()
        if response.status != 200:
            return connection, Answer(due, done, response.status, "", False)
        version = str(told["model"]["version"])
        items = [(item["item_id"], item["score"]) for item in told["items"]]
        return connection, Answer(due, done, 200, version, is_as(items, self._expected[version, place]))


def is_as(items: Items, expected: Items) -> bool:
    """Whether an answer is the expected one; neighbours whose scores are within TOLERANCE may change places."""
    if len(items) != len(expected):
        return False
    scores = np.array([score for _, score in items]), np.array([score for _, score in expected])
    same = np.array([one == other for (one, _), (other, _) in zip(items, expected, strict=True)])
    close = bool(np.allclose(*scores, rtol=0, atol=TOLERANCE))
    return close and (bool(same.all()) or bool((np.diff(-scores[1])[~same[1:]] <= TOLERANCE).all()))


def requests_of(bundle: Bundle, count: int, length: int, k: int) -> list[dict[str, Any]]:
    """Different requests with histories of so many items."""
    ids, chooser = bundle.items.column("item_id").to_pylist(), random.Random(1)
    return [{"history": chooser.sample(ids, min(length, len(ids))), "k": k} for _ in range(count)]


def answers_of(bundles: dict[str, Bundle], asked: Sequence[dict[str, Any]]) -> Expected:
    """What the bundle of each version answers offline."""
    expected: Expected = {}
    for version, bundle in bundles.items():
        found = Recommender(bundle).recommend([Query(tuple(one["history"]), one["k"]) for one in asked])
        for place, answer in enumerate(found):
            expected[version, place] = [(item.item_id, item.score) for item in answer.items]
    return expected


class Server:
    """A `python -m serve` that has said that it is ready; and the commands beside it."""

    def __init__(self, folder: Path, port: int, *settings: str) -> None:
        self.words = [str(folder / "load.yaml"), f"serve.port={port}"]
        serve = f"serve: {{registry: {folder / 'registry'}}}"
        (folder / "load.yaml").write_text(f"name: load\ndata: {{path: none}}\ncluster: {{address: local}}\n{serve}\n")
        self._environment = {**os.environ, "RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-m", "serve", *self.words, *settings]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, cwd=ROOT, env=self._environment, text=True, **pipes)
        lines = []
        for line in self.process.stdout or ():
            lines.append(line)
            if "Ctrl-C" in line:
                return
        raise RuntimeError(f"the server ended: {''.join(lines)}")

    def command(self, verb: str, *more: str) -> str:
        """Runs `python -m serve VERB`; what it printed."""
        words = [sys.executable, "-m", "serve", verb, *self.words, *more]
        done = subprocess.run(words, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{verb} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def replicas(self) -> set[int]:
        """The process ids of its replicas."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return {process.pid for process in family if "ServeReplica" in " ".join(process.cmdline())}

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=60)


def measure(server: Server, load: Load, steps: Sequence[tuple[str, list[str]]], hold_s: float) -> list[Phase]:
    """Runs commands under load, with a quiet stretch before and after each."""
    marks: list[tuple[str, float, float | None]] = []
    with load:
        for verb, more in steps:
            marks.append((f"before {verb}", time.monotonic(), None))
            time.sleep(hold_s)
            began = time.monotonic()
            server.command(verb, *more)
            marks.append((verb, began, time.monotonic() - began))
            time.sleep(hold_s)
        marks.append(("after", time.monotonic(), None))
        time.sleep(hold_s)
    ends = [began for _, began, _ in marks[1:]] + [float("inf")]
    phases = []
    for (name, began, command_s), end in zip(marks, ends, strict=True):
        answers = [answer for answer in load.answers if began <= answer.sent < end]
        swap_s = None
        if command_s is not None and answers:
            newest = max(answers, key=lambda answer: answer.sent).version
            old = [answer.done - began for answer in answers if answer.version not in ("", newest)]
            swap_s = round(max(old, default=0.0), 2)
        phases.append(Phase(name, answers, swap_s, None if command_s is None else round(command_s, 2)))
    return phases


def print_phases(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="promote and rollback under load", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("phase", "versions") else "right")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--history", type=int, default=50)
    parser.add_argument("--rate", type=float, default=100, help="requests a second")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--hold", type=float, default=5, help="seconds before and after each command")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sp", dir="/tmp"))  # short: Ray's sockets are below it
    try:
        rows = run(folder, arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_phases(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def run(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the table."""
    bundles = {str(number): make_bundle(folder / f"bundle-{number}", arguments.items, number) for number in (1, 2)}
    asked = requests_of(bundles["1"], 200, arguments.history, 20)
    expected = answers_of(bundles, asked)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    replicas = (f"serve.min_replicas={arguments.replicas}", f"serve.max_replicas={arguments.replicas}")
    server = Server(folder, port, f"serve.bundle={bundles['1'].folder}", *replicas)
    try:
        before = server.replicas()
        load = Load(port, arguments.rate, arguments.connections, asked, expected)
        phases = measure(
            server, load, [("promote", [str(bundles["2"].folder)]), ("rollback", [])], arguments.hold
        )  # fmt: skip
        same = "the same" if server.replicas() == before else "OTHER"
        print(f"{len(before)} replicas; after promote and rollback they are {same} processes")
        return [phase.row() for phase in phases]
    finally:
        server.stop()


if __name__ == "__main__":
    main()
