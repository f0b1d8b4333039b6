"""The lines by which train_speed asks a side for optimizer steps, and the stopwatch that answers them.

Imported in both environments, so it knows neither seqray nor RecTools, and both sides are measured by the same code.
The driver writes `epoch` or `steps N`; the side answers one line of JSON and waits for the next. First of all, when its
setup is done, a side sends its Facts.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch


@dataclass(frozen=True)
class Facts:
    """What a side trains; the first line it sends."""

    program: str
    parameters: int
    items: int
    """Of the catalogue that the loss goes over."""
    sequences: int
    """Of an epoch."""
    real_tokens: int
    """Inputs of an epoch, padding not counted."""
    steps: int
    """Optimizer steps of an epoch."""


class Stopwatch:
    """Times as many optimizer steps as the driver asked for; between two answers nothing runs."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._steps_of_epoch = 0
        self._wanted = 0

    def start(self, facts: Facts) -> None:
        """Ends the setup: sends the facts and waits for the first line."""
        self._steps_of_epoch = facts.steps
        self._answer(asdict(facts))

    def step_done(self, sequences: int, real_tokens: Callable[[], int], loss: Callable[[], float]) -> None:
        """To be called after every optimizer step; loss: the mean over the step's targets.

        real_tokens and loss are called when the clock stands still, so that counting costs nobody anything.
        """
        self._done.append((sequences, real_tokens, loss))
        if len(self._done) < self._wanted:
            return
        self._synchronize()
        seconds, cpu_seconds = time.perf_counter() - self._started, time.process_time() - self._cpu_started
        self._answer({
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "sequences": sum(count for count, _, _ in self._done),
            "real_tokens": sum(count() for _, count, _ in self._done),
            "steps": len(self._done),
            "loss": fmean(loss() for _, _, loss in self._done),
            "peak_memory_mb": self._peak_memory_mb(),
        })  # fmt: skip

    def _answer(self, line: dict[str, Any]) -> None:
        # sys.__stdout__: everything else that is printed goes to stderr.
        print(json.dumps(line), file=sys.__stdout__, flush=True)
        order = sys.stdin.readline().split()
        if not order:
            raise SystemExit(0)  # the driver closed the line
        self._wanted = self._steps_of_epoch if order == ["epoch"] else int(order[1])
        self._done: list[tuple[int, Callable[[], int], Callable[[], float]]] = []
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._synchronize()
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _peak_memory_mb(self) -> float:
        """cuda: tensors since the last order; cpu: the whole process since it began."""
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def side_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that both sides have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=Path, required=True, help="Parquet file: user_id, item_id, oldest rows first")
    for name in ("hidden-dim", "num-blocks", "num-heads", "max-length", "batch-size", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dropout", type=float, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32")
    parser.add_argument("--loss", choices=("softmax", "bce", "gbce"), default="softmax")
    parser.add_argument("--num-negatives", type=int, default=1, help="for each position; not for softmax")
    parser.add_argument("--blocks", choices=("sasrec", "pre_norm"), default="sasrec", help="see rectools_steps.py")
    return parser


def settle(threads: int) -> None:
    """Takes this many threads, and keeps stdout for the answers alone."""
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr
