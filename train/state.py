"""TrainState: all that a run needs to go on, and its checkpoints on disk. No pickle: safetensors and JSON."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from seqray.errors import BundleError
from seqray.manifest import verify_manifest, write_manifest
from seqray.models.protocol import Module

Tensors = dict[str, Tensor]


@dataclass
class Progress:
    """Where a run stands, as numbers."""

    epoch: int = 0
    """Epoch that is being trained, from 0."""
    step: int = 0
    """Steps of that epoch already done."""
    global_step: int = 0
    """Optimizer steps of the run."""
    loss_sum: float = 0.0
    """At a checkpoint: the loss summed over the tokens of the epoch so far and over all workers."""
    targets: int = 0
    """Targets of the epoch so far, over all workers: what loss_sum is divided by."""
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


@dataclass
class TrainState:
    """Model, optimizer, best weights and progress of one worker; equal on all workers."""

    model: Module
    optimizer: torch.optim.Optimizer
    progress: Progress = field(default_factory=Progress)
    best: Tensors = field(default_factory=dict)

    def keep_best(self) -> None:
        """Copies the present weights as the best ones."""
        self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def save(self, folder: Path, keep: int) -> Path:
        """Writes `folder/step_N` (`step_N_end` when training is over), complete before it gets its name.

        The newest `keep` stay; what a killed writer left behind goes.
        """
        target = folder / f"step_{self.progress.global_step:09d}{'_end' if self.progress.done else ''}"
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step_*"):
            shutil.rmtree(left, ignore_errors=True)
        temporary, replaced = folder / f".{target.name}.new", folder / f".{target.name}.old"
        temporary.mkdir()
        save_file(_contiguous(self.model.state_dict()), temporary / "model.safetensors")
        save_file(_contiguous(_optimizer_tensors(self.optimizer)), temporary / "optimizer.safetensors")
        save_file(_contiguous(self.best), temporary / "best.safetensors")
        numbers = asdict(self.progress) | {"best_value": self._finite_best()}
        (temporary / "progress.json").write_text(json.dumps(numbers), encoding="utf-8")
        write_manifest(temporary, {}, sorted(path.name for path in temporary.iterdir()))
        if target.exists():  # one that was passed over as damaged
            os.replace(target, replaced)
        os.replace(temporary, target)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in _checkpoints(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def load(self, checkpoint: Path) -> None:
        """Takes everything from a checkpoint, or nothing: BundleError when it is torn or does not fit."""
        verify_manifest(checkpoint, BundleError)
        numbers = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        model, best, optimizer = (
            load_file(checkpoint / f"{name}.safetensors") for name in ("model", "best", "optimizer")
        )
        here = _shapes(self.model.state_dict())
        if _shapes(model) != here or (best and _shapes(best) != here):
            raise BundleError(f"{checkpoint}: its weights are not of this model")
        slots = _optimizer_slots(optimizer, sum(len(g["params"]) for g in self.optimizer.param_groups), checkpoint)
        best_value = numbers.pop("best_value")
        progress = Progress(**numbers, best_value=float("-inf") if best_value is None else best_value)
        self.model.load_state_dict(model)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.best, self.progress = best, progress

    def load_newest(self, folder: Path) -> tuple[Path | None, list[str]]:
        """(checkpoint that was loaded, reasons why newer ones were passed over); None when there is none."""
        reasons = []
        for checkpoint in _checkpoints(folder):
            try:
                self.load(checkpoint)
            except (BundleError, OSError, ValueError, TypeError, KeyError) as error:
                reasons.append(f"{checkpoint.name}: {error}")
            else:
                return checkpoint, reasons
        return None, reasons

    def _finite_best(self) -> float | None:
        return None if self.progress.best_value == float("-inf") else self.progress.best_value


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def _contiguous(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {f"{index}.{key}": torch.as_tensor(value) for index, slots in state.items() for key, value in slots.items()}


def _optimizer_slots(tensors: Tensors, parameters: int, checkpoint: Path) -> dict[int, Tensors]:
    slots: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        slots.setdefault(int(index), {})[key] = tensor
    if slots and sorted(slots) != list(range(parameters)):
        raise BundleError(f"{checkpoint}: its optimizer is not of this model")
    return slots


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
