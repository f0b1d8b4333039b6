"""Training speed of our SASRec against RecTools 0.19: same events, network, loss, batch of users and threads.

python -m benchmarks.train_speed --data beauty=EVENTS.parquet --data ml-1m=EVENTS.parquet

EVENTS: columns user_id and item_id, the rows of a user in their order. Both sides are processes that train only when
asked, in turns: a warm-up, then in each round ours and the peer's, --steps optimizer steps each or an epoch.
"""

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from benchmarks.peer_environment import ensure_environment

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sizes:
    """What a data set is trained with."""

    hidden_dim: int
    num_blocks: int
    num_heads: int
    max_length: int
    dropout: float
    batch_size: int


KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""What seqray.memory does for our side: glibc keeps freed blocks, and the kernel need not clear them again."""
SIZES = {"beauty": Sizes(64, 2, 1, 50, 0.2, 256), "ml-1m": Sizes(64, 2, 1, 200, 0.1, 128)}

Answer = dict[str, Any]
Rounds = list[dict[str, float]]


class Side:
    """A process that trains as many steps as it is asked for."""

    def __init__(self, python: str | Path, module: str, arguments: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [str(python), "-m", module, *arguments], cwd=ROOT, env={**os.environ, **environment},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        self.facts = self._answer()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def train(self, steps: int | None) -> dict[str, float]:
        """Trains `steps` optimizer steps, or an epoch, and gives back what was measured."""
        assert self._process.stdin is not None
        self._process.stdin.write("epoch\n" if steps is None else f"steps {steps}\n")
        self._process.stdin.flush()
        answer = self._answer()
        speed = answer["sequences"] / answer["seconds"]
        return {
            **answer,
            "sequences_per_second": speed,
            "real_tokens_per_second": answer["real_tokens"] / answer["seconds"],
            "epoch_seconds": self.facts["sequences"] / speed,
        }

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with code {self._process.wait()}; its message stands above")
        answer: Answer = json.loads(line)
        return answer


def compare(name: str, events: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one data set, ours and the peer's in turns."""
    shared = side_arguments(name, events, arguments)
    store = str((arguments.output / "stores" / f"train-speed-{name}").absolute())
    threads = {name: str(arguments.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with ExitStack() as stack:
        ours = Side(sys.executable, "benchmarks.seqray_steps", [*shared, "--store", store], threads)
        sides = [stack.enter_context(ours)]
        if arguments.peer:
            python = arguments.peer_python or ensure_environment(arguments.output)
            workers = ["--loader-workers", str(arguments.peer_loader_workers)]
            environment = threads | (KEEPS_MEMORY if arguments.peer_keeps_memory else {})
            peer = Side(python, "benchmarks.rectools_steps", [*shared, *workers], environment)
            sides.append(stack.enter_context(peer))
            check_same_work(ours.facts, peer.facts)
        for side in sides:
            side.train(arguments.warm_up)
        rounds: dict[str, Rounds] = {side.facts["program"]: [] for side in sides}
        for _ in range(arguments.rounds):
            for side in sides:
                rounds[side.facts["program"]].append(side.train(arguments.steps))
        facts = {side.facts["program"]: side.facts for side in sides}
    return {"sizes": asdict(SIZES[name]), "facts": facts, "rounds": rounds}


def side_arguments(name: str, events: Path, arguments: argparse.Namespace) -> list[str]:
    """What both sides are told."""
    asked = ("threads", "device", "precision", "loss", "num_negatives", "blocks")
    values = {"events": events.absolute(), **asdict(SIZES[name]), **{key: getattr(arguments, key) for key in asked}}
    return [text for key, value in values.items() for text in (f"--{key.replace('_', '-')}", str(value))]


def check_same_work(ours: Answer, peer: Answer) -> None:
    """SystemExit when an epoch is not the same sequences, tokens and steps on both sides."""
    for key in ("sequences", "real_tokens", "steps"):
        if ours[key] != peer[key]:
            raise SystemExit(f"{key} of an epoch: {ours[key]} of ours, {peer[key]} of the peer; nothing to compare")


def print_table(title: str, result: dict[str, Any]) -> None:
    """Medians with their smallest and largest round, and the ratio of the medians with that of single rounds."""
    columns = {
        "sequences/s": "sequences_per_second", "real tokens/s": "real_tokens_per_second",
        "seconds an epoch": "epoch_seconds", "peak memory MB": "peak_memory_mb",
    }  # fmt: skip
    table = Table("", *columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for program, rounds in result["rounds"].items():
        table.add_row(program, *(_spread([found[key] for found in rounds]) for key in columns.values()))
    if len(result["rounds"]) == 2:
        ours, peer = result["rounds"].values()
        table.add_row("seqray / RecTools", *(_ratio(ours, peer, key) for key in columns.values()))
    console = Console(width=max(120, Console().width))
    console.print(table)
    for program, facts in result["facts"].items():
        loss = result["rounds"][program][-1]["loss"]
        console.print(f"{program}: {facts['parameters']:,} parameters, {facts['items']:,} items, last loss {loss:.4f}")


def _spread(values: list[float]) -> str:
    digits = 1 if median(values) < 100 else 0
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def _ratio(ours: Rounds, peer: Rounds, key: str) -> str:
    middle = median(found[key] for found in ours) / median(found[key] for found in peer)
    each = [mine[key] / theirs[key] for mine, theirs in zip(ours, peer, strict=True)]
    return f"{middle:.2f} ({min(each):.2f}-{max(each):.2f})"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, help=f"NAME=PATH; names: {', '.join(SIZES)}")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="measure RecTools too")
    parser.add_argument("--steps", type=int, help="optimizer steps of a round; an epoch when not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=3, help="optimizer steps that do not count")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "auto"),
        default="fp32",
        help="of both sides; auto: of each its own default",
    )
    parser.add_argument("--loss", choices=("softmax", "bce", "gbce"), default="softmax")
    parser.add_argument("--num-negatives", type=int, default=1, help="for each position; not for softmax")
    parser.add_argument("--blocks", choices=("sasrec", "pre_norm"), default="sasrec", help="see rectools_steps.py")
    parser.add_argument("--peer-python", type=Path, help="Python of an environment that holds RecTools already")
    parser.add_argument("--peer-loader-workers", type=int, default=0, help="processes of RecTools' data loader")
    parser.add_argument("--peer-keeps-memory", action="store_true", help="let RecTools keep freed memory, as ours does")
    parser.add_argument("--output", type=Path, default=Path(".seqray"), help="folder of everything that is made")
    parser.add_argument("--json", type=Path, help="writes all rounds to this file")
    arguments = parser.parse_args()
    arguments.data = dict(text.partition("=")[::2] for text in arguments.data)
    if unknown := set(arguments.data) - set(SIZES):
        parser.error(f"--data {', '.join(sorted(unknown))}: no sizes for that; names: {', '.join(SIZES)}")
    if missing := [path for path in arguments.data.values() if not Path(path).is_file()]:
        parser.error(f"--data {', '.join(missing)}: no such file")
    return arguments


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    results = {}
    for name, events in arguments.data.items():
        results[name] = compare(name, Path(events), arguments)
        length = f"{arguments.steps} steps" if arguments.steps else "an epoch"
        title = (
            f"{name}: {arguments.loss}, {arguments.blocks} blocks, {arguments.precision}, {arguments.device}, "
            f"{arguments.threads} threads, {arguments.rounds} rounds of {length}; median (smallest-largest)"
        )
        print_table(title, results[name])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
