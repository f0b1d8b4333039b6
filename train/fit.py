"""fit: from a config to a bundle, in this process or on the workers of a Ray cluster."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from seqray.bundle import Bundle
from seqray.config import Config
from seqray.errors import ConfigError
from train.job import LOG_FILE, Job
from train.narrator import echo_new_lines
from train.prepare import ensure_store, open_store
from train.runs import absolute, choose_run
from train.worker import Place, work


@dataclass(frozen=True)
class Trial:
    """What a search adds to a run of its own."""

    id: str
    search: Path
    """Folder of the search; its trials are runs in there."""
    on_validation: Callable[[Mapping[str, float]], None] = lambda _: None
    """Called with each validation's metrics when the run is in this process."""
    ray_callbacks: Sequence[Any] = ()
    """ray.train.UserCallback objects, for a run on Ray Train's workers."""


def fit(config: Config, *, fresh: bool = False, trial: Trial | None = None) -> Bundle:
    """Trains what `config` describes and gives back its bundle; continues the unfinished run of the same name.

    fresh: starts a new run all the same. trial: makes or continues this very trial of a search, and prints nothing.
    Errors: ConfigError when the unfinished run was started with another config; DataError from the log.
    """
    output = absolute(config.output)
    store = open_store(config) if trial else ensure_store(config)
    content = store.manifest["content_sha256"]
    root = trial.search / "trials" if trial else output / "runs" / config.name
    run, continued = choose_run(root, config, content, fresh=fresh, run_id=trial.id if trial else None)
    with run.lock():
        run = run.next_attempt()
        group = trial.search.name if trial else config.name
        in_process = config.train.num_workers == 0
        job = Job.of(config, run, absolute(store.folder), output, group, echo=in_process and not trial)
        if continued and not trial:
            print(f"continues run {run.id} (attempt {run.attempt}) in {run.folder}", flush=True)
        if in_process:
            place = Place(0, 1, local_device(config.train.device))
            work(job, place, trial.on_validation if trial else lambda _: None)
        else:
            from train.cluster import train_on_ray

            with nullcontext() if trial else echo_new_lines(run.folder / LOG_FILE):
                train_on_ray(job, config, trial.ray_callbacks if trial else ())
        run.mark("finished")
    return Bundle.load(Path(job.bundle), trusted=config.component_types)


def local_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of a run in this process; ConfigError when a GPU is asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: 'cuda' was asked for, but PyTorch sees no GPU here; choices: auto, cpu")
    use_gpu = wanted != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")
