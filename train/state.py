"""TrainState: all that a run needs to go on, in memory. Copies of it become checkpoints (`train.checkpoints`)."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch

from seqray.errors import BundleError
from seqray.models.protocol import Module
from train.layout import Tensors, load_model, load_slots, misfit, whole_model, whole_slots
from train.place import from_first


@dataclass
class Progress:
    """Where a run stands, as numbers. With the seed they are also the position in the data, in the schedule and in
    all random draws, which are functions of (seed, epoch, step, worker).
    """

    epoch: int = 0
    """Epoch that is being trained, from 0."""
    step: int = 0
    """Steps of that epoch already done."""
    global_step: int = 0
    """Optimizer steps of the run."""
    loss_sum: float = 0.0
    """At a checkpoint: the loss summed over the tokens of the epoch so far and over all workers."""
    targets: int = 0
    """At a checkpoint: the targets of the epoch so far, over all workers, which loss_sum is divided by."""
    skipped_steps: int = 0
    """Steps whose loss or gradients were no numbers, so that they were left out (train.on_nan: skip)."""
    best_value: float = float("-inf")
    """Best value of the monitored metric."""
    best_epoch: int = -1
    bad_validations: int = 0
    """Validations since the best one."""
    seconds: float = 0.0
    """Training time over all attempts."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One row for each validation."""
    done: bool = False
    """Training is over; only the final evaluation and the bundle are left."""

    def plain(self) -> dict[str, Any]:
        """The numbers as JSON types, which `of_plain` takes back; a copy."""
        return asdict(self) | {"best_value": None if self.best_value == float("-inf") else self.best_value}

    @classmethod
    def of_plain(cls, numbers: dict[str, Any]) -> Self:
        """The progress that `plain` gave."""
        value = numbers["best_value"]
        return cls(**{**numbers, "best_value": float("-inf") if value is None else value})


@dataclass(frozen=True)
class Snapshot:
    """A state copied to CPU memory, where training no longer changes it; empty of tensors but in the first worker.

    It is that of one process, however many workers it came from (`train.layout`).
    """

    model: Tensors
    optimizer: Tensors
    """`<name of the weight>.<slot>`."""
    best: Tensors
    """Best weights so far; the very `model` when it is the best, empty before the first validation."""
    progress: Progress

    @property
    def is_best(self) -> bool:
        """Whether its weights are those of the best validation."""
        return self.best is self.model


@dataclass
class TrainState:
    """Model, optimizer and progress of one worker, and the best weights in the first one.

    All workers call each of its functions, in the same order.
    """

    model: Module
    optimizer: torch.optim.Optimizer
    progress: Progress = field(default_factory=Progress)
    best: Tensors = field(default_factory=dict)

    def keep_best(self) -> None:
        """Copies the present weights as the best ones."""
        self.best = whole_model(self.model)

    def snapshot(self) -> Snapshot:
        """The state as it is now; the best weights are not copied, since nothing changes them."""
        progress = Progress.of_plain(self.progress.plain())
        is_best = progress.step == 0 and progress.epoch == progress.best_epoch
        model = self.best if is_best else whole_model(self.model)
        return Snapshot(model, whole_slots(self.model, self.optimizer), self.best, progress)

    def restore(self, snapshot: Snapshot | None) -> None:
        """Takes everything from the first worker's snapshot, or nothing: BundleError when it is of another model."""
        problem, progress = "", None
        if snapshot is not None:
            problem = misfit(self.model, self.optimizer, snapshot.model, snapshot.best, snapshot.optimizer)
            progress = snapshot.progress
        problem, progress = from_first((problem, progress))
        if problem or progress is None:
            raise BundleError(problem)
        load_model(self.model, snapshot.model if snapshot else {})
        load_slots(self.model, self.optimizer, snapshot.optimizer if snapshot else {})
        self.best, self.progress = snapshot.best if snapshot else {}, progress
