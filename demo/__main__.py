"""`python -m demo`: from a shop's event log to recommendations over HTTP, by the commands that a user would type."""

import json
import os
import shlex
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from demo.children import DemoError, free_port, post, run, server
from demo.shop import write_shop
from seqray.config import load_config
from seqray.errors import SeqrayError

CONFIG = "configs/demo.yaml"
FOLDER = Path(".seqray/demo")
WANDB = Path(".seqray/wandb")
SEED = 1
console = Console(width=120, highlight=False, soft_wrap=True)


class Road:
    """The steps taken so far, and how long each took."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float]] = []

    @contextmanager
    def step(self, title: str, command: Sequence[str] = ()) -> Iterator[None]:
        """Prints the heading and the command of a step before it, and its time after it."""
        console.rule(f"[bold]{len(self.steps) + 1}. {title}", align="left")
        if command:
            print(f"$ {shlex.join(['python', *command[1:]])}", flush=True)
        start = time.monotonic()
        try:
            yield
        except DemoError as error:
            raise DemoError(f"step {len(self.steps) + 1} ({title}): {error}") from error
        self.steps.append((title, time.monotonic() - start))
        print(f"took {self.steps[-1][1]:.1f} s\n", flush=True)

    def print(self, made: dict[str, str]) -> None:
        """The table of steps, and what was made."""
        table = Table(title="the whole road", title_justify="left")
        table.add_column("step")
        table.add_column("seconds", justify="right")
        for title, seconds in self.steps:
            table.add_row(title, f"{seconds:.1f}")
        table.add_section()
        table.add_row("total", f"{sum(seconds for _, seconds in self.steps):.1f}")
        console.print(table)
        for name, place in made.items():
            print(f"{name + ':':16} {place}")


def main() -> int:
    """Walks the road; the exit status."""
    os.chdir(Path(__file__).resolve().parents[1])
    signal.signal(signal.SIGTERM, _stop)
    try:
        _walk()
    except (DemoError, SeqrayError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _walk() -> None:
    road = Road()
    with road.step("make a shop"):
        write_shop(FOLDER, SEED)
        _print_shop()
    _run(road, "prepare its log", "train.prepare", CONFIG)
    results = {name: FOLDER / f"{name}.json" for name in ("train", "tune")}
    for path in results.values():
        path.unlink(missing_ok=True)  # a result of an earlier demo must not stand in for this one
    train = ("train.num_workers=2", "--json", str(results["train"]))
    _run(road, "fine-tune a model with two workers", "train", CONFIG, *train)
    _run(road, "search for a better one", "tune", CONFIG, "--json", str(results["tune"]))
    bundle = _better_bundle(results)
    port = free_port()
    command = (sys.executable, "-m", "serve", CONFIG, f"serve.bundle={bundle}", f"serve.port={port}")
    with ExitStack() as serving:
        with road.step("serve it", command):
            serving.enter_context(server(command, port, FOLDER / "serve.log"))
        with road.step("ask it over HTTP"):
            _ask(port)
        with road.step("shut it down"):
            serving.close()
    made = {"log and items": f"{FOLDER}/", "bundle": bundle, "server's output": f"{FOLDER}/serve.log"}
    if any(WANDB.glob("offline-run-*")):
        made["W&B runs"] = f"{WANDB}/ (offline; `wandb sync` uploads them)"
    road.print(made)
    print(f"\nnext: python -m serve {CONFIG} serve.bundle={bundle}\n      your own log: see README.md")


def _run(road: Road, title: str, module: str, *arguments: str) -> None:
    command = (sys.executable, "-m", module, *arguments)
    with road.step(title, command):
        run(command)


def _print_shop() -> None:
    events = pq.read_table(FOLDER / "events.parquet")
    items = pq.read_metadata(FOLDER / "items.parquet").num_rows
    users = pc.count_distinct(events["user_id"]).as_py()
    first, last = (pc.min_max(events["timestamp"])[key].as_py().date() for key in ("min", "max"))
    print(f"{events.num_rows:,} events of {users:,} customers with {items:,} items, {first} to {last}, in {FOLDER}/")


def _better_bundle(results: dict[str, Path]) -> str:
    """The bundle with the better validation metric, of the run and the search."""
    monitor = load_config(CONFIG).train.monitor
    found: dict[str, tuple[float, str]] = {}
    for name, path in results.items():
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            found[name] = (result["metrics"][monitor], result["bundle"])
        except (OSError, ValueError, KeyError) as error:
            raise DemoError(f"{path}: not the result of `python -m {name}`: {error!r}") from error
    best = max(found, key=lambda name: found[name][0])
    listed = ", ".join(f"{name} {value:.4f}" for name, (value, _) in found.items())
    print(f"{monitor}: {listed}; the bundle of {best} is served\n")
    return found[best][1]


def _ask(port: int) -> None:
    """Recommendations for a regular customer, a newcomer, and somebody with an item the model has never seen."""
    items = pq.read_table(FOLDER / "items.parquet", columns=["item_id", "title"]).to_pydict()
    titles = dict(zip(items["item_id"], items["title"], strict=True))
    histories = _histories()
    regular = next(user for user in sorted(histories) if len(histories[user]) >= 12)
    newcomer = next(user for user in sorted(histories, reverse=True) if len(histories[user]) >= 12)
    asked = {
        f"customer {regular}, the newest 8 of {len(histories[regular])} items": histories[regular][-8:],
        f"a newcomer, the first 2 items of {newcomer}": histories[newcomer][:2],
        "somebody with an unknown item": ["SKU-UNKNOWN"],
    }
    for who, history in asked.items():
        answer = post(port, "/v1/recommend", {"history": history, "k": 5, "include": ["score", "metadata"]})
        console.print(_answer_table(who, [titles.get(item, item) for item in history], answer))


def _histories() -> dict[str, list[str]]:
    events = pq.read_table(FOLDER / "events.parquet", columns=["user_id", "item_id"]).to_pydict()
    histories = defaultdict(list)
    for user, item in zip(events["user_id"], events["item_id"], strict=True):
        histories[user].append(item)
    return histories


def _answer_table(who: str, history: list[str], answer: dict[str, Any]) -> Table:
    caption = f"model {answer['model']['name']} {answer['model']['version']}"
    if answer["fallback_used"]:
        caption += f"; unknown: {', '.join(map(str, answer['unknown_items']))}; the popular items are the fallback"
    table = Table("history, oldest first", "recommended", title=who, caption=caption, title_justify="left")
    table.add_column("score", justify="right")
    for title, item in zip_longest(history, answer["items"]):
        if item is None:
            table.add_row(title)
        else:
            score = "" if item["score"] is None else f"{item['score']:.2f}"
            table.add_row(title, (item["metadata"] or {}).get("title", str(item["item_id"])), score)
    return table


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
