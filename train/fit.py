"""fit: from a config to a bundle, in this process or on the workers of a Ray cluster."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from seqray.bundle import Bundle
from seqray.cache import Cache
from seqray.config import Config
from seqray.errors import ConfigError, DataError
from seqray.folder import Folder
from seqray.sequences import SequenceStore, Split
from seqray.tracking import resolve_mode
from train.baseline_rows import Rows, baseline_rows
from train.code import code_of
from train.job import Job
from train.place import Place
from train.prepare import ensure_store, open_store
from train.run_log import RunLog
from train.runs import Run, choose_run
from train.worker import work

SPLITS: tuple[Split, ...] = ("val", "test")


@dataclass(frozen=True)
class Trial:
    """What a search adds to a run of its own."""

    id: str
    search: Folder
    """Folder of the search; its trials are runs in there."""
    on_validation: Callable[[Mapping[str, float]], None] = lambda _: None
    """Called with each validation's metrics when the run is in this process."""
    ray_callbacks: Sequence[Any] = ()
    """ray.train.UserCallback objects, for a run on Ray Train's workers."""


def fit(config: Config, *, fresh: bool = False, accept_changes: bool = False, trial: Trial | None = None) -> Bundle:
    """Trains what `config` describes and gives back its bundle; continues the unfinished run of the same name.

    fresh: starts a new run all the same. accept_changes: continues it with another config, other data or other code.
    trial: makes or continues this very trial of a search, and prints nothing.
    Errors: ConfigError when the unfinished run was started with something else; DataError from the log.
    """
    output, cache = Folder.at(config.output), Cache.of(config.cluster)
    in_process = config.train.num_workers == 0
    device = local_device(config.train.device) if in_process else None
    resolve_mode(config.tracking)  # a mistake in WANDB_MODE is told before anything starts
    store = open_store(config) if trial else ensure_store(config)
    check_targets(store)
    run, continued = _choose(config, store, output, fresh, accept_changes, trial)
    with run.lock():
        run = run.next_attempt()
        if config.train.init_from and run.parent is None:
            run = run.with_parent(Bundle.load(config.train.init_from, config.component_types, cache).version)
        group = trial.search.name if trial else config.name
        # Workers must not wait for their first one to rank the baselines.
        baselines: dict[str, Rows] = {}
        if not in_process:
            baselines = {split: baseline_rows(store, split, config.evaluate) for split in SPLITS}
        job = Job.of(config, run, output, group, baselines)
        if continued and not trial:
            print(f"continues run {run.id} (attempt {run.attempt}) in {run.folder}", flush=True)
        try:
            _work(job, config, device, trial)
        except KeyboardInterrupt:
            print(f"run {run.id} is unfinished; the same command goes on with it", flush=True)
            raise
        run.mark("finished")
    return Bundle.load(job.bundle, config.component_types, cache)


def _work(job: Job, config: Config, device: torch.device | None, trial: Trial | None) -> None:
    """In this process on `device`, or on Ray Train's workers when there is none."""
    log = RunLog(Folder.at(job.run_folder), echo=trial is None)
    try:
        if device is not None:
            work(job, Place(0, 1, device), trial.on_validation if trial else lambda _: None, log.say)
        else:
            from train.cluster import train_on_ray

            train_on_ray(job, config, log, trial.ray_callbacks if trial else ())
    finally:
        log.close()


def _choose(
    config: Config, store: SequenceStore, output: Folder, fresh: bool, accept_changes: bool, trial: Trial | None
) -> tuple[Run, bool]:
    choose = partial(
        choose_run, config=config, content=store.manifest["content_sha256"], code=code_of(config),
        accept_changes=accept_changes,
    )  # fmt: skip
    if trial:
        return choose(trial.search / "trials", run_id=trial.id)
    return choose(output / "runs" / config.name, fresh=fresh, ignore=("tune",))


def check_targets(store: SequenceStore) -> None:
    """DataError when the split leaves nothing to choose the best weights by; a note when there is no test."""
    counts = store.manifest["counts"]
    if not counts["val_users"]:
        raise DataError(f"{store.folder}: data.split gives no validation target ({counts}); choose another split")
    if not counts["test_users"]:
        print(f"note: {store.folder}: data.split gives no test target; all test metrics will be 0", flush=True)


def local_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of a run in this process; ConfigError when a GPU is asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: 'cuda' was asked for, but PyTorch sees no GPU here; choices: auto, cpu")
    use_gpu = wanted != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")
