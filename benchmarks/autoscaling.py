"""Load that rises and falls on a real `python -m serve`, and the replicas that follow it.

    python -m benchmarks.autoscaling --plot autoscaling.png [--steps 2:10 25:20 80:25 25:15 2:25] [--to-zero]

Each step is RATE:SECONDS, open loop: requests are sent at random moments of that mean rate, whether or not those before
were answered. A request is dear on purpose (it explains a history of 50), so that two cores see several replicas busy.
`--to-zero` lets the application scale to no replica, and begins and ends the load with a pause. Prints a line for each
step, after how many seconds of each rise one more replica was wanted, and what Ray Serve's controller took of a core;
draws the load, the answers, their latency and the replicas over time. Ends with 1 when a request was not answered 200.
For the reaction alone, several times: `--steps 2:8 110:4 2:11 110:4 2:11 110:4 2:11 --set serve.downscale_delay_s=3`.
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

import psutil

from benchmarks.autoscaling_report import Asked, Look, Step, draw, print_steps
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
LOOK_S = 0.1


@dataclass(frozen=True)
class Server:
    """A running `python -m serve`, and the address of its cluster."""

    url: str
    cluster: str
    pid: int

    def controller_s(self) -> float:
        """CPU seconds that Ray Serve's controller took until now."""
        family = psutil.Process(self.pid).children(recursive=True)
        [controller] = [one for one in family if one.name().startswith("ray::ServeContr")]
        times = controller.cpu_times()
        return float(times.user + times.system)


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
            yield Server(f"http://127.0.0.1:{port}/v1/recommend", _cluster_of(process.pid), process.pid)
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
    steps = arguments.steps or [Step.read(text) for text in ("2:10", "25:20", "80:25", "25:15", "2:25")]
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
            before = server.controller_s()
            asked = asyncio.run(load(server.url, bodies, steps, watch.began))
            share = (server.controller_s() - before) / (time.perf_counter() - watch.began)
    print_steps(steps, asked, watch.looks)
    print(f"the controller took {share:.1%} of a core")
    if arguments.plot:
        draw(arguments.plot, steps, asked, watch.looks)
    return int(any(one.status != "200" for one in asked))


if __name__ == "__main__":
    sys.exit(main())
