"""`python -m train.prepare CONFIG`: from the log to the prepared store."""

import argparse
import json
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from seqray.command import next_command, run_command
from seqray.config import Config
from seqray.data_config import DataConfig
from seqray.errors import DataError
from seqray.locations import join
from seqray.storage import open_filesystem, publish, read_manifest_bytes, temporary_folder

if TYPE_CHECKING:
    from seqray.log_reader import Log
    from seqray.sequences import SequenceStore


def ensure_store(config: Config) -> "SequenceStore":
    """The prepared store of `config`, made now (one line says why) when there is none or its input changed."""
    from seqray.store_writer import store_fingerprint

    fingerprint = store_fingerprint(config.data, config.seed)
    reason = _why_prepare(config.data, fingerprint)
    if reason:
        print(f"preparing {config.data.store}: {reason}", flush=True)
        prepare_store(config)
    return open_store(config)


def open_store(config: Config) -> "SequenceStore":
    """The prepared store of `config` as it is, from this node's copy when it is remote."""
    from seqray.cache import Cache
    from seqray.sequences import SequenceStore

    cache = Cache.of(config.cluster)
    return SequenceStore(cache.fetch(config.data.store), str(config.data.store), cache)


def prepare_store(config: Config) -> dict[str, Any]:
    """Reads the log, writes the store at `data.store` in place of an older one, and returns its manifest.

    DataError when the log does not fit; then an older store stays as it was.
    """
    from seqray.event_shards import publish_shards
    from seqray.interactions import shuffled_ties
    from seqray.log_reader import read_log
    from seqray.splits import split_positions
    from seqray.store_writer import store_fingerprint, write_store

    data = config.data
    fingerprint = store_fingerprint(data, config.seed)
    log = read_log(data)
    _check_bad_share(log, data)
    tie = shuffled_ties(len(log.events), config.seed) if data.tie_order == "shuffle" else log.tie
    ordered = log.events.ordered(tie)
    products = ordered.without_items(data.drop_items)
    distinct = products
    if data.repeats != "keep":
        distinct = products.without_repeats("user" if data.repeats == "drop" else "basket")
    events = distinct.filtered(data.min_user_events, data.min_item_events, data.filter).compacted()
    if not len(events):
        raise DataError(
            f"{data.path}: no events are left of {len(distinct)}: data.min_user_events {data.min_user_events}, "
            f"data.min_item_events {data.min_item_events}, data.filter {data.filter}"
        )
    counts = {
        "rows_read": log.rows_read,
        "quarantined": log.quarantined,
        "other_events": log.other_events,
        "repeated_events": log.repeated_events,
        "dropped_items": len(ordered) - len(products),
        "dropped_repeats": len(products) - len(distinct),
        "dropped_by_filter": len(distinct) - len(events),
    }
    split = split_positions(events, data.split)
    folder = temporary_folder(data.store)
    shards = temporary_folder(data.store) if data.store_shards else None
    try:
        manifest = write_store(
            folder, events, split, data, bad_rows=log.bad_rows, counts=counts, fingerprint=fingerprint,
            shards_folder=shards,
        )  # fmt: skip
        if shards is not None:
            publish_shards(shards, data.store)
        publish(folder, data.store)
    finally:
        for temporary in (folder, shards):
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _check_bad_share(log: "Log", data: DataConfig) -> None:
    if not log.rows_read:
        raise DataError(f"{data.path}: no rows")
    share = log.bad_rows.num_rows / log.rows_read
    if share <= data.max_bad_share:
        return
    from seqray.store_writer import BAD_ROWS_FILE, write_bad_rows, write_manifest

    place, mark, options = data.store.partition("?")
    target = f"{place.rstrip('/')}.rejected{mark}{options}"
    folder = temporary_folder(target)
    try:
        write_bad_rows(folder, log.bad_rows)
        write_manifest(folder, {"rejected": True, "rows_read": log.rows_read, "quarantined": log.quarantined})
        publish(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in log.quarantined.items())
    raise DataError(
        f"{data.path}: {log.bad_rows.num_rows:,} of {log.rows_read:,} rows are bad ({share:.2%}; {reasons}), "
        f"data.max_bad_share is {data.max_bad_share:.2%}; see {join(target, BAD_ROWS_FILE)}"
    )


def _why_prepare(data: DataConfig, fingerprint: str) -> str | None:
    from seqray.store_writer import plain_data_config

    content = read_manifest_bytes(*open_filesystem(data.store))
    if content is None:
        return "no prepared store there"
    try:
        manifest = json.loads(content)
    except ValueError:
        return "the store there is damaged"
    if manifest.get("fingerprint") == fingerprint:
        return None
    before, now = manifest.get("data") or {}, plain_data_config(data)
    changed = [f"data.{key}" for key in now if before.get(key) != now[key]]
    return f"changed since: {', '.join(changed) or 'the log'}"


def _print_summary(config: Config, manifest: dict[str, Any], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    counts = manifest["counts"]
    table = Table("prepared", "count", box=None)
    table.columns[1].justify = "right"
    rows = {
        "rows read": counts["rows_read"],
        **{f"quarantined: {reason}": n for reason, n in counts["quarantined"].items()},
        "other events": counts["other_events"],
        "repeated events": counts["repeated_events"],
        "dropped items": counts["dropped_items"],
        "dropped repeats": counts["dropped_repeats"],
        "dropped by minimums": counts["dropped_by_filter"],
        **{name: counts[name] for name in ("users", "items", "events")},
        "train events": counts["train_events"],
        "validation targets": counts["val_users"],
        "test targets": counts["test_users"],
    }
    for name, count in rows.items():
        table.add_row(name, f"{count:,}")
    table.add_row("seconds", f"{seconds:.1f}")
    Console().print(table)
    print(f"store: {config.data.store}")


def _prepare(config: Config, arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    manifest = prepare_store(config)
    _print_summary(config, manifest, time.perf_counter() - start)
    print(f"next:  {next_command('train', arguments)}")


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return run_command("train.prepare", "Prepares the log of a config for training.", _prepare, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
