"""One worker of a run. What is distributed is here and nowhere else: ranks, DDP, sums over workers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from seqray.bundle import Bundle
from seqray.config import Config
from seqray.errors import SeqrayError
from seqray.evaluation import Part
from seqray.losses import build_loss
from seqray.models.protocol import build_model
from seqray.sequences import SequenceStore
from seqray.tracking import Tracker
from train.job import LOG_FILE, Job
from train.narrator import Narrator
from train.objective import Objective
from train.optimizer import build_optimizer
from train.runs import check_attempt
from train.state import TrainState
from train.trainer import Trainer
from train.warm_start import start_from_bundle

Report = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True)
class Place:
    """This worker among all workers."""

    rank: int
    world: int
    device: torch.device


def ray_worker(plain_job: dict[str, Any]) -> str | None:
    """The function that Ray Train calls in each worker; gives back the message of an error that a retry cannot mend."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    try:
        work(Job(**plain_job), place, lambda metrics: ray.train.report(dict(metrics)))
    except SeqrayError as error:
        return str(error)
    return None


def work(job: Job, place: Place, report: Report) -> None:
    """Trains, evaluates on test and writes the bundle; goes on from the newest checkpoint of the run.

    `report` gets the metrics of every validation, on all workers alike.
    """
    config = Config.parse(job.config)
    store = SequenceStore(job.store)
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    elif place.world > 1:
        torch.set_num_threads(config.train.cpus_per_worker)
    torch.manual_seed(config.seed)
    model = build_model(config.model, store.num_items).to(place.device)
    state = TrainState(model, build_optimizer(model, config.train))
    checkpoint, passed_over = state.load_newest(Path(job.run_folder) / "checkpoints")
    if checkpoint is None and job.init_from:
        start_from_bundle(model, Path(job.init_from), config.component_types, store.vocabulary)
    objective: nn.Module = Objective(model, build_loss(config.loss), store.num_items, config.train.precision)
    if place.world > 1:
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    part = Part(place.rank, place.world, sum_over_workers(place))
    log = None if place.rank else Path(job.run_folder) / LOG_FILE
    narrator = Narrator(log, job.echo, _tracker(job, config, place))
    narrator.start(job, model, store, place.device.type, place.world, checkpoint, passed_over)
    trainer = Trainer(config, store, state, objective, part, narrator, Path(job.run_folder), job.attempt)
    try:
        trainer.train(report)
        metrics = trainer.final_metrics()
        if place.rank == 0:
            check_attempt(Path(job.run_folder), job.attempt)
            save_bundle(job, config, store, state, metrics)
            narrator.summary({**metrics, "bundle": job.bundle})
    except BaseException:
        narrator.finish(exit_code=1)
        raise
    narrator.finish(exit_code=0)


def save_bundle(job: Job, config: Config, store: SequenceStore, state: TrainState, metrics: Mapping[str, Any]) -> None:
    """Writes the bundle unless a former attempt already did."""
    if not Path(job.bundle).exists():
        Bundle.save(
            job.bundle, config=config, state=state.best, items=store.items_table, metrics=metrics,
            data_fingerprint=store.manifest["content_sha256"], run_id=job.run_id, curve=state.progress.history,
            parent=parent_id(job, config),
        )  # fmt: skip


def parent_id(job: Job, config: Config) -> str | None:
    """Run id of the bundle that the run started from."""
    return None if job.init_from is None else Bundle.load(job.init_from, config.component_types).version


def sum_over_workers(place: Place) -> Callable[[Tensor], Tensor]:
    """Adds a tensor of whole numbers or a loss over all workers; a single worker keeps its own."""

    def add(tensor: Tensor) -> Tensor:
        if place.world == 1:
            return tensor
        total = tensor.to(place.device)
        dist.all_reduce(total)
        return total.to(tensor.device)

    return add


def _tracker(job: Job, config: Config, place: Place) -> Tracker | None:
    if place.rank:
        return None
    return Tracker(
        config.tracking, Path(job.wandb), run_id=job.run_id, name=job.run_id, group=job.group,
        tags=(config.model.type, config.loss.type), settings=job.config,
    )  # fmt: skip
