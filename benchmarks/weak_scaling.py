"""Weak scaling on this machine: the same work for each worker, on 1, 2, ... workers of `python -m train`.

.venv/bin/python -m benchmarks.weak_scaling --workers 1 2 --rounds 3 [path=value ...]

Prints a table of tokens/s, scaling and shares of time (medians over the rounds, smallest-largest of the speed), what
an all-reduce of the gradients costs alone, and what the model of docs/scaling.md makes of both. Workers have a thread
each and speak gloo; on an idle machine with fewer cores than workers the table shows the cores, not the framework.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from seqray.config import Config

LINE = re.compile(
    r"([\d,]+) tokens/s \(.*?\)  data (\d+)%  compute (\d+)%  communication (\d+)%  checkpoint (\d+)%"
)  # fmt: skip
SIZES = (100_000, 1_000_000, 10_000_000, 50_000_000)
"""Bytes of an all-reduce."""


def write_log(path: Path, users: int, items: int, events: int) -> None:
    """A log of `events` events a user over items with Zipf's popularity."""
    random = np.random.default_rng(0)
    drawn = (random.zipf(1.2, users * events) - 1) % items
    user = np.repeat(np.arange(users), events)
    pq.write_table(pa.table({"user_id": user, "item_id": drawn, "timestamp": np.arange(len(drawn))}), path)


def config_of(folder: Path, workers: int, overrides: list[str]) -> Path:
    """A config whose batch grows with the workers, in a file."""
    tree = {
        "name": f"weak-{workers}", "output": str(folder), "data": {"path": str(folder / "log.parquet")},
        "model": {"hidden_dim": 64, "num_blocks": 2, "num_heads": 2, "max_length": 50},
        "train": {
            "num_workers": workers, "device": "cpu", "precision": "fp32", "epochs": 1, "batch_size": 64 * workers,
            "checkpoint_steps": 100_000,
        },
        "tracking": {"mode": "disabled"}, "cluster": {"address": "local"}, "evaluate": {"exclude_seen": False},
    }  # fmt: skip
    path = folder / f"weak-{workers}.yaml"
    values = dict(override.split("=", 1) for override in overrides)
    path.write_text(Config.parse(tree).override(values).yaml())
    return path


def run(config: Path) -> tuple[list[float], int]:
    """([tokens/s, data, compute, communication, checkpoint], parameters) of one training."""
    command = [sys.executable, "-m", "train", str(config), "--fresh"]
    environment = {**os.environ, "RAY_worker_niceness": "0"}  # Ray's workers give way to all else the machine does
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = [[float(part.replace(",", "")) for part in hit] for hit in LINE.findall(done.stdout)]
    parameters = re.search(r"([\d,]+) parameters", done.stdout)
    if len(found) < 2 or parameters is None:
        raise SystemExit(f"no speed was told; make the training longer:\n{done.stdout}{done.stderr}")
    # The first reading has the start in it.
    return [statistics.median(column) for column in zip(*found[1:], strict=True)], int(parameters[1].replace(",", ""))


def all_reduce_seconds(workers: int, folder: Path) -> list[float]:
    """Of each of SIZES, over gloo, each worker with one thread; medians."""
    queue = mp.get_context("spawn").Queue()
    mp.spawn(_all_reduce, (workers, folder / f"rendezvous-{time.time_ns()}", queue), workers)
    return list(queue.get())


def _all_reduce(rank: int, workers: int, rendezvous: Path, queue: "mp.Queue[list[float]]") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers)
    seconds = []
    for size in SIZES:
        tensor, times = torch.ones(size // 4), []
        for _ in range(12):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times))
    if rank == 0:
        queue.put(seconds)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="path=value")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, default=6_000)
    parser.add_argument("--items", type=int, default=10_000)
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="weak-") as temporary:
        folder = Path(temporary)
        write_log(folder / "log.parquet", arguments.users, arguments.items, 50)
        configs = {workers: config_of(folder, workers, arguments.overrides) for workers in arguments.workers}
        rounds: dict[int, list[list[float]]] = {workers: [] for workers in configs}
        for _ in range(arguments.rounds):  # in turns, so that what else the machine does meets all alike
            for workers, config in configs.items():
                row, parameters = run(config)
                rounds[workers].append(row)
        print(f"{parameters:,} parameters, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        print("workers  tokens/s (smallest-largest)  scaling  data  compute  communication  checkpoint")
        base = statistics.median(row[0] for row in rounds[arguments.workers[0]]) / arguments.workers[0]
        for workers, rows in rounds.items():
            speed, *shares = (statistics.median(column) for column in zip(*rows, strict=True))
            spread = f"{min(row[0] for row in rows):,.0f}-{max(row[0] for row in rows):,.0f}"
            print(
                f"{workers:7d}  {speed:8,.0f} ({spread})  {speed / base / workers:6.2f}  "
                + "  ".join(f"{share:.0f}%" for share in shares)
            )
        for workers in arguments.workers:
            if workers > 1:
                seconds = all_reduce_seconds(workers, folder)
                told = ", ".join(f"{n / 1e6:g} MB {s * 1e3:.2f} ms" for n, s in zip(SIZES, seconds, strict=True))
                print(f"all-reduce alone, {workers} workers: {told}")


if __name__ == "__main__":
    main()
