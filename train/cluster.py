"""Ray for train and tune: joining or starting a cluster, and one run on Ray Train's workers."""

import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

from seqray.config import Config
from seqray.errors import ConfigError
from seqray.locations import join
from seqray.program_config import TrainConfig
from seqray.storage import open_filesystem
from train.finite import TrainingError
from train.job import Job
from train.run_log import RunLog, collected, sender
from train.worker import ray_worker

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # each line of a worker would appear twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the controller's next poll
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # files that repeat what the runs write themselves
}
NEVER = 1_000_000
"""train.restarts.RoomInTime bounds the time that workers are asked for; how often within it does not matter."""


def connect(config: Config, cpus: int, *, state_api: bool = False) -> bool:
    """Finds a cluster as `find_cluster` does; True when it was started here."""
    started = find_cluster(config, cpus, state_api=state_api)
    if threading.current_thread() is threading.main_thread():
        # Ray's own answer to SIGTERM aborts the process; a command that is told to end shall end in order.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    return started


def find_cluster(config: Config, cpus: int, *, state_api: bool) -> bool:
    """Joins the cluster of `cluster.address`, or starts one in this process that holds `cpus`; True when started.

    state_api: the cluster needs Ray's State API, which only a dashboard offers.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        return False
    address = config.cluster.address
    if address != "local":
        try:
            ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError) as error:
            asked = address or os.environ.get("RAY_ADDRESS")
            if asked:
                raise ConfigError(f"cluster.address: no Ray cluster answers at {asked!r}: {error}") from error
        else:
            return False
    # The lines of a run come from its log (train.narrator); what Ray prints besides stays in Ray's own logs.
    ray.init(
        address="local", num_cpus=max(cpus, os.cpu_count() or 1), include_dashboard=state_api, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    return True


def uses_gpu(config: Config) -> bool:
    """Whether each worker gets a GPU: asked for, or `auto` in a cluster that has enough now."""
    import ray

    if config.train.device != "auto":
        return config.train.device == "cuda"
    return bool(ray.cluster_resources().get("GPU", 0) >= max(1, config.train.min_workers))


def train_on_ray(job: Job, config: Config, log: RunLog, callbacks: Sequence[Any] = ()) -> None:
    """Runs `job` on train.num_workers workers; a worker that dies is replaced and goes on from the last checkpoint."""
    connect(config, config.train.max_workers * config.train.cpus_per_worker + 1)
    with collected(log) as mailbox:
        _fit(job, config, mailbox, callbacks)


def _fit(job: Job, config: Config, mailbox: Any, callbacks: Sequence[Any]) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    from train.restarts import RoomInTime, TellFailures, failed

    train, say, use_gpu = config.train, sender(mailbox), uses_gpu(config)
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    storage, storage_path = open_filesystem(join(job.run_folder, "ray"))
    _limit_waiting(train)
    trainer = TorchTrainer(
        ray_worker,
        train_loop_config={"job": job.plain(), "mailbox": mailbox},
        scaling_config=ray.train.ScalingConfig(
            num_workers=train.num_workers, use_gpu=use_gpu, resources_per_worker=resources,
            elastic_resize_monitor_interval_s=train.resize_interval_s,
        ),
        run_config=ray.train.RunConfig(
            # Our own checkpoints decide where a run goes on, so Ray must not know this name from before.
            name=f"attempt_{job.attempt}",
            storage_path=storage_path,
            storage_filesystem=storage,
            failure_config=ray.train.FailureConfig(
                max_failures=train.max_failures, max_preemption_failures=train.max_preemptions,
                controller_failure_limit=NEVER,
            ),
            callbacks=[TellFailures(say), RoomInTime(train, resources, say), *callbacks],
        ),
    )  # fmt: skip
    try:
        result = trainer.fit()
    except SystemExit as ended:  # how Ray Train answers Ctrl-C
        raise KeyboardInterrupt from ended
    except ray.train.TrainingFailedError as error:
        raise failed(error, train, job.run_folder) from error
    if result.return_value is not None:
        raise TrainingError(result.return_value)


def _limit_waiting(train: TrainConfig) -> None:
    """What Ray Train's controller reads when it starts: seconds it waits for room, a worker's answer, a barrier."""
    from train.restarts import TRIES

    # The workers' own watchdogs come first, since they know who holds the others up.
    later = f"{2 * train.hang_timeout_s + 30:g}"
    os.environ |= {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{train.start_timeout_s / TRIES:g}",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": later,
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": later,
    }
