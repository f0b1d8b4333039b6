"""Losses and gradients that are no numbers: all workers see them in the same step, and stop or skip it.

The gradients are summed over the workers in any case. A loss that is no number makes the gradients of its worker no
numbers, and with them the gradient norm on every worker, so agreeing costs no message. The optimizer leaves the
weights alone by itself, on the device, and the host looks later: a GPU does not wait in each step.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from seqray.errors import SeqrayError
from seqray.evaluation import Part

MOST_IN_A_ROW = 20
"""Skipped steps after which the weights or the data are broken, not a step."""


class TrainingError(SeqrayError):
    """Training that cannot go on, such as a loss that is not finite."""


class Finite:
    """Guards the weights of one worker; `train.on_nan` says what follows a bad step."""

    def __init__(
        self, policy: Literal["stop", "skip"], part: Part, device: torch.device, tell: Callable[[str], None]
    ) -> None:
        self._policy, self._part, self._tell, self._device = policy, part, tell, device
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._first: Tensor
        self._count: Tensor
        self._mine: Tensor
        self._forget()

    def factor(self, loss: Tensor) -> Tensor:
        """1, or NaN for a loss that is no number: what the loss is multiplied by before the backward pass."""
        return torch.where(loss.detach().isfinite(), 1.0, math.nan)

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor, norm: Tensor, number: int) -> Tensor:
        """Step `number` of the optimizer, unless the norm of the gradients is no number; whether it was made.

        loss: this worker's; norm: of the gradients over all workers, the same on each.
        """
        bad = ~norm.isfinite()
        first = bad & (self._first < 0)
        self._mine = torch.where(first, ~loss.detach().isfinite(), self._mine)
        self._first = torch.where(first, number, self._first)
        self._count += bad
        self._in_a_row = torch.where(bad, self._in_a_row + 1, 0)
        guarded: Any = optimizer
        guarded.found_inf = bad.float()  # as torch.amp.GradScaler does: fused optimizers leave such a step out
        optimizer.step()
        del guarded.found_inf
        return ~bad

    def look(self, steps: int) -> int:
        """Steps that were skipped since the last look; TrainingError when that is not allowed or does not end.

        To be called by all workers in the same step. steps: of an epoch, for the message.
        """
        first = int(self._first)
        if first < 0:
            return 0
        count, workers = int(self._count), self._workers()
        what = f"the loss of {workers} is no number" if workers else "the gradients are no numbers"
        where = f"step {first} (epoch {(first - 1) // steps + 1}, step {(first - 1) % steps + 1} of {steps})"
        self._forget()
        if self._policy == "stop":
            raise TrainingError(
                f"{where}: {what}. Try a lower train.learning_rate; train.on_nan=skip leaves such steps out"
            )
        if int(self._in_a_row) >= MOST_IN_A_ROW:
            raise TrainingError(f"{where}: {what}, and so in {int(self._in_a_row)} steps in a row; none of them counts")
        self._tell(f"{where} skipped: {what}" + (f"; {count} steps skipped since" if count > 1 else ""))
        return count

    def _workers(self) -> str:
        """Whose loss was no number in the first bad step."""
        flags = torch.zeros(self._part.world, dtype=torch.int64)
        flags[self._part.rank] = int(self._mine)
        ranks = self._part.sum_over_workers(flags).nonzero().flatten().tolist()
        return f"worker{'s'[: len(ranks) > 1]} {', '.join(map(str, ranks))}" if ranks else ""

    def _forget(self) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=self._device)
        self._count = torch.zeros((), dtype=torch.int64, device=self._device)
        self._mine = torch.zeros((), dtype=torch.bool, device=self._device)
