"""Pulse: a moment every few seconds that all workers agree on, for what a step would be too often for."""

import time

import torch

from seqray.evaluation import Part

SECONDS = 2.0
MOST_STEPS = 1000


class Pulse:
    """Counts steps; how many make `SECONDS` follows from the mean over all workers, so it is the same on each."""

    def __init__(self, part: Part) -> None:
        self._part, self._steps, self._left, self._since = part, 1, 1, time.perf_counter()

    def due(self) -> bool:
        """Whether this step is such a moment; to be asked after every step, by all workers."""
        self._left -= 1
        if self._left:
            return False
        elapsed = torch.tensor([time.perf_counter() - self._since], dtype=torch.float64)
        mean = float(self._part.sum_over_workers(elapsed)) / self._part.world
        self._steps = max(1, min(MOST_STEPS, round(self._steps * SECONDS / max(mean, 1e-6))))
        self._left, self._since = self._steps, time.perf_counter()
        return True
