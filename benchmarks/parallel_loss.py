"""The same training under every layout of train.parallel, train.vocabulary_parallel and the like: losses and memory.

python -m benchmarks.parallel_loss --items 5000 --epochs 2

Workers are processes on this machine that meet by gloo, on CPUs, from one seed and without dropout, over a made-up log.
Each row stands beside one process: the largest relative difference of an epoch's loss, and the largest difference of a
score that the trained models give. Memory is what the first worker holds of the weights and of the optimizer.
"""

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from seqray.config import Config
from seqray.evaluation import model_scorer
from seqray.models.protocol import build_model
from seqray.sequences import SequenceStore
from train.layout import whole_model
from train.narrator import Narrator
from train.optimizer import build_optimizer
from train.parallel import Parallel
from train.place import Place
from train.prepare import ensure_store
from train.state import Progress, TrainState
from train.trainer import Trainer

NEVER = 10**9
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "accumulate_steps 2": (1, {"accumulate_steps": 2}),
    "activation_checkpointing": (1, {"activation_checkpointing": True}),
    "ddp": (2, {}),
    "fsdp": (2, {"parallel": "fsdp"}),
    "vocabulary_parallel 2": (2, {"vocabulary_parallel": 2}),
    "vocabulary_parallel 2, fsdp": (2, {"vocabulary_parallel": 2, "parallel": "fsdp"}),
    "ddp ": (4, {}),
    "vocabulary_parallel 2 ": (4, {"vocabulary_parallel": 2}),
    "vocabulary_parallel 4": (4, {"vocabulary_parallel": 4}),
    "all of it": (
        4, {"vocabulary_parallel": 2, "parallel": "fsdp", "accumulate_steps": 2, "activation_checkpointing": True}
    ),
}  # fmt: skip
"""Row -> (workers, its section `train`)."""


class Losses(Narrator):
    """Keeps the loss of each epoch."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self.seen: list[float] = []

    def validation(
        self, progress: Progress, row: Mapping[str, float], monitor: str, baselines: Mapping[str, Mapping[str, float]]
    ) -> None:
        self.seen.append(row["train/loss"])


def main() -> None:
    """Trains under each layout and prints the table."""
    arguments = parse()
    table = Table(title=f"{arguments.items:,} items, {arguments.precision}, float32 weights", title_justify="left")
    table.add_column("layout")
    for column in ("workers", "train/loss", "loss differs", "scores differ", "weights MB", "optimizer MB"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory(prefix="seqray-") as name:
        folder, alone = Path(name), None
        write_log(folder, arguments)
        ensure_store(config_of(folder, arguments, {}))
        for row, (world, train) in LAYOUTS.items():
            found, scores_BV = run(folder, config_of(folder, arguments, train), world)
            losses = torch.tensor(found["losses"], dtype=torch.float64)
            alone = alone or (losses, scores_BV)
            table.add_row(
                row, str(world), " ".join(f"{loss:.6f}" for loss in losses.tolist()),
                f"{float((losses / alone[0] - 1).abs().max()):.1e}", f"{float((scores_BV - alone[1]).abs().max()):.1e}",
                f"{found['weights'] / 2**20:.2f}", f"{found['optimizer'] / 2**20:.2f}",
            )  # fmt: skip
    Console(width=120).print(table)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=5_000)
    parser.add_argument("--users", type=int, default=1_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--hidden-dim", type=int, default=64)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    return parser.parse_args()


def write_log(folder: Path, arguments: argparse.Namespace) -> None:
    """Users who walk through the items from a random one on, with a jump now and then; each item stands there once."""
    random, length = np.random.default_rng(0), 30
    start_U1 = random.integers(arguments.items, size=(arguments.users, 1))
    steps_UL = np.where(random.random((arguments.users, length)) < 0.9, 1, random.integers(100, size=(1, length)))
    items = np.concatenate([((start_U1 + steps_UL.cumsum(1)) % arguments.items).ravel(), np.arange(arguments.items)])
    users = np.concatenate([np.repeat(np.arange(arguments.users), length), np.full(arguments.items, arguments.users)])
    times = 1_700_000_000 + np.arange(len(items))
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), folder / "log.parquet")


def config_of(folder: Path, arguments: argparse.Namespace, train: Mapping[str, Any]) -> Config:
    """A small SASRec over the log."""
    return Config.parse({
        "name": "parallel-loss", "output": str(folder),
        "data": {"path": str(folder / "log.parquet")},
        "model": {"hidden_dim": arguments.hidden_dim, "max_length": 30, "dropout": 0.0},
        "train": {
            "num_workers": 4, "device": "cpu", "precision": arguments.precision, "epochs": arguments.epochs,
            "batch_size": 128, "patience": arguments.epochs, "checkpoint_steps": NEVER, **train,
        },
        "tracking": {"mode": "disabled"},
    })  # fmt: skip


def run(folder: Path, config: Config, world: int) -> tuple[dict[str, Any], Tensor]:
    """(what the first worker found, scores of the trained model for some validation queries)."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train.trainer"])
    with tempfile.TemporaryDirectory(dir=folder) as name:
        workers = [processes.Process(target=worker, args=(rank, world, config.plain(), name)) for rank in range(world)]
        for one in workers:
            one.start()
        for one in workers:
            one.join()
        if any(one.exitcode for one in workers):
            raise SystemExit("a worker failed")
        found: dict[str, Any] = json.loads((Path(name) / "found.json").read_text(encoding="utf-8"))
        state = load_file(Path(name) / "state.safetensors")
    store = SequenceStore(config.data.store or "")
    model = build_model(config.model, store.catalogue).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return found, model_scorer(model, torch.device("cpu"))(store.queries("val").slice(0, 128))


def worker(rank: int, world: int, plain: dict[str, Any], folder: str) -> None:
    """Trains as train/worker.py does, without checkpoints; the first one writes down what it found."""
    torch.set_num_threads(1)
    config, place = Config.parse(plain), Place(rank, world, torch.device("cpu"))
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    store = SequenceStore(config.data.store or "")
    torch.manual_seed(config.seed)
    model = build_model(config.model, store.catalogue)
    parallel = Parallel.of(model, config, store, place)
    state, losses = TrainState(model, build_optimizer(model, config.train)), Losses()
    Trainer(config, store, state, parallel, losses, None).train(lambda _: None)
    whole = whole_model(model)
    if rank == 0:
        slots = [slot for slots in state.optimizer.state.values() for slot in slots.values()]
        found = {
            "losses": losses.seen, "weights": sum(map(bytes_here, model.parameters())),
            "optimizer": sum(map(bytes_here, slots)),
        }  # fmt: skip
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
        save_file(whole, Path(folder) / "state.safetensors")
    if world > 1:
        dist.destroy_process_group()


def bytes_here(tensor: Tensor) -> int:
    """Of the part of a tensor that this worker holds."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


if __name__ == "__main__":
    main()
