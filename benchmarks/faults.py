"""What faults cost a run: each is injected for real into the same small run on two workers, which goes on.

    python -m benchmarks.faults data.path=EVENTS.parquet [--only NAME ...] [--json FILE]

EVENTS.parquet has the columns user_id, item_id and timestamp. Prints for each fault how it was injected, what the
command printed, the steps that were lost, the seconds from the blow until training went on, and the final metric
beside the unbroken run's. Blows inside of a worker come from `tests/broken_models.py`, at a stated step.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
EPOCHS = 8
METRIC = "test/ndcg@10"


class Command:
    """`python -m train`, whose lines are noted with the time they came."""

    def __init__(self, folder: Path, overrides: list[str], environment: dict[str, str]) -> None:
        self.folder, self.lines = folder, list[tuple[float, str]]()
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "RAY_AUTH_MODE": "disabled",
            **environment,
        }
        command = ["-m", "train", str(folder / "config.yaml"), *overrides, "--json", str(folder / "out.json")]
        self.process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, pattern: str) -> None:
        """Until a line matches; RuntimeError when the command ends before."""
        while not any(re.search(pattern, line) for _, line in list(self.lines)):
            if self.process.poll() is not None and not self._reader.is_alive():
                raise RuntimeError(f"{pattern!r} never came:\n" + "\n".join(line for _, line in self.lines))
            time.sleep(0.01)

    def end(self) -> None:
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))


@dataclass
class Trial:
    """One run with its fault."""

    folder: Path
    overrides: list[str]
    environment: dict[str, str]
    lines: list[tuple[float, str]] = field(default_factory=list)
    struck: float = 0.0

    def start(self, *overrides: str) -> Command:
        return Command(self.folder, [*self.overrides, *overrides], self.environment)

    def finish(self, command: Command) -> None:
        command.end()
        self.lines += command.lines

    def order(self, command: Command, order: str) -> None:
        """Gives an order to the workers' model in epoch 2, and waits until it was carried out."""
        command.wait_for("^epoch 2/")
        path = self.folder / "order"
        path.write_text(order)
        while path.exists() and command.process.poll() is None:
            time.sleep(0.005)
        self.struck = time.monotonic()


def worker(order: str) -> Callable[[Trial], None]:
    """A blow inside of a worker."""

    def strike(trial: Trial) -> None:
        command = trial.start()
        trial.order(command, order)
        trial.finish(command)

    return strike


def driver(trial: Trial, between: Callable[[Path], None] = lambda _: None, *flags: str) -> None:
    """SIGKILL of the command, which is then given once more."""
    command = trial.start()
    command.wait_for("^epoch 3/")
    command.process.send_signal(signal.SIGKILL)
    trial.finish(command)
    between(next((trial.folder / "out" / "runs").glob("*/*")))
    trial.struck = time.monotonic()
    trial.finish(trial.start(*flags))


def flip(run: Path) -> None:
    time.sleep(20)  # until the workers of the killed command have ended, and write no newer one
    newest = max((run / "checkpoints").glob("step_*")) / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)


def changed_config(trial: Trial) -> None:
    driver(trial, lambda _: None, "train.learning_rate=0.02")
    trial.finish(trial.start())


def full_disk(trial: Trial) -> None:
    """A file system of its own that is full from epoch 2 to epoch 5."""
    disk = trial.folder / "out"
    disk.mkdir()
    subprocess.run([str(shutil.which("mount")), "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        command = trial.start()
        command.wait_for("^epoch 2/")
        with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        trial.struck = time.monotonic()
        command.wait_for("not written, training goes on")
        command.wait_for("^epoch 5/")
        (disk / "ballast").unlink()
        trial.finish(command)
        shutil.copytree(disk / "bundles", trial.folder / "kept")
    finally:
        subprocess.run([str(shutil.which("umount")), "-l", str(disk)], check=True)


@contextlib.contextmanager
def nodes() -> Iterator[Any]:
    """A cluster with a head without CPUs and two nodes with one each; (cluster, second node)."""
    from ray._common.utils import get_default_ray_temp_dir
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="sr", dir="/tmp")
    Path(get_default_ray_temp_dir()).mkdir(exist_ok=True)  # Cluster writes its address there
    arguments = {"num_cpus": 0, "temp_dir": folder, "include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    try:
        yield cluster, cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def dead_node(trial: Trial) -> None:
    """SIGKILL of all processes of a node; the run is elastic and goes on with one worker."""
    (trial.folder / "slow").touch()
    with nodes() as (cluster, second):
        command = trial.start(
            "train.num_workers=[1,2]", f"cluster.address={cluster.address}", "train.start_timeout_s=40"
        )
        command.wait_for("^epoch 2/")
        cluster.remove_node(second, allow_graceful=False)
        trial.struck = time.monotonic()
        command.wait_for("goes on from checkpoint")
        (trial.folder / "slow").unlink()
        trial.finish(command)


FAULTS: dict[str, tuple[str, Callable[[Trial], None]]] = {
    "none": ("", lambda trial: trial.finish(trial.start())),
    "worker killed in a step": ("SIGKILL in a forward pass of worker 1", worker("train 30 1 kill")),
    "worker killed in an evaluation": ("SIGKILL in a forward pass of worker 1", worker("eval 9 1 kill")),
    "worker killed in a checkpoint": ("SIGKILL of worker 0 before the rename", worker("write 3 0 kill")),
    "worker hangs": ("SIGSTOP of worker 1, train.hang_timeout_s=20", worker("train 30 1 stop")),
    "NaN on one worker, skip": ("loss of worker 1 made NaN, train.on_nan=skip", worker("train 30 1 nan")),
    "command killed": ("SIGKILL, then the same command", driver),
    "checkpoint damaged": ("a bit of the newest flipped, same command", lambda trial: driver(trial, flip)),
    "config changed": ("SIGKILL, other learning rate, then the same command", changed_config),
    "full disk": ("tmpfs filled in epoch 2, freed in epoch 5", full_disk),
    "W&B away": ("key set, WANDB_BASE_URL to a closed port", lambda trial: trial.finish(trial.start())),
    "node dies": ("SIGKILL of a node, train.num_workers=[1,2]", dead_node),
}
OVERRIDES = {
    "worker hangs": ["train.hang_timeout_s=20"], "NaN on one worker, skip": ["train.on_nan=skip"],
    "W&B away": ["tracking.mode=online"],
}  # fmt: skip
ENVIRONMENT = {"W&B away": {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}}
TOLD = re.compile(
    "error: |no headway|skipped: |not written|passed over|W&B did not|its node died|^worker . failed|goes on from"
    "|^  train"
)


def main() -> None:
    arguments = _arguments()
    # The workers look for the model here, and the clusters are this process's own.
    os.environ |= {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    rows: dict[str, dict[str, Any]] = {}
    for name in FAULTS:
        if name == "none" or name in (arguments.only or FAULTS):
            started = time.monotonic()
            rows[name] = _run(name, arguments.overrides)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
            _print(rows, arguments.json)


def _print(rows: dict[str, dict[str, Any]], file: Path | None) -> None:
    """The table so far; also as JSON."""
    table = Table("fault", "injected", "printed", "steps lost", "seconds to go on", METRIC, "weights", show_lines=True)
    for name, row in rows.items():
        same = all(torch.equal(row["weights"][key], value) for key, value in rows["none"]["weights"].items())
        row["same"] = "the unbroken run's" if same else "other"
        cells = (FAULTS[name][0], row["told"], row["lost"], row["seconds"], f"{row['metric']:.4f}", row["same"])
        table.add_row(name, *(escape(str(cell)) for cell in cells))
    Console(width=170).print(table)
    if file:
        kept = {name: {key: value for key, value in row.items() if key != "weights"} for name, row in rows.items()}
        file.write_text(json.dumps(kept, indent=1), encoding="utf-8")


def _run(name: str, overrides: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        trial = Trial(Path(folder), [*overrides, *OVERRIDES.get(name, [])], ENVIRONMENT.get(name, {}))
        _write_config(trial.folder)
        FAULTS[name][1](trial)
        result = json.loads((trial.folder / "out.json").read_text())
        bundle = trial.folder / "kept" / Path(result["bundle"]).relative_to(trial.folder / "out" / "bundles")
        bundle = bundle if bundle.exists() else Path(result["bundle"])
        after = [at for at, line in trial.lines if at > trial.struck and line.startswith("goes on from")]
        return {
            "told": "\n".join(dict.fromkeys(_shown(line) for _, line in trial.lines if TOLD.search(line))),
            "lost": result["metrics"]["wasted_steps"],
            "seconds": round(after[0] - trial.struck, 1) if after and trial.struck else "",
            "metric": result["metrics"][METRIC], "weights": load_file(bundle / "model.safetensors"),
        }  # fmt: skip


def _shown(line: str) -> str:
    line = re.sub(r"step_\d+\S* not written", "step_N not written", line)
    line = re.sub(r" in \S*/runs/\S+?(?=;|$)", "", line)
    return line if len(line) < 150 else line[:147] + "..."


def _write_config(folder: Path) -> None:
    tree = {
        "name": "faults", "output": str(folder / "out"), "data": {"path": "?", "store": str(folder / "store")},
        "model": {"type": "broken_models:Struck", "order": str(folder / "order"), "hidden_dim": 32, "dropout": 0.2},
        "train": {
            "num_workers": 2, "device": "cpu", "precision": "fp32", "epochs": EPOCHS, "patience": EPOCHS,
            "batch_size": 32, "learning_rate": 0.01, "checkpoint_steps": 10, "max_failures": 3,
        },
        "tracking": {"mode": "disabled"}, "cluster": {"address": "local"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("overrides", nargs="*", metavar="path=value")
    parser.add_argument("--only", action="append", choices=list(FAULTS))
    parser.add_argument("--json", type=Path)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
