"""The serving path under load, beside a bare FastAPI app around the same Recommender and Ray Serve that does nothing.

    python -m benchmarks.serve_load [--items 100000] [--rate 100] [--seconds 10] [--rounds 2] [--only seqray]

Starts `python -m serve` of a made-up bundle with one replica (SASRec, hidden_dim 64, 2 blocks, histories of 50, k 20),
the app, and the empty deployment, once with HAProxy and Ray Serve's setting for throughput alone, which is the floor,
and once in the environment that `python -m serve` makes for itself. Puts load on one after the other, in turns, from a
process of its own: first open loop at `--rate` (latencies count from the moment a request was due), then closed loop
with more and more connections for the peak. Prints medians over the rounds. The answers of `python -m serve` are
compared with the Recommender's before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serve_targets import READY, make_bundle, write_bodies
from seqray.bundle import Bundle
from seqray.recommender import Query, Recommender

ROOT = Path(__file__).parent.parent
CONCURRENCY = (1, 8, 32, 64)
NAMES = {
    "seqray": "python -m serve",
    "fastapi": "bare FastAPI + uvicorn",
    "nothing": "Ray Serve, no-op",
    "nothing-tuned": "no-op in our environment",
}


def main() -> None:
    """Starts all, loads them in turns, prints the table."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="load", dir="/tmp") as folder, ExitStack() as stack:
        bundle = make_bundle(Path(folder) / "bundle", arguments.items)
        bodies = Path(folder) / "bodies.jsonl"
        write_bodies(bodies, arguments.items, arguments.filtered)
        urls = {
            name: stack.enter_context(_started(name, bundle, arguments.port + place, Path(folder), arguments.set))
            for place, name in enumerate(arguments.only)
        }
        if "seqray" in urls:
            _compare(urls["seqray"], bundle, bodies)
        results: dict[str, list[dict[str, dict[str, Any]]]] = {name: [] for name in urls}
        for number in range(arguments.rounds):
            for name, url in urls.items():
                print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
                results[name].append(_round(url, bodies, arguments))
    _print(results, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=100, help="requests a second of the open loop")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--port", type=int, default=8400)
    parser.add_argument("--filtered", action="store_true", help="each request has a filter on a column")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--set", nargs="*", default=[], metavar="path=value", help="settings of python -m serve")
    return parser.parse_args()


@contextmanager
def _started(name: str, bundle: Bundle, port: int, folder: Path, settings: list[str]) -> Iterator[str]:
    """The URL of a target that answers; it is ended after the block."""
    if name == "seqray":
        config = folder / "load.yaml"
        config.write_text("name: load\ndata: {path: log.csv}\ncluster: {address: local}\n")
        command = [
            sys.executable, "-m", "serve", str(config), f"serve.bundle={bundle.location}", f"serve.port={port}",
            "serve.max_replicas=1", *settings,
        ]  # fmt: skip
    else:
        part = ["fastapi", bundle.location] if name == "fastapi" else [name]
        command = [sys.executable, "-m", "benchmarks.serve_targets", *part, "--port", str(port)]
    environment = {**os.environ, "RAY_TMPDIR": tempfile.mkdtemp(prefix="r", dir=folder)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            if name != "fastapi":
                assert process.stdout is not None
                for line in process.stdout:
                    if READY in line or "Ctrl-C" in line:
                        break
            url = f"http://127.0.0.1:{port}/v1/recommend"
            _wait(url, process)
            yield url
        finally:
            process.terminate()
            process.communicate()  # reads on, so that what it says at its end goes somewhere


def _wait(url: str, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"{url}: the server ended with {process.returncode}")
        try:
            _ask(url, b'{"history": ["item-1"]}')
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise SystemExit(f"{url}: no answer")


def _ask(url: str, body: bytes) -> Any:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310 - our own http
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
        return json.load(response)


def _compare(url: str, bundle: Bundle, bodies: Path) -> None:
    """SystemExit when the server says anything else than the Recommender."""
    recommender = Recommender(bundle)
    for line in bodies.read_bytes().splitlines()[:20]:
        asked = json.loads(line)
        chosen = recommender.read_filter(asked["filter"]) if "filter" in asked else None
        [expected] = recommender.recommend([Query(tuple(asked["history"]), asked["k"], filter=chosen)])
        items = [item["item_id"] for item in _ask(url, line)["items"]]
        if items != [item.item_id for item in expected.items]:
            raise SystemExit(f"wrong answer: {items}")


def _round(url: str, bodies: Path, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    results = {"open": _load(url, bodies, arguments.seconds, "--rate", arguments.rate)}
    for concurrency in CONCURRENCY:
        results[f"c={concurrency}"] = _load(url, bodies, arguments.seconds / 2, "--concurrency", concurrency)
    return results


def _load(url: str, bodies: Path, seconds: float, how: str, amount: float) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "load_generator.py"), url, str(bodies)]
    command += ["--seconds", str(seconds), how, str(amount)]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def _print(results: dict[str, list[dict[str, dict[str, Any]]]], arguments: argparse.Namespace) -> None:
    table = Table(
        f"{arguments.items:,} items", f"at {arguments.rate:g}/s: p50, p95, p99 ms", "not answered",
        *(f"c={concurrency}: /s (p50, p99 ms)" for concurrency in CONCURRENCY), "peak /s",
    )  # fmt: skip
    peaks = {}
    for name, rounds in results.items():
        opened = [round_["open"] for round_ in rounds]
        latency = ", ".join(f"{_median(opened, f'p{share}_ms'):.1f}" for share in (50, 95, 99))
        lost = sum(one["requests"] - one["answered"] for round_ in rounds for one in round_.values())
        cells = []
        for concurrency in CONCURRENCY:
            closed = [round_[f"c={concurrency}"] for round_ in rounds]
            middle, slow = _median(closed, "p50_ms"), _median(closed, "p99_ms")
            cells.append(f"{_median(closed, 'per_second'):.0f} ({middle:.1f}, {slow:.1f})")
        peaks[name] = statistics.median(max(round_[f"c={c}"]["per_second"] for c in CONCURRENCY) for round_ in rounds)
        table.add_row(NAMES[name], latency, str(lost), *cells, f"{peaks[name]:.0f}")
    Console(width=180).print(table)
    for other in ("nothing", "nothing-tuned", "fastapi"):
        if "seqray" in peaks and other in peaks:
            print(f"peak of python -m serve / {NAMES[other]}: {peaks['seqray'] / peaks[other]:.2f}")


def _median(results: list[dict[str, Any]], key: str) -> float:
    return statistics.median(one[key] for one in results)


if __name__ == "__main__":
    main()
