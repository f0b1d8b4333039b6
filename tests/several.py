"""Workers as plain processes that meet by gloo: what Ray Train does, without a cluster."""

import contextlib
import datetime as dt
from collections.abc import Mapping

import torch
import torch.distributed as dist
from struck import FORK
from torch import Tensor

from seqray.bundle import Bundle
from seqray.config import Config
from seqray.folder import Folder
from train.code import code_of
from train.job import Job
from train.place import Place
from train.prepare import ensure_store
from train.run_log import RunLog
from train.runs import Run, choose_run
from train.worker import work


class Cut(Exception):
    """Ends a run from outside the training code."""


def fit_with(world: int, *configs: Config) -> list[Bundle]:
    """The bundles of runs with so many workers, one run after the other; unfinished runs go on."""
    jobs = [job_of(config) for config in configs]
    run_workers(world, jobs, None)
    for job in jobs:
        Run.load(Folder.at(job.run_folder)).mark("finished")
    return [Bundle.load(job.bundle, trusted=config.component_types) for job, config in zip(jobs, configs, strict=True)]


def job_of(config: Config) -> Job:
    """A job for the next attempt at the run of this config."""
    output, content = Folder.at(config.output), ensure_store(config).manifest["content_sha256"]
    run, _ = choose_run(output / "runs" / config.name, config, content, code=code_of(config))
    return Job.of(config, run.next_attempt(), output, config.name)


def leave_after(validations: int, world: int, config: Config) -> None:
    """Begins a run, or goes on with it, and leaves it unfinished."""
    run_workers(world, [job_of(config)], validations)


def run_workers(world: int, jobs: list[Job], validations: int | None) -> None:
    """All workers of all jobs; AssertionError when one of them fails."""
    processes = [FORK.Process(target=one_worker, args=(rank, world, jobs, validations)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * world


def one_worker(rank: int, world: int, jobs: list[Job], validations: int | None) -> None:
    """Works on all jobs, on each until so many validations were reported."""
    torch.set_num_threads(1)
    for job in jobs:
        left = [validations]

        def report(metrics: Mapping[str, float], left: list[int | None] = left) -> None:
            if left[0] is not None:
                left[0] -= 1
                if not left[0]:
                    raise Cut

        dist.init_process_group(
            "gloo", init_method=f"file://{job.run_folder}/meet_{job.attempt}", rank=rank, world_size=world,
            timeout=dt.timedelta(seconds=120),
        )  # fmt: skip
        with contextlib.suppress(Cut):
            work(
                job, Place(rank, world, torch.device("cpu")), report, RunLog(Folder.at(job.run_folder), echo=False).say
            )
        dist.destroy_process_group()


def matters(name: str, tensor: Tensor) -> Tensor:
    """A weight without the keys' bias: softmax does not see it, so Adam blows up the rounding of a slope of zero."""
    if name.endswith("qkv.bias"):
        query, _, value = tensor.chunk(3)
        return torch.cat([query, value])
    return tensor.chunk(2)[1] if name.endswith("key_value.bias") else tensor
