"""The rows that a model has to beat: popularity, windowed popularity, Markov-1 and personal frequency.

All count the training events of the store and score float64 whole numbers, so that ties are exact:
first the row's own count, then popularity, then lower item_index. Shapes: B queries, V items + padding.
"""

import numpy as np
import torch
from torch import Tensor

from seqray.sequences import IntArray, Queries, SequenceStore, Split, ranges

MICROSECONDS_A_DAY = 86_400_000_000
NAMES = ("popularity", "windowed_popularity", "markov_1", "personal_frequency")


class Baselines:
    """Scorers by name, counted from the events that are known before the targets of `split`.

    leave_one_out: the training part of each user. temporal: all events before the period of `split`.
    """

    def __init__(self, store: SequenceStore, split: Split, window_days: float) -> None:
        self._size = store.num_items + 1
        events, rows = store.events_before(split)
        items = store.items[events]
        self._popularity_V = self._count(items)
        self._above = float(self._popularity_V.max()) + 1
        self._windowed_V = None
        if store.has_timestamps:
            times = store.timestamps[events]
            recent = times > times.max() - window_days * MICROSECONDS_A_DAY
            self._windowed_V = self._count(items[recent])
        self._count_transitions(items, rows)

    def names(self) -> tuple[str, ...]:
        """The rows that this store can have; without timestamps there is no window."""
        return tuple(name for name in NAMES if name != "windowed_popularity" or self._windowed_V is not None)

    def scores(self, name: str, queries: Queries) -> Tensor:
        """scores_BV of baseline `name`, float64."""
        scores_BV = self._popularity_V.repeat(len(queries), 1)
        if name == "windowed_popularity" and self._windowed_V is not None:
            scores_BV += self._windowed_V * self._above
        elif name == "markov_1":
            self._add_successors(scores_BV, queries)
        elif name == "personal_frequency":
            query_P, item_P = queries.seen()
            scores_BV.index_put_((query_P, item_P), torch.tensor(self._above, dtype=torch.float64), accumulate=True)
        return scores_BV

    def _count(self, items: np.ndarray) -> Tensor:
        return torch.from_numpy(np.bincount(items, minlength=self._size).astype(np.float64))

    def _count_transitions(self, items: np.ndarray, rows: IntArray) -> None:
        same_user = rows[1:] == rows[:-1]
        pairs = items[:-1][same_user].astype(np.int64) * self._size + items[1:][same_user]
        keys, self._pair_counts = np.unique(pairs, return_counts=True)
        self._successors = keys % self._size
        self._successor_offsets = np.searchsorted(keys // self._size, np.arange(self._size + 1))

    def _add_successors(self, scores_BV: Tensor, queries: Queries) -> None:
        known = np.flatnonzero(queries.cut > queries.begin)
        last = queries.store.items[queries.cut[known] - 1]
        start, stop = self._successor_offsets[last], self._successor_offsets[last + 1]
        places = ranges(start, stop - start)
        row, item = np.repeat(known, stop - start), self._successors[places]
        added = torch.from_numpy(self._pair_counts[places] * self._above)
        scores_BV.index_put_((torch.from_numpy(row), torch.from_numpy(item)), added, accumulate=True)
