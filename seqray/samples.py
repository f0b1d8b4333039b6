"""TrainingSamples: what a model is trained on, and in what order.

Shapes: E events of the store, P asked events and S targets of this worker, G targets of the global batch.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seqray.event_shards import lane_order
from seqray.sequences import Batch, IntArray, SequenceStore, ranges

CountArray = npt.NDArray[np.int32]
WeightArray = npt.NDArray[np.float32]
DAY = 86_400_000_000
"""Microseconds."""
Target = Literal["next_item", "next_basket"]


@dataclass(frozen=True)
class Targets:
    """What was to be predicted.

    items_S: item_index; rows_S: the asked event it belongs to, ascending (None: S = P, one for each);
    places_S: its place among the G targets, so that what is drawn for it does not depend on the number of workers;
    weights_S: float32, how much its loss counts, 1 in the mean over all targets (None: each counts 1).
    """

    items_S: Tensor
    rows_S: Tensor | None
    places_S: Tensor
    weights_S: Tensor | None = None

    def to(self, device: torch.device) -> "Targets":
        """The targets on `device`."""
        parts = (getattr(self, field.name) for field in fields(self))
        return Targets(*(None if part is None else part.to(device, non_blocking=True) for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Step:
    """One worker's part of a global batch."""

    batch: Batch
    targets: Targets
    weight: int
    """1, or 0 when this worker had no sequence in the step and holds a copy that must not count."""
    global_targets: int
    """G: what the summed loss is divided by."""
    global_tokens: int
    """Events that all workers read."""

    def to(self, device: torch.device) -> "Step":
        """The step on `device`."""
        return replace(self, batch=self.batch.to(device), targets=self.targets.to(device))


class Windows(NamedTuple):
    """Runs of training events that are the inputs of a sample each: positions into the store."""

    start: IntArray
    length: IntArray


class TrainingSamples:
    """Rows: windows of up to max_length training events, a target after every event (or basket).

    Prefixes: every prefix of a training history is a sample of its own, with a target after its newest event alone.
    The order is a pure function of (seed, epoch, step); the number of workers only divides a step among them.
    """

    def __init__(
        self, store: SequenceStore, max_length: int, seed: int, *,
        windows: Literal["last", "all"] = "last", prefixes: bool = False, target: Target = "next_item",
        until: Literal["validation", "test"] = "validation",
        weigh: Literal["items", "baskets"] = "items", half_life_days: float | None = None,
    ) -> None:  # fmt: skip
        self._store, self._seed, self._prefixes = store, seed, prefixes
        if target == "next_item" and not prefixes and weigh == "items" and half_life_days is None:
            self._following_E, self._weight_E = None, None
            self._windows = _user_rows(store, store.events_until(until), max_length, windows)
            self._targets = self._windows.length
            return
        following_E = _following(store, store.events_until(until), target)
        self._following_E = None if target == "next_item" and not prefixes else following_E
        asked_E = np.flatnonzero(following_E)
        self._weight_E = _weights(store, following_E, weigh, half_life_days)
        user_E = np.searchsorted(store.offsets, asked_E, side="right") - 1
        if prefixes:
            self._windows = _prefixes(store, asked_E, user_E, max_length, windows)
            self._targets = following_E[self._windows.start + self._windows.length - 1].astype(np.int64)
        else:
            self._windows = _rows(store, asked_E, user_E, max_length, windows)
            before = np.concatenate([np.zeros(1, np.int64), np.cumsum(following_E, dtype=np.int64)])
            targets = before[self._windows.start + self._windows.length] - before[self._windows.start]
            some = targets > 0  # a window inside a basket has none
            self._windows = Windows(self._windows.start[some], self._windows.length[some])
            self._targets = targets[some]

    def __len__(self) -> int:
        return len(self._windows.start)

    @property
    def targets(self) -> int:
        """Targets of one epoch."""
        return int(self._targets.sum())

    @property
    def tokens(self) -> int:
        """Events that the model reads in one epoch."""
        return int(self._windows.length.sum())

    def steps(self, batch_size: int) -> int:
        """Optimizer steps of one epoch; the last one may be smaller."""
        return -(-len(self) // batch_size)

    def order(self, epoch: int) -> IntArray:
        """The permutation of the samples in `epoch`; of a store in shards the one of `lane_order`."""
        random = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        bounds = self._store.shard_bounds
        if bounds is None:
            return random.permutation(len(self))
        shard = np.searchsorted(bounds, self._windows.start, side="right") - 1
        return lane_order(np.bincount(shard, minlength=len(bounds) - 1), random)

    def step(self, order: IntArray, step: int, batch_size: int, rank: int, world: int) -> Step:
        """What worker `rank` of `world` trains on in `step`; every world-th sample of the global batch."""
        chosen = order[step * batch_size : (step + 1) * batch_size]
        targets = self._targets[chosen]
        first_place = np.cumsum(targets) - targets
        mine = np.arange(rank, len(chosen), world)
        weight = int(mine.size > 0)
        if not weight:
            mine = np.zeros(1, np.int64)
        start, length = self._windows.start[chosen[mine]], self._windows.length[chosen[mine]]
        batch = Batch.gather(self._store, start, length)
        asked, rows, places = self._asked(start, length)
        items = torch.from_numpy(self._store.items[places].astype(np.int64))
        weights = None if self._weight_E is None else torch.from_numpy(self._weight_E[places])
        of_global = torch.from_numpy(ranges(first_place[mine], targets[mine]))
        return Step(
            replace(batch, asked_P=asked), Targets(items, rows, of_global, weights), weight, int(targets.sum()),
            int(self._windows.length[chosen].sum()),
        )  # fmt: skip

    def _asked(self, start: IntArray, length: IntArray) -> tuple[Tensor | None, Tensor | None, IntArray]:
        """(asked_P, rows_S, positions of the targets in the store) of a batch of windows."""
        if self._following_E is None:
            return None, None, ranges(start + 1, length)
        if self._prefixes:
            asked = np.cumsum(length) - 1
            last = start + length - 1
            count = self._following_E[last].astype(np.int64)
        else:
            places = ranges(start, length)
            asked = np.flatnonzero(self._following_E[places])
            last = places[asked]
            count = self._following_E[last].astype(np.int64)
        single = bool((count == 1).all())
        rows = None if single else torch.from_numpy(np.repeat(np.arange(len(count)), count))
        return torch.from_numpy(asked), rows, ranges(last + 1, count)


def _following(store: SequenceStore, end_U: IntArray, target: Target) -> CountArray:
    """following_E: number of targets after each event, 0 where none is asked for; training is history[:end_U].

    next_item: 1 after every training event but a user's last. next_basket: after the last event of a basket (events
    of one user at one time) the events of the next one.
    """
    position = np.arange(len(store.items)) - np.repeat(store.offsets[:-1], np.diff(store.offsets))
    room = np.repeat(end_U, np.diff(store.offsets)) - position - 1
    if target == "next_item":
        return (room > 0).astype(np.int32)
    assert isinstance(store.timestamps, np.ndarray)  # not of a store in shards
    new = np.append(store.timestamps[1:] != store.timestamps[:-1], True) | (room == 0)
    ends = np.flatnonzero(new & (room >= 0))
    size = np.append(np.diff(ends), 0).astype(np.int32)
    following = np.zeros(len(store.items), np.int32)
    following[ends] = np.where(room[ends] > 0, size, 0)
    return following


def _weights(
    store: SequenceStore, following: CountArray, weigh: str, half_life_days: float | None
) -> WeightArray | None:
    """Weight of each event as a target; None when all weigh the same.

    baskets: the items of a basket share a weight of 1, so that large baskets do not drown the small ones.
    half_life_days: a target weighs half as much as one that is so many days younger.
    """
    if weigh == "items" and half_life_days is None:
        return None
    asked = np.flatnonzero(following)
    count = following[asked].astype(np.int64)
    targets = ranges(asked + 1, count)
    weight = np.zeros(len(store.items), np.float32)
    weight[targets] = 1.0 if weigh == "items" else np.repeat(1.0 / count, count)
    if half_life_days is not None and store.has_timestamps:
        days = (store.timestamps[targets].max(initial=0) - store.timestamps[targets]) / DAY
        weight[targets] *= np.exp2(-days / half_life_days).astype(np.float32)
    return weight / np.float32(max(float(weight[targets].mean()), 1e-30)) if len(targets) else weight


def _user_rows(store: SequenceStore, end_U: IntArray, max_length: int, windows: str) -> Windows:
    """`_rows` for a target after each event, from the users alone."""
    some = end_U > 1
    begin = store.offsets[:-1][some]
    return _cut(begin, begin + end_U[some] - 1, max_length, windows)


def _rows(store: SequenceStore, asked: IntArray, user: IntArray, max_length: int, windows: str) -> Windows:
    """Windows that end at the user's last asked event; earlier ones too where `windows` is all."""
    last = np.flatnonzero(np.append(user[1:] != user[:-1], True)) if len(user) else np.zeros(0, np.int64)
    return _cut(store.offsets[user[last]], asked[last] + 1, max_length, windows)


def _cut(begin: IntArray, end: IntArray, max_length: int, windows: str) -> Windows:
    """Of each run of events the newest max_length, or all of it in such pieces."""
    count = np.ones_like(end) if windows == "last" else -(-(end - begin) // max_length)
    begin, stop = np.repeat(begin, count), np.repeat(end, count) - max_length * ranges(np.zeros_like(count), count)
    start = np.maximum(stop - max_length, begin)
    return Windows(start, stop - start)


def _prefixes(store: SequenceStore, asked: IntArray, user: IntArray, max_length: int, windows: str) -> Windows:
    """The newest max_length events up to each asked one; of each user the newest max_length where `windows` is last."""
    if windows == "last" and len(user):
        counts = np.bincount(user)
        from_end = np.cumsum(counts)[user] - np.arange(len(user))
        asked, user = asked[from_end <= max_length], user[from_end <= max_length]
    start = np.maximum(asked + 1 - max_length, store.offsets[user])
    return Windows(start, asked + 1 - start)
