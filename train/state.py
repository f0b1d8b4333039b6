"""TrainState: all that a run needs to go on, in memory. Copies of it become checkpoints (`train.checkpoints`)."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from seqray.errors import BundleError
from seqray.models.protocol import Module

Tensors = dict[str, Tensor]


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
    """A state copied to CPU memory, where training no longer changes it."""

    model: Tensors
    optimizer: Tensors
    """`<number of the weight>.<slot>`."""
    best: Tensors
    """Best weights so far; the very `model` when it is the best, empty before the first validation."""
    progress: Progress

    @property
    def is_best(self) -> bool:
        """Whether its weights are those of the best validation."""
        return self.best is self.model


@dataclass
class TrainState:
    """Model, optimizer, best weights and progress of one worker; equal on all workers."""

    model: Module
    optimizer: torch.optim.Optimizer
    progress: Progress = field(default_factory=Progress)
    best: Tensors = field(default_factory=dict)

    def keep_best(self) -> None:
        """Copies the present weights as the best ones."""
        self.best = _copied(self.model.state_dict())

    def snapshot(self) -> Snapshot:
        """The state as it is now; the best weights are not copied, since nothing changes them."""
        progress = Progress.of_plain(self.progress.plain())
        is_best = progress.step == 0 and progress.epoch == progress.best_epoch
        model = self.best if is_best else _copied(self.model.state_dict())
        return Snapshot(model, _copied(_optimizer_tensors(self.optimizer)), self.best, progress)

    def restore(self, snapshot: Snapshot) -> None:
        """Takes everything from a snapshot, or nothing: BundleError when it is of another model."""
        here = _shapes(self.model.state_dict())
        if _shapes(snapshot.model) != here or (snapshot.best and _shapes(snapshot.best) != here):
            raise BundleError("its weights are not of this model")
        slots = _optimizer_slots(snapshot.optimizer, sum(len(g["params"]) for g in self.optimizer.param_groups))
        self.model.load_state_dict(snapshot.model)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.best, self.progress = snapshot.best, snapshot.progress


def _copied(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {f"{index}.{key}": torch.as_tensor(value) for index, slots in state.items() for key, value in slots.items()}


def _optimizer_slots(tensors: Tensors, parameters: int) -> dict[int, Tensors]:
    slots: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        slots.setdefault(int(index), {})[key] = tensor
    if slots and sorted(slots) != list(range(parameters)):
        raise BundleError("its optimizer is not of this model")
    return slots


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
