"""`python -m train.evaluate CONFIG [evaluate.bundle=PATH]`: the baselines, and a bundle beside them."""

import argparse
import sys

from seqray.command import JSON_FLAG, run_command, write_json
from seqray.config import Config
from seqray.errors import BundleError

Rows = dict[str, dict[str, float]]


def main(config: Config, arguments: argparse.Namespace) -> None:
    """Prints the rows and writes them as JSON."""
    from train.report import print_metrics

    rows = evaluate_rows(config)
    seen = "excluded" if config.evaluate.exclude_seen else "allowed"
    print_metrics(f"{config.evaluate.split}, seen items {seen}", rows)
    if arguments.json:
        write_json(arguments.json, rows)


def evaluate_rows(config: Config) -> Rows:
    """Metrics by row: the bundle of `evaluate.bundle` when one is named, then the baselines."""
    from seqray.bundle import Bundle
    from seqray.cache import Cache
    from seqray.evaluation import evaluate, model_scorer, with_split
    from train.baseline_rows import baseline_rows
    from train.fit import local_device
    from train.prepare import ensure_store

    rows: Rows = {}
    split, store = config.evaluate.split, ensure_store(config)
    if config.evaluate.bundle:
        bundle = Bundle.load(config.evaluate.bundle, config.component_types, Cache.of(config.cluster))
        if bundle.items.column("item_id").to_pylist() != store.items_table.column("item_id").to_pylist():
            raise BundleError(f"{bundle.location}: has other items than the store {store.folder}")
        device = local_device(config.train.device)
        scorer = model_scorer(bundle.model().to(device), device)
        metrics = evaluate(scorer, store.queries(split), config.evaluate, store.num_items)
        rows[bundle.config.model.type] = with_split(metrics, split)
    return rows | baseline_rows(store, split, config.evaluate)


if __name__ == "__main__":
    about = "Ranks the test (or validation) targets with the baselines, and with a bundle when one is named."
    sys.exit(run_command("train.evaluate", about, main, (JSON_FLAG,)))
