"""search: from a config with `tune.space` to the bundle of the best trial."""

from typing import Any

from seqray.bundle import Bundle
from seqray.cache import Cache
from seqray.config import Config
from seqray.errors import ConfigError, SeqrayError
from seqray.folder import Folder
from seqray.storage import open_filesystem
from train.cluster import connect, uses_gpu
from train.code import code_of
from train.fit import check_targets
from train.prepare import ensure_store
from train.runs import Run, choose_run
from tune.picture import draw_search
from tune.strategy import domain, tune_config
from tune.trial import run_trial
from tune.trials import Recorder, print_trials, read_trials

NESTED_TRIAL_CPU = 0.01
"""A trial that only drives Ray Train's workers must not take a CPU away from them."""


class SearchError(SeqrayError):
    """A search without a winner."""


def search(config: Config, *, fresh: bool = False, accept_changes: bool = False) -> Bundle:
    """Runs `tune.num_trials` trials and gives back the bundle of the one best by `train.monitor` on validation.

    An unfinished search of the same name and config goes on: finished trials are kept, interrupted ones continue from
    their checkpoints. A trial that fails costs one trial. Errors: ConfigError without tune.space or when the
    unfinished search differs; SearchError when no trial finished.
    """
    if not config.tune.space:
        raise ConfigError("tune.space: nothing to search; give it paths such as train.learning_rate")
    if config.train.min_workers != config.train.max_workers:
        raise ConfigError("train.num_workers: the trials of a search share the cluster out, so it is one number there")
    output = Folder.at(config.output)
    store = ensure_store(config)
    check_targets(store)
    root = output / "searches" / config.name
    run, continued = choose_run(
        root, config, store.manifest["content_sha256"], code=code_of(config), fresh=fresh, accept_changes=accept_changes
    )
    with run.lock():
        run = run.next_attempt()
        print(f"{'continues ' if continued else ''}search {run.id} in {run.folder}", flush=True)
        _run_trials(config, run, output / "bundles" / config.name, accept_changes)
        rows = read_trials(run.folder)
        print_trials(rows, config.train.monitor)
        unfinished = [row for row in rows if row.status == "interrupted"]
        if unfinished or len(rows) < config.tune.num_trials:
            raise SearchError(f"{run.folder}: the search was interrupted; the same command goes on with it")
        run.mark("finished")
    print(f"search plot: {draw_search(run.folder, rows, config.train.monitor)}")
    winner = max((row for row in rows if row.bundle), key=lambda row: row.best, default=None)
    if winner is None:
        error = next((row.error for row in rows if row.error), "none")
        raise SearchError(f"{run.folder}: no trial finished; the first error: {error}")
    assert winner.bundle is not None
    print(f"winner: trial {winner.number}, {config.train.monitor} {winner.best:.4f}, {winner.sample}")
    return Bundle.load(winner.bundle, config.component_types, Cache.of(config.cluster))


def _run_trials(config: Config, run: Run, bundles: Folder, accept_changes: bool) -> None:
    nested = config.train.max_workers > 1
    workers = config.train.max_workers * config.train.cpus_per_worker
    connect(config, workers + 1 if nested else config.train.cpus_per_worker, state_api=nested)
    import ray
    import ray.tune

    use_gpu = uses_gpu(config)
    resources = {"cpu": NESTED_TRIAL_CPU if nested else config.train.cpus_per_worker}
    if use_gpu and not nested:
        resources["gpu"] = 1
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(run_trial, job=_job(config, run, accept_changes)), resources
    )
    storage, folder = open_filesystem(str(run.folder))
    path = f"{folder}/tune"
    if ray.tune.Tuner.can_restore(path, storage):
        tuner = ray.tune.Tuner.restore(path, trainable, resume_unfinished=True, storage_filesystem=storage)
    else:
        at_once = config.tune.max_concurrent or _places(config, nested, use_gpu)
        tuner = ray.tune.Tuner(
            trainable,
            param_space={key: domain(value) for key, value in config.tune.space.items()},
            tune_config=tune_config(config, at_once),
            run_config=ray.tune.RunConfig(
                name="tune",
                storage_path=folder,
                storage_filesystem=storage,
                verbose=0,
                callbacks=[Recorder(run.folder, bundles, config.train.monitor, int(config.tune.search == "optuna"))],
            ),
        )
    tuner.fit()


def _job(config: Config, run: Run, accept_changes: bool) -> dict[str, Any]:
    paths = {"output": config.output, "data.store": config.data.store, "train.init_from": config.train.init_from}
    # A trial's process has another working folder.
    rooted = {key: str(Folder.at(path)) for key, path in paths.items() if path is not None}
    plain = config.override(rooted).plain()
    return {"config": plain, "search": str(run.folder), "accept_changes": accept_changes}


def _places(config: Config, nested: bool, use_gpu: bool) -> int:
    """Trials that the cluster holds at a time."""
    import ray

    resources = ray.cluster_resources()
    workers = config.train.max_workers if nested else 1
    if use_gpu:
        return max(1, int(resources.get("GPU", 0)) // workers)
    return max(1, int(resources.get("CPU", 1)) // (workers * config.train.cpus_per_worker))
