"""When workers are started again, how long the cluster may take for it, and what is said when it does not work out."""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.execution.callback import ControllerCallback

from seqray.program_config import TrainConfig
from train.finite import TrainingError

TRIES = 4
"""Times that a group of workers is asked for within train.start_timeout_s."""
SECONDS_BETWEEN_LINES = 30.0
WITHOUT_WORKERS = {"InitializingState", "SchedulingState", "RestartingState", "ReschedulingState", "ResizingState"}
SIGNS = {
    "its node has died": "its node died",
    "worker process has died": "its process died: killed, out of memory or crashed",
    "actor is temporarily unavailable": "it cannot be reached",
    "health check has been hanging": "it does not answer Ray Train",
    "Connection closed by peer": "it lost another worker",
    "Connection reset by peer": "it lost another worker",
}
"""Part of what Ray says of a dead worker in many lines -> what we say."""
AGAIN = "The same command goes on from the last checkpoint"
Say = Callable[[str], None]


class TellFailures(ray.train.UserCallback):  # type: ignore[misc]
    """Writes to the run's log why workers are started again; lives in Ray's controller and must not raise."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Workers failed."""
        with contextlib.suppress(ray.exceptions.RayError, OSError):
            for rank, error in sorted(worker_exceptions.items()):
                self._say(f"worker {rank} failed: {reason_of(error)}")


class RoomInTime(ControllerCallback):  # type: ignore[misc]
    """Ends the run when the cluster has had no room for its workers for train.start_timeout_s.

    Ray Train itself would ask for ever. Lives in its controller, which takes what a hook raises for the end of the run.
    """

    def __init__(self, train: TrainConfig, resources: Mapping[str, float], say: Say) -> None:
        """resources: of one worker."""
        self._train, self._resources, self._say = train, dict(resources), say
        self._since = self._told = time.monotonic()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """A state was entered, perhaps the same once more."""
        now = time.monotonic()
        if type(current_state).__name__ not in WITHOUT_WORKERS:
            self._since = self._told = now
            return
        if now - self._since > self._train.start_timeout_s:
            raise TrainingError(no_room(self._train, self._resources))
        if now - self._told > SECONDS_BETWEEN_LINES:
            self._told = now
            with contextlib.suppress(ray.exceptions.RayError, OSError):
                self._say(f"for {now - self._since:.0f} s no room for {_asked(self._train, self._resources)}")
        if type(current_state) is type(previous_state):
            time.sleep(0.2)  # the loop of an elastic run that waits would not pause


def no_room(train: TrainConfig, resources: Mapping[str, float]) -> str:
    """What to do when the cluster is too small."""
    has = ray.cluster_resources()
    there = ", ".join(f"{name} {has.get(name, 0):g}" for name in resources)
    return (
        f"train.num_workers: for {train.start_timeout_s:g} s (train.start_timeout_s) the cluster had no room for "
        f"{_asked(train, resources)}; it has {there}. Add nodes, ask for fewer workers, or let the run take what there "
        f"is: train.num_workers=[1,{train.max_workers}]. {AGAIN}"
    )


def failed(error: Exception, train: TrainConfig, log: str) -> TrainingError:
    """What a run ends with that Ray Train has given up. log: where the lines of the run are."""
    cause = getattr(error, "controller_failure", error)
    if isinstance(cause, TrainingError):
        return cause
    if isinstance(error, ray.train.PreemptionError):
        return TrainingError(
            f"nodes were preempted more than train.max_preemptions={train.max_preemptions} times. {AGAIN}"
        )
    if isinstance(error, ray.train.WorkerGroupError):
        first = min(error.worker_failures, default=0)
        reason = reason_of(error.worker_failures[first]) if error.worker_failures else reason_of(error)
        return TrainingError(
            f"workers failed more than train.max_failures={train.max_failures} times, the last time worker {first}: "
            f"{reason}. The log: {log}. {AGAIN}"
        )
    return TrainingError(f"Ray Train gave up: {reason_of(cause)}. The log: {log}. {AGAIN}")


def reason_of(error: BaseException) -> str:
    """In a line."""
    text = str(error)
    for sign, reason in SIGNS.items():
        if sign in text:
            return reason
    return (text.strip().splitlines() or [type(error).__name__])[-1].strip()[:300]


def _asked(train: TrainConfig, resources: Mapping[str, float]) -> str:
    count = train.min_workers
    each = ", ".join(f"{name} {amount:g}" for name, amount in resources.items())
    return f"{count} worker{'s'[: count > 1]} with {each} each"
