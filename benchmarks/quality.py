"""Quality of a recipe: trains a config with several seeds, prints mean and spread beside published rows and baselines.

    python benchmarks/quality.py configs/amazon_beauty.yaml data.path=FILE [--seeds 3] [--variants FILE]

Each seed is one `python -m train`; its result is kept under `<output>/quality` and not trained again, so a benchmark
that was interrupted goes on. `--variants` names a YAML file of label -> overrides, a row for each instead of one
recipe. The weights are chosen by validation, and the test targets are ranked once.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from seqray.config import Config, load_config  # noqa: E402

PUBLISHED = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))
"""Name of a config -> {metrics: [...], rows: {label: [values]}}."""


def main() -> None:
    arguments = _arguments()
    config = load_config(arguments.config, tuple(arguments.overrides))
    published = PUBLISHED.get(config.name, {"metrics": ["ndcg@10", "hit_rate@10"], "rows": {}})
    variants: dict[str, list[str]] = {config.name: []}
    if arguments.variants:
        variants = yaml.safe_load(Path(arguments.variants).read_text(encoding="utf-8"))
    seeds = range(config.seed, config.seed + arguments.seeds)
    table = Table("", *(f"test/{metric}" for metric in published["metrics"]), "seeds", "best epoch", "seconds a run")
    results: dict[str, list[dict[str, Any]]] = {}
    for label, overrides in variants.items():
        results[label] = [_result(arguments, [*arguments.overrides, *overrides], config, seed) for seed in seeds]
        _add_row(table, label, results[label], published["metrics"])
    last = results[label][-1]
    for name, row in last["metrics"]["baselines"].items():
        table.add_row(name, *(f"{row[f'test/{metric}']:.4f}" for metric in published["metrics"]), "", "", "")
    for label, values in published["rows"].items():
        table.add_row(f"published: {label}", *(f"{value:.4f}" for value in values), "", "", "")
    Console(width=150).print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="path=value")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", type=Path)
    return parser.parse_intermixed_args()


def _result(arguments: argparse.Namespace, overrides: list[str], config: Config, seed: int) -> dict[str, Any]:
    """What `python -m train` found for this seed, now or in a former call."""
    wanted = load_config(arguments.config, (*overrides, f"seed={seed}"))
    key = hashlib.sha256(wanted.yaml().encode()).hexdigest()[:12]
    path = Path(config.output) / "quality" / f"{config.name}-{key}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name has one unfinished run at a time; the seed makes another store only where it orders the ties.
        store = f"{wanted.data.store}-{seed}" if wanted.data.tie_order == "shuffle" else wanted.data.store
        own = [f"seed={seed}", f"name={config.name}-{key}", f"data.store={store}"]
        command = [sys.executable, "-m", "train", str(arguments.config.resolve()), *overrides, *own]
        subprocess.run([*command, "--json", str(path.resolve())], cwd=ROOT, check=True)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _add_row(table: Table, label: str, results: list[dict[str, Any]], metrics: list[str]) -> None:
    cells = []
    for metric in metrics:
        values = [result["metrics"][f"test/{metric}"] for result in results]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
    epochs = ", ".join(str(result["metrics"]["best_epoch"]) for result in results)
    seconds = statistics.median(result["metrics"]["train_seconds"] for result in results)
    table.add_row(f"[bold]{label}[/bold]", *cells, str(len(results)), epochs, f"{seconds:.0f}")


if __name__ == "__main__":
    main()
