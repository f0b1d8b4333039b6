"""Load that rises and falls on a real `python -m serve`, and the replicas that follow it.

    python -m benchmarks.autoscaling --plot autoscaling.png [--steps 2:10 20:20 45:25 20:15 2:25] [--to-zero]

Each step is RATE:SECONDS, open loop: requests are sent at random moments of that mean rate, whether or not those before
were answered. A request is dear on purpose (it explains a history of 50), so that two cores see several replicas busy.
`--to-zero` lets the application scale to no replica, and begins and ends the load with a pause. Prints a line for each
step and draws the load, the answers, their latency and the replicas over time; ends with 1 when a request was not
answered 200.
"""

import argparse
import asyncio
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.load_generator import Client
from benchmarks.serve_targets import make_bundle, write_bodies

ROOT = Path(__file__).parent.parent
NAME = "autoscaling"
SETTINGS = (
    "serve.max_replicas=3",
    "serve.target_ongoing_requests=0.3",
    "serve.downscale_delay_s=5",
    "serve.cpus_per_replica=0.5",
    "serve.deadline_ms=20000",
)
LOOK_S = 0.25


@dataclass(frozen=True)
class Step:
    """A part of the load."""

    rate: float
    seconds: float

    @classmethod
    def read(cls, text: str) -> "Step":
        rate, _, seconds = text.partition(":")
        return cls(float(rate), float(seconds))


@dataclass(frozen=True)
class Asked:
    """One request; times in seconds since the load began."""

    due: float
    answered: float
    status: str


@dataclass(frozen=True)
class Look:
    """The replicas at a moment."""

    at: float
    running: int
    starting: int


@dataclass(frozen=True)
class Server:
    """A running `python -m serve`, and the address of its cluster."""

    url: str
    cluster: str


@contextmanager
def serving(bundle: Path, folder: Path, port: int, settings: Sequence[str]) -> Iterator[Server]:
    """The server as long as the block lasts."""
    config = folder / f"{NAME}.yaml"
    config.write_text(f"name: {NAME}\ndata: {{path: log.csv}}\ncluster: {{address: local}}\n")
    command = [sys.executable, "-m", "serve", str(config), f"serve.bundle={bundle}", f"serve.port={port}", *settings]
    environment = {**os.environ, "RAY_TMPDIR": str(folder)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if not any("Ctrl-C" in line for line in process.stdout):
                raise SystemExit("the server ended")
            yield Server(f"http://127.0.0.1:{port}/v1/recommend", _cluster_of(process.pid))
        finally:
            process.terminate()
            process.communicate(timeout=60)


def _cluster_of(pid: int) -> str:
    """The address of the Ray cluster that a process started: its raylet was told."""
    for child in psutil.Process(pid).children(recursive=True):
        for word in child.cmdline():
            if word.startswith("--gcs-address="):
                return word.partition("=")[2]
    raise SystemExit("no raylet found")


class Watch:
    """Looks at the replicas every LOOK_S, in a thread, until it is closed."""

    def __init__(self, cluster: str) -> None:
        self.looks: list[Look] = []
        self.began = 0.0
        self._cluster = cluster
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watch":
        import ray

        ray.init(address=self._cluster, log_to_driver=False, logging_level="ERROR")
        self.began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        self._over.set()
        self._thread.join()
        ray.shutdown()

    def _watch(self) -> None:
        import ray.serve

        while not self._over.wait(LOOK_S):
            [deployment] = ray.serve.status().applications[NAME].deployments.values()
            states = {str(getattr(state, "value", state)): n for state, n in deployment.replica_states.items()}
            at = time.perf_counter() - self.began
            self.looks.append(Look(at, states.get("RUNNING", 0), states.get("STARTING", 0)))


async def load(url: str, bodies: list[bytes], steps: Sequence[Step], began: float) -> list[Asked]:
    """Sends the steps one after the other; every request with what came of it."""
    client, moments = Client(url, bodies, []), random.Random(0)
    asked: list[Asked] = []

    async def ask(number: int, due: float) -> None:
        status = await client.ask(number, due)
        asked.append(Asked(due - began, time.perf_counter() - began, status))

    tasks: list[asyncio.Task[None]] = []
    end = time.perf_counter()
    for step in steps:
        due, end = end, end + step.seconds
        while step.rate and (due := due + moments.expovariate(step.rate)) < end:
            await asyncio.sleep(max(0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(len(tasks), due)))
        await asyncio.sleep(max(0, end - time.perf_counter()))
    await asyncio.gather(*tasks)
    await client.close()
    return asked


def dear_bodies(folder: Path, num_items: int) -> list[bytes]:
    """Requests that explain, each a forward pass for every event of its history."""
    write_bodies(folder / "bodies.jsonl", num_items)
    lines = (folder / "bodies.jsonl").read_text().splitlines()
    return [json.dumps({**json.loads(line), "explain": True}).encode() for line in lines]


def print_steps(steps: Sequence[Step], asked: Sequence[Asked], looks: Sequence[Look]) -> None:
    """A line for each step."""
    print(f"{'offered/s':>9} {'seconds':>8} {'sent':>6} {'not 200':>8} {'p50 ms':>8} {'p95 ms':>8} {'replicas':>9}")
    start = 0.0
    for step in steps:
        end = start + step.seconds
        here = [one for one in asked if start <= one.due < end]
        running = [look.running for look in looks if start <= look.at < end] or [0]
        p50, p95 = np.percentile([(one.answered - one.due) * 1000 for one in here] or [0], [50, 95])
        lost = sum(one.status != "200" for one in here)
        print(
            f"{step.rate:>9g} {step.seconds:>8g} {len(here):>6} {lost:>8} {p50:>8.0f} {p95:>8.0f} "
            f"{f'{running[0]} to {running[-1]}':>9}"
        )
        start = end
    for change, text in reactions(steps, looks):
        print(f"{change:.1f} s after that step began {text}")


def reactions(steps: Sequence[Step], looks: Sequence[Look]) -> list[tuple[float, str]]:
    """After how many seconds of its step the first further replica was wanted and was running, and one less was."""
    starts = np.cumsum([0.0, *(step.seconds for step in steps)])
    first, most = looks[0].running, max(look.running for look in looks)
    peak = next(look.at for look in looks if look.running == most)
    moments = [
        (
            next((look.at for look in looks if look.running + look.starting > first), None),
            "one more was wanted",
        ),
        (next((look.at for look in looks if look.running > first), None), "it was running"),
        (next((look.at for look in looks if look.at > peak and look.running < most), None), "one was taken away"),
    ]
    return [(at - max(start for start in starts if start <= at), text) for at, text in moments if at is not None]


def draw(path: Path, steps: Sequence[Step], asked: Sequence[Asked], looks: Sequence[Look]) -> None:
    """The plot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    ends = np.cumsum([0.0, *(step.seconds for step in steps)])
    seconds = np.arange(int(max(ends[-1], *(one.answered for one in asked))) + 1)
    answered = [one for one in asked if one.status == "200"]
    per_second = np.bincount([int(one.answered) for one in answered], minlength=len(seconds))[: len(seconds)]
    latency = np.full(len(seconds), np.nan)
    for second in seconds:
        here = [(one.answered - one.due) * 1000 for one in answered if int(one.due) == second]
        latency[second] = np.percentile(here, 95) if here else np.nan
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    rates, times, replicas = figure.subplots(3, 1, sharex=True)
    rates.stairs([step.rate for step in steps], ends, label="offered", color="#9aa8b7", linewidth=2)
    rates.plot(seconds + 0.5, per_second, label="answered", color="#0f766e")
    lost = [one.due for one in asked if one.status != "200"]
    rates.plot(lost, [0] * len(lost), "x", color="#b3261e", label=f"not answered 200: {len(lost)} of {len(asked)}")
    rates.set_ylabel("requests/s")
    rates.legend(loc="upper left")
    times.plot(seconds + 0.5, latency, ".-", color="#0f766e")
    times.set_yscale("log")
    times.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    times.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    times.yaxis.set_minor_locator(NullLocator())
    times.set_ylabel("p95, ms")
    at = [look.at for look in looks]
    wanted = [look.running + look.starting for look in looks]
    replicas.step(at, wanted, where="post", color="#9aa8b7", label="running and starting")
    replicas.step(at, [look.running for look in looks], where="post", color="#0f766e", linewidth=2, label="running")
    replicas.set_ylabel("replicas")
    replicas.set_ylim(bottom=0)
    replicas.yaxis.get_major_locator().set_params(integer=True)
    replicas.set_xlabel("seconds")
    replicas.legend(loc="lower center", ncols=2)
    for axes in (rates, times, replicas):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--steps", type=Step.read, nargs="+")
    parser.add_argument("--to-zero", action="store_true")
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--port", type=int, default=8420)
    parser.add_argument("--set", nargs="*", default=[], metavar="path=value", help="settings of python -m serve")
    arguments = parser.parse_args()
    # Both processes speak to one cluster, so they need one token.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    steps = arguments.steps or [Step.read(text) for text in ("2:10", "20:20", "45:25", "20:15", "2:25")]
    settings = [*SETTINGS, *arguments.set]
    if arguments.to_zero:
        steps = [Step(0, 25), *steps, Step(0, 25), Step(2, 20)]
        settings += ["serve.min_replicas=0", "serve.downscale_to_zero_delay_s=10"]
    with tempfile.TemporaryDirectory(prefix="as", dir="/tmp") as place:  # short: Ray's sockets are below it
        folder = Path(place)
        make_bundle(folder / "bundle", arguments.items)
        bodies = dear_bodies(folder, arguments.items)
        serve = serving(folder / "bundle", folder, arguments.port, settings)
        with serve as server, Watch(server.cluster) as watch:
            asked = asyncio.run(load(server.url, bodies, steps, watch.began))
    print_steps(steps, asked, watch.looks)
    if arguments.plot:
        draw(arguments.plot, steps, asked, watch.looks)
    return int(any(one.status != "200" for one in asked))


if __name__ == "__main__":
    sys.exit(main())
