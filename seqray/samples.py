"""TrainingSamples: which windows a model is trained on, and in what order."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from seqray.sequences import Batch, IntArray, SequenceStore, ranges


@dataclass(frozen=True)
class Step:
    """One worker's part of a global batch."""

    batch: Batch
    weight: int
    """1, or 0 when this worker had no sequence in the step and holds a copy that must not count."""
    global_tokens: int
    """Targets of the step over all workers: what the summed loss is divided by."""


class TrainingSamples:
    """Windows of up to max_length + 1 training events: inputs are all but the last, targets all but the first.

    The order is a pure function of (seed, epoch, step); the number of workers only divides a step among them.
    """

    def __init__(self, store: SequenceStore, max_length: int, windows: Literal["last", "all"], seed: int) -> None:
        self._items = store.items
        self._seed = seed
        begin, events = store.offsets[:-1], store.train_end.astype(np.int64)
        count = np.where(events >= 2, 1 if windows == "last" else -(-(events - 1) // max_length), 0)
        begin, events = np.repeat(begin, count), np.repeat(events, count)
        end = events - max_length * ranges(np.zeros_like(count), count)
        start = np.maximum(end - max_length - 1, 0)
        self._start, self._length = begin + start, end - start

    def __len__(self) -> int:
        return len(self._start)

    @property
    def tokens(self) -> int:
        """Targets of one epoch."""
        return int((self._length - 1).sum())

    def steps(self, batch_size: int) -> int:
        """Optimizer steps of one epoch; the last one may be smaller."""
        return -(-len(self) // batch_size)

    def order(self, epoch: int) -> IntArray:
        """The permutation of the windows in `epoch`."""
        return np.random.Generator(np.random.Philox(key=[self._seed, epoch])).permutation(len(self))

    def step(self, order: IntArray, step: int, batch_size: int, rank: int, world: int) -> Step:
        """What worker `rank` of `world` trains on in `step`; every world-th window of the global batch."""
        chosen = order[step * batch_size : (step + 1) * batch_size]
        lengths = self._length[chosen] - 1
        offsets = np.cumsum(lengths) - lengths
        mine = np.arange(rank, len(chosen), world)
        weight = int(mine.size > 0)
        if not weight:
            mine = np.zeros(1, np.int64)
        start = self._start[chosen[mine]]
        inputs = Batch.gather(self._items, start, lengths[mine])
        targets = self._items[ranges(start + 1, lengths[mine])].astype(np.int64)
        token = ranges(offsets[mine], lengths[mine])
        batch = Batch(inputs.items_T, inputs.lengths_B, torch.from_numpy(targets), torch.from_numpy(token))
        return Step(batch, weight, int(lengths.sum()))
