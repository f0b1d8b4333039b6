"""python -m serve.batch CONFIG serve.bundle=PATH --output FOLDER: the best items of all users of a store, as Parquet.

Their whole histories are asked about, as the shop would ask tomorrow. What a killed command had finished stays.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from seqray.command import Flag, end_in_order_on_sigterm, run_command
from seqray.config import Config
from seqray.errors import ConfigError, DataError
from serve.cluster import check_resources, join, start_local

if TYPE_CHECKING:
    from seqray.bundle import Bundle
    from seqray.folder import Folder
    from serve.scoring import Plan, WorkerSettings

OUTPUT = Flag("--output", "folder or URI of the scores; the same again goes on with what is missing", metavar="FOLDER")
PLAN_FILE, MANIFEST_FILE = "_plan.json", "_manifest.json"
"""Readers of Parquet folders pass over names with an underscore."""
LINE_EVERY_S = 5.0
NO_PROGRESS_S = 900.0
"""Seconds without a finished file after which the command ends, such as in a cluster that has no room for it."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status."""
    return run_command("serve.batch", "Scores all users of the store to Parquet.", _batch, [OUTPUT], argv)


def _batch(config: Config, arguments: argparse.Namespace) -> None:
    if arguments.output is None:
        raise ConfigError("--output: name the folder of the scores")
    manifest = score_users(config, arguments.output)
    print(f"scores: {manifest['rows']:,} rows of {manifest['users']:,} users in {arguments.output}")
    look = f"import pyarrow.parquet as pq; print(pq.read_table({arguments.output!r}).slice(0, 20).to_pandas())"
    print(f"look:   {shlex.join(['python', '-c', look])}")


def score_users(config: Config, output: str) -> dict[str, Any]:
    """Scores all users of the prepared store of `config` and returns the manifest of the output.

    ConfigError, DataError or BundleError when something does not fit or cannot be read or written.
    """
    from seqray.folder import Folder

    folder = Folder.at(output)
    bundle, version = _bundle(config)
    plan = _begun(_plan(config, bundle, version), folder)
    finished = folder.read_text(MANIFEST_FILE)
    if finished is not None:
        print(f"{folder}: complete already")
        return dict(json.loads(finished))
    there = set(folder.names())
    missing = [number for number in range(plan.files) if _file_name(number) not in there]
    print(
        f"scoring {plan.users:,} users with {version}, k {plan.k}: {plan.files:,} files, "
        f"{plan.files - len(missing):,} of them there already",
        flush=True,
    )
    if missing:
        _run(config, plan, folder, missing)
    manifest = {**asdict(plan), "files": plan.files, "rows": _count_rows(folder, plan)}
    folder.write_durably(MANIFEST_FILE, _json(manifest))
    return manifest


def _bundle(config: Config) -> tuple["Bundle", str]:
    """The bundle that the endpoint would answer with, and its version."""
    from serve.promote import first_bundle, named_bundle
    from serve.registry import Registry

    if config.serve.registry is None or Registry.at(config.serve.registry).head().champion is None:
        return named_bundle(config)
    bundle, number = first_bundle(config)
    return bundle, str(number)


def _plan(config: Config, bundle: "Bundle", version: str) -> "Plan":
    from seqray.cache import Cache
    from seqray.folder import Folder
    from seqray.sequences import SequenceStore
    from seqray.storage import MANIFEST_FILE as BUNDLE_MANIFEST
    from seqray.storage import file_sha256
    from serve.scoring import Plan

    batch, cache = config.serve.batch, Cache.of(config.cluster)
    location = str(Folder.at(config.data.store))
    try:
        store = SequenceStore(cache.fetch(location), location, cache)
    except DataError as error:
        raise DataError(f"{error}; python -m train.prepare makes the store") from error
    if batch.filter is not None:
        _check_filter(bundle, batch.filter)
    return Plan(
        bundle=bundle.location,
        bundle_sha256=file_sha256(bundle.folder / BUNDLE_MANIFEST),
        model_version=version,
        store=location,
        store_sha256=store.manifest["content_sha256"],
        users=len(store.user_ids),
        users_a_file=batch.users_a_file,
        k=batch.k,
        exclude_seen=batch.exclude_seen,
        filter=batch.filter,
        now=time.time(),
    )


def _check_filter(bundle: "Bundle", data: dict[str, Any]) -> None:
    import torch

    from seqray.item_filter import FilterError, read_filter
    from seqray.item_masks import ItemMasks

    try:
        read_filter(data, ItemMasks(bundle.items, torch.device("cpu")).kinds)
    except FilterError as error:
        place = ".".join(map(str, ("serve.batch.filter", *error.path)))
        raise ConfigError(f"{place}: {error.detail}") from error


def _begun(plan: "Plan", folder: "Folder") -> "Plan":
    """The plan of the folder, which is `plan` when it is new; DataError when it holds anything else."""
    from serve.scoring import Plan

    text = folder.read_text(PLAN_FILE)
    if text is None:
        if folder.names():
            raise DataError(f"{folder}: holds files but no {PLAN_FILE}; name an empty folder or a new one")
        folder.write_durably(PLAN_FILE, _json(asdict(plan)))
        return plan
    try:
        there = dict(json.loads(text))
        differences = plan.differences(there)
        if not differences:
            return Plan(**{**asdict(plan), "now": float(there["now"])})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder}: {PLAN_FILE} cannot be read: {error}") from error
    raise DataError(f"{folder}: holds scores that differ in {', '.join(differences)}; name another folder")


def _run(config: Config, plan: "Plan", folder: "Folder", missing: Sequence[int]) -> None:
    import ray

    from seqray.cache import Cache
    from serve.admission import Admission
    from serve.scoring import WorkerSettings

    serve = config.serve
    cpus = math.ceil(serve.cpus_per_replica)
    settings = WorkerSettings(
        folder.location, Admission.of(config), Cache.of(config.cluster), serve.device, cpus, serve.batch.batch_size
    )
    is_local = not join(config)
    if is_local:
        workers = serve.batch.num_workers or max(1, int((os.cpu_count() or 1) / serve.cpus_per_replica))
        start_local(math.ceil(workers * serve.cpus_per_replica))
    try:
        end_in_order_on_sigterm()
        check_resources(config)
        score_files(config, plan, settings, missing)
    finally:
        if is_local:
            ray.shutdown()


def score_files(config: Config, plan: "Plan", settings: "WorkerSettings", missing: Sequence[int]) -> None:
    """Makes the missing files on the cluster that was joined; DataError with what went wrong in a worker."""
    import ray.data
    from ray.data.exceptions import ExecutionTimeoutError

    from serve.scoring import ScoringWorker

    serve, context = config.serve, ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    numbers = ray.data.from_items([{"number": number} for number in missing], override_num_blocks=len(missing))
    results = numbers.map_batches(
        ScoringWorker,
        fn_constructor_args=(plan, settings),
        batch_size=1,
        # From one worker up: a job that asks for all of them at once would wait for ever where others hold some.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(_room(config), len(missing))),
        num_cpus=serve.cpus_per_replica,
        num_gpus=1 if serve.device == "cuda" else 0,
    )
    begin = said = time.monotonic()
    users = 0
    try:
        for row in results.iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            users += min(plan.users_a_file, plan.users - row["number"] * plan.users_a_file)
            now = time.monotonic()
            if now - said >= LINE_EVERY_S:
                print(f"{users:,} users  {users / (now - begin):,.0f} users/s", flush=True)
                said = now
    except ExecutionTimeoutError as error:
        raise ConfigError(
            f"cluster: no file was finished in {NO_PROGRESS_S:g} s; is there room for a worker?"
        ) from error
    seconds = time.monotonic() - begin
    print(f"scored {users:,} users in {seconds:.1f} s, {users / seconds:,.0f} users/s with the start of the workers")


def _room(config: Config) -> int:
    """Workers to use."""
    import ray

    has, serve = ray.cluster_resources(), config.serve
    room = int(has.get("GPU", 0)) if serve.device == "cuda" else int(has.get("CPU", 0) // serve.cpus_per_replica)
    return max(1, min(room, serve.batch.num_workers or room))


def _count_rows(folder: "Folder", plan: "Plan") -> int:
    from seqray.table_files import find_files, num_rows

    files = find_files(folder.location, "parquet")
    if len(files) != plan.files:
        raise DataError(f"{folder}: has {len(files)} files instead of {plan.files}; run the command again")
    return sum(num_rows(file) for file in files)


def _file_name(number: int) -> str:
    from serve.scoring import file_name

    return file_name(number)


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode("utf-8")


if __name__ == "__main__":
    sys.exit(main())
