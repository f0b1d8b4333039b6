"""Where a training step's time goes, and how far it is from the floor: its FLOPs over the measured matmul rate.

    python benchmarks/step_cost.py CONFIG [path=value ...] [--steps 40] [--ops 12]

The store is prepared when it is not there. Prints a table of stages, the dearest operators with --ops, and the floor.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from seqray.config import Config, load_config  # noqa: E402
from seqray.losses import build_loss  # noqa: E402
from seqray.models.protocol import build_model  # noqa: E402
from seqray.models.stream import Stream  # noqa: E402
from seqray.native.library import SWITCH, operators_of_training  # noqa: E402
from seqray.negatives import Popularity  # noqa: E402
from seqray.samples import Step  # noqa: E402
from train.fit import local_device  # noqa: E402
from train.objective import Objective, uses_bf16  # noqa: E402
from train.optimizer import build_optimizer  # noqa: E402
from train.place import Place  # noqa: E402
from train.prepare import ensure_store  # noqa: E402
from train.trainer import training_samples  # noqa: E402
from train.worker import settle  # noqa: E402

STAGES = ("gather", "encode", "loss and its slopes", "backward", "clip and optimizer")


class Bench:
    """One model, its samples and a clock that is read after each stage."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = local_device(config.train.device)
        settle(Place(0, 1, self.device), config.train.cpus_per_worker)
        self.store = ensure_store(config)
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, self.store.catalogue).to(self.device).train()
        self.samples = training_samples(config, self.store, self.model)
        self.objective = Objective(
            self.model, build_loss(config.loss), self.store.num_items, config.train.precision,
            Popularity.of(self.store.catalogue),
        )  # fmt: skip
        self.optimizer = build_optimizer(self.model, config.train)
        self.order = self.samples.order(0)
        self.bf16 = uses_bf16(config.train.precision, self.device.type)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.samples.steps(self.config.train.batch_size)

    def step(self, number: int) -> tuple[list[float], Step]:
        """Seconds of each of STAGES, as train/trainer.py goes through them."""
        times = [self._now()]
        step = self.samples.step(self.order, number % self.steps, self.config.train.batch_size, 0, 1).to(self.device)
        times.append(self._now())
        prediction = self.objective.prediction(step.batch)
        times.append(self._now())
        loss = self.objective.loss(prediction, step, (0, 0, number))
        times.append(self._now())
        torch.autograd.backward(loss / step.global_targets)
        times.append(self._now())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm or 1e9)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(self._now())
        return [after - before for before, after in pairwise(times)], step

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="path=value")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ops", type=int, default=0, help="print so many operators of the profile")
    arguments = parser.parse_intermixed_args()
    bench = Bench(load_config(arguments.config, tuple(arguments.overrides)))
    for number in range(5):
        bench.step(number)
    # The operators of PyTorch are counted; our kernels do the same work, in attention without the padding of tiles.
    with without_kernels(), FlopCounterMode(display=False) as counter:
        _, counted = bench.step(5)
    flops = counter.get_total_flops() / len(counted.batch.items_T)
    product, found, products = Product(bench.device, torch.bfloat16 if bench.bf16 else torch.float32), [], []
    with streams_made() as streams:
        for number in range(6, 6 + arguments.steps):
            found.append(bench.step(number))
            products.append(product.seconds())
    show(bench, found, streams, flops, product.flops / statistics.median(products))
    if arguments.ops:
        show_operators(bench, arguments.ops)


@contextmanager
def streams_made() -> Iterator[list[Stream]]:
    """The streams that models make meanwhile."""
    made: list[Stream] = []
    plain = Stream.__init__

    def noted(stream: Stream, *arguments: Any) -> None:
        plain(stream, *arguments)
        made.append(stream)

    Stream.__init__ = noted
    yield made
    Stream.__init__ = plain


@contextmanager
def without_kernels() -> Iterator[None]:
    """Goes the way of a machine without a compiler."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "off"
    yield
    del os.environ[SWITCH]
    if before is not None:
        os.environ[SWITCH] = before


class Product:
    """A large square product, whose rate is the floor's; made between the steps, so that both meet the same load."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        size = 4096 if device.type == "cuda" else 2048
        self.flops, self._device = 2 * size**3, device
        self._left, self._right, self._out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
        self.seconds()

    def seconds(self) -> float:
        """How long it takes now."""
        self._synchronize()
        start = time.perf_counter()
        torch.mm(self._left, self._right, out=self._out)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def show(
    bench: Bench, found: list[tuple[list[float], Step]], streams: list[Stream], flops_a_token: float, rate: float
) -> None:
    """The stages, padding and the floor. Where the kernels do the attention a stream makes no tiles."""
    table = Table("stage", "ms", "share")
    times, steps = zip(*found, strict=True)
    medians = [statistics.median(column) * 1e3 for column in zip(*times, strict=True)]
    whole = statistics.median(sum(row) for row in times) * 1e3
    for stage, milliseconds in zip(STAGES, medians, strict=True):
        table.add_row(stage, f"{milliseconds:.1f}", f"{milliseconds / whole:.0%}")
    table.add_row("step", f"{whole:.1f}", "", style="bold")
    Console(width=110).print(table)
    read = statistics.median(len(step.batch.items_T) for step in steps)
    floor = flops_a_token * read / rate * 1e3
    epoch = whole * bench.steps / 1e3
    tiled = [stream for stream in streams if "tiles" in vars(stream)]
    padding, events = sum(stream.padding for stream in tiled), sum(stream.T for stream in streams)
    kernels = bench.device.type == "cpu" and operators_of_training(build=True) is not None
    print(
        f"{read:,.0f} events a step, {bench.steps} steps ({epoch:.1f} s) an epoch, {read / whole * 1e3:,.0f} events/s\n"
        f"kernels of seqray/native: {'at hand' if kernels else 'not at hand'}\n"
        f"padding: none in products, norms and loss; {padding / (padding + events):.1%} of attention's cells "
        f"({'in tiles' if tiled else 'packed, no tiles'})\n"
        f"floor: {flops_a_token * read / 1e9:.1f} GFLOP a step at {rate / 1e9:,.0f} GFLOP/s "
        f"({'bf16' if bench.bf16 else 'fp32'}) = {floor:.1f} ms; the step takes {whole / floor:.1f} times that"
    )


def show_operators(bench: Bench, rows: int) -> None:
    """The profile of five steps by operator."""
    with torch.profiler.profile() as profile:
        for number in range(5):
            bench.step(number)
    by = "self_cuda_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=40))


if __name__ == "__main__":
    main()
