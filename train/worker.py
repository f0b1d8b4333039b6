"""One worker of a run: what it builds, trains and writes."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from seqray.bundle import Bundle
from seqray.cache import Cache
from seqray.config import Config
from seqray.errors import BundleError, ConfigError, DataError, SeqrayError
from seqray.folder import Folder
from seqray.locations import join
from seqray.memory import keep_freed_memory
from seqray.models.protocol import build_model
from seqray.sequences import SequenceStore
from seqray.storage import MANIFEST_FILE, publish
from seqray.tracking import Tracker
from train.checkpoint_writer import CheckpointWriter
from train.checkpoints import Checkpoints
from train.finite import TrainingError
from train.gauges import Gauges
from train.guard import Guard, ignore
from train.job import Job
from train.layout import held_here
from train.narrator import Narrator
from train.optimizer import build_optimizer
from train.parallel import Parallel
from train.place import Place, from_first, is_first, sum_over_workers
from train.run_log import Say, sender
from train.runs import StaleAttempt, check_attempt
from train.state import TrainState
from train.steps_record import StepsRecord
from train.trainer import Trainer
from train.warm_start import start_from
from train.watchdog import StoreBoard, Watchdog

Report = Callable[[Mapping[str, float]], None]


def ray_worker(given: dict[str, Any]) -> str | None:
    """The function that Ray Train calls in each worker; gives back the message of an error that a retry cannot mend.

    given: the `job` as plain data, and the `mailbox` of the run's log.
    """
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    try:
        job = Job(**given["job"])
        gauges = Gauges(job.config["name"], job.run_id, place.rank)
        work(
            job, place, lambda metrics: ray.train.report(dict(metrics)), sender(given["mailbox"]), gauges,
            preempted=lambda: ray.train.get_preemption_info() is not None, watched=True,
        )  # fmt: skip
    except StaleAttempt:
        raise  # of the first worker alone: the others must not wait for it
    except SeqrayError as error:
        return str(error)
    return None


def work(
    job: Job, place: Place, report: Report, say: Say, gauges: Gauges | None = None, *,
    preempted: Callable[[], bool] = lambda: False, watched: bool = False,
) -> None:  # fmt: skip
    """Trains, evaluates on test and writes the bundle; goes on from the newest checkpoint of the run.

    `report` gets the metrics of every validation, on all workers alike; `say` takes the lines of the run's log;
    `gauges` show the speed of each worker. preempted: whether a node is about to be taken away; all workers ask it in
    the same step. watched: the process ends when it makes no headway for train.hang_timeout_s.
    """
    config = Config.parse(job.config)
    settle(place, config.train.cpus_per_worker)
    with all_or_none(place, say):
        store = store_of(job, config)
        torch.manual_seed(config.seed)
        model = build_model(config.model, store.catalogue)
    parameters = sum(weight.numel() for weight in model.parameters())
    parallel = Parallel.of(model, config, store, place)
    state = TrainState(model, build_optimizer(model, config.train))
    checkpoints = Checkpoints.at(join(job.run_folder, "checkpoints"), config.train.keep_checkpoints)
    checkpoint, passed_over = go_on(state, checkpoints)
    known = start_from(model, config, job.init_from, store) if checkpoint is None and job.init_from else None
    narrator = _narrator(job, config, place, say, gauges)
    writer, record = None, None
    if place.rank == 0:
        still_ours = partial(check_attempt, job.run_folder, job.attempt, job.owner)
        writer = CheckpointWriter(checkpoints, still_ours, narrator.tell)
        record = StepsRecord(Folder.at(job.run_folder), state.progress.global_step)
    watchdog = _watchdog(place, config.train.hang_timeout_s, say) if watched else None
    try:
        narrator.start(job, parameters, held_here(model), store, place.device.type, place.world)
        narrator.origin(job, checkpoint, passed_over, known, record.lost if record else 0)
        guard = Guard(watchdog.mark if watchdog else ignore, record.made if record else ignore, preempted)
        trainer = Trainer(config, store, state, parallel, narrator, writer, guard, job.baselines)
        trainer.train(report)
        metrics = trainer.final_metrics()
        if watchdog is not None:
            watchdog.close()
        if record is not None:
            check_attempt(job.run_folder, job.attempt, job.owner)
            metrics |= {"wasted_steps": record.steps.wasted, "restarts": record.steps.restarts}
            save_bundle(job, config, store, state, metrics)
            narrator.end({**metrics, "bundle": job.bundle})
    except BaseException:
        narrator.finish(exit_code=1)
        raise
    finally:
        for helper in (watchdog, writer, record):
            if helper is not None:
                helper.close()
    narrator.finish(exit_code=0)


def go_on(state: TrainState, checkpoints: Checkpoints) -> tuple[str | None, list[str]]:
    """(name of the checkpoint that the state is taken from, reasons why newer ones were passed over).

    ConfigError when the newest whole one is of another model.
    """
    snapshot, name, passed_over = checkpoints.newest() if is_first() else (None, None, [])
    name, passed_over = from_first((name, passed_over))
    if name is not None:
        try:
            state.restore(snapshot)
        except BundleError as error:
            raise ConfigError(f"checkpoint {name}: {error}; put the change back, or start anew with --fresh") from error
    return name, passed_over


def settle(place: Place, threads: int) -> None:
    """Binds the process to its GPU, or to its share of the CPU cores; in the command's own process it takes all."""
    keep_freed_memory()
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    elif place.world > 1:
        torch.set_num_threads(threads)


@contextmanager
def all_or_none(place: Place, say: Say) -> Iterator[None]:
    """What fails in here on one worker fails on all, so that nobody waits for one that gave up."""
    problem: SeqrayError | None = None
    try:
        yield
    except SeqrayError as error:
        problem = error
        if place.rank:
            say(f"worker {place.rank} cannot start: {error}")
    failed = sum_over_workers(place)(torch.tensor([int(problem is not None)]))
    if problem is not None:
        raise problem
    if int(failed):
        raise TrainingError("another worker could not start; the run's log says why")


def store_of(job: Job, config: Config) -> SequenceStore:
    """The store of the job, from this node's copy when it is remote; DataError when the run began with another one."""
    cache = Cache.of(config.cluster)
    store = SequenceStore(cache.fetch(job.store), job.store, cache)
    if store.manifest["content_sha256"] != job.content:
        raise DataError(f"{job.store}: has changed since the run began")
    return store


def save_bundle(job: Job, config: Config, store: SequenceStore, state: TrainState, metrics: Mapping[str, Any]) -> None:
    """Writes the bundle unless a former attempt already did; a model may say how it is built where it is served."""
    target = Folder.at(job.bundle)
    if MANIFEST_FILE in target.names():
        return
    served_config = getattr(state.model, "served_config", None)
    if served_config is not None:
        config = config.model_copy(update={"model": served_config()})
    with tempfile.TemporaryDirectory(prefix="seqray-") as temporary:
        folder = target.path if target.is_local else Path(temporary) / job.run_id
        Bundle.save(
            folder, config=config, state=state.best, items=store.items_table, metrics=metrics,
            data_fingerprint=job.content, run_id=job.run_id, curve=state.progress.history, parent=job.parent,
        )  # fmt: skip
        if not target.is_local:
            target.clear()  # what a killed attempt left half done
            publish(folder, job.bundle)


def _watchdog(place: Place, limit_s: float, say: Say) -> Watchdog:
    return Watchdog(place.rank, limit_s, StoreBoard(place.world) if place.world > 1 else None, say)


def _narrator(job: Job, config: Config, place: Place, say: Say, gauges: Gauges | None) -> Narrator:
    if place.rank:
        return Narrator(None, None, gauges)
    output = Folder.at(job.output)
    tracker = Tracker(
        config.tracking, output.path if output.is_local else Cache.of(config.cluster).folder, run_id=job.run_id,
        name=job.run_id, group=job.group, tags=(config.model.type, config.loss.type), settings=job.config,
        copy_to=None if output.is_local else output / "wandb", warn=say,
    )  # fmt: skip
    return Narrator(say, tracker, gauges)
