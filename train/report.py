"""What the commands print at the end: the model beside the baselines, and the next command."""

import argparse
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from seqray.bundle import Bundle
from seqray.command import next_command, write_json

Rows = Mapping[str, Mapping[str, Any]]


def print_metrics(title: str, rows: Rows) -> None:
    """A table with a line for each row: hit_rate (recall for baskets) and ndcg at each k, then coverage at the last."""
    keys = [key for key, value in next(iter(rows.values())).items() if isinstance(value, float) and "@" in key]
    baskets = any("/recall@" in key for key in keys)
    shown = [key for key in keys if key.split("/")[1].startswith(("recall@" if baskets else "hit_rate@", "ndcg@"))]
    shown += [key for key in keys if "/coverage@" in key][-1:]
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for key in shown:
        table.add_column(key.split("/")[1], justify="right")
    for name, metrics in rows.items():
        table.add_row(name, *(f"{metrics[key]:.4f}" if key in metrics else "" for key in shown))
    Console(width=120).print(table)


def bundle_rows(bundle: Bundle, split: str) -> dict[str, dict[str, float]]:
    """The bundle's metrics of one split, and the baselines'."""
    everything = {bundle.config.model.type: bundle.metrics, **bundle.metrics["baselines"]}
    return {
        name: {key: value for key, value in metrics.items() if key.startswith(f"{split}/")}
        for name, metrics in everything.items()
    }


def finish_command(bundle: Bundle, arguments: argparse.Namespace) -> None:
    """Prints what a train run or a search made and the command that serves it; writes the same as JSON."""
    print_metrics(f"test, full ranking over {len(bundle.vocabulary):,} items", bundle_rows(bundle, "test"))
    print(f"bundle: {bundle.location}\nnext:   {next_command('serve', arguments, f'serve.bundle={bundle.location}')}")
    if arguments.json:
        write_json(arguments.json, {"bundle": bundle.location, "metrics": bundle.metrics})
