"""Histories in the ids of the shop become batches of what the model reads."""

import math
import time
from collections.abc import Hashable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seqray.bundle import Bundle
from seqray.query import Query
from seqray.sequences import UNKNOWN_TIME, Batch

FARTHEST = 4e12
"""Seconds from 1970, some 127,000 years; times beyond are taken for this one, so that differences fit in 64 bits."""


class KnownHistory(NamedTuple):
    """The events of a query that the model reads, oldest first."""

    unknown: tuple[Hashable, ...]
    """Ids of the query's history that the bundle does not know, each once."""
    seen: list[int]
    """Every known item of the query's history, also of events too old to be read."""
    places: Sequence[int]
    """Where in the query's history each event that is read stands."""
    items: list[int]
    """item_index of each."""
    event_types: list[int]
    """Of each; empty: the log had none."""
    times: list[int]
    """Microseconds since 1970 of each and then of the query; empty: not known."""

    def without(self, event: int) -> "KnownHistory":
        """The history as if the event (an index into `items`) had not been."""

        def rest(values: Sequence[int]) -> list[int]:
            return [*values[:event], *values[event + 1 :]]

        return self._replace(
            places=rest(self.places), items=rest(self.items),
            event_types=rest(self.event_types), times=rest(self.times),
        )  # fmt: skip


class HistoryReader:
    """Looks the events of queries up in the vocabulary and the event types of a bundle."""

    def __init__(self, bundle: Bundle, max_length: int) -> None:
        self._vocabulary = bundle.vocabulary
        self._max_length = max_length
        data = bundle.config.data
        self._event_types: dict[str | None, int] = {name: n for n, name in enumerate(data.event_types, start=1)}
        self._has_times = data.columns.timestamp is not None

    def read(self, query: Query) -> KnownHistory:
        """The newest events whose items are known."""
        seen = self._vocabulary.index_list(query.history)
        known: Sequence[int] = range(len(seen))
        unknown: tuple[Hashable, ...] = ()
        if 0 in seen:
            unknown = tuple(dict.fromkeys(i for i, item in zip(query.history, seen, strict=True) if not item))
            known = [place for place, item in enumerate(seen) if item]
            seen = [seen[place] for place in known]
        places = known[-self._max_length :]
        read = seen[-self._max_length :]
        return KnownHistory(unknown, seen, places, read, self._types(query, places), self._times(query, places))

    def batch(self, histories: Sequence[KnownHistory]) -> Batch:
        """What the model is asked: the next item after each history. None of them is empty.

        Event types and times are there as in the log of the bundle, where the queries have them.
        """
        times_T = next_times_T = None
        if any(one.times for one in histories):
            times = [one.times or [UNKNOWN_TIME] * (len(one.items) + 1) for one in histories]
            times_T, next_times_T = _packed(one[:-1] for one in times), _packed(one[1:] for one in times)
        events_T = _packed(one.event_types for one in histories) if self._event_types else None
        lengths = np.array([len(one.items) for one in histories], np.int64)
        items_T = _packed(one.items for one in histories)
        newest_P = torch.from_numpy(lengths.cumsum() - 1)
        return Batch(items_T, torch.from_numpy(lengths), newest_P, times_T, next_times_T, events_T)

    def _types(self, query: Query, places: Sequence[int]) -> list[int]:
        if not self._event_types:
            return []
        if not query.events:
            return [0] * len(places)
        return [self._event_types.get(query.events[place], 0) for place in places]

    def _times(self, query: Query, places: Sequence[int]) -> list[int]:
        moments = [query.timestamps[place] for place in places] if query.timestamps and self._has_times else []
        known = [moment for moment in moments if moment is not None and math.isfinite(moment)]
        if not known or len(known) < len(moments):
            return []
        now = time.time() if query.now is None else query.now
        return [round(max(-FARTHEST, min(moment, FARTHEST)) * 1e6) for moment in (*known, now)]


def _packed(parts: Iterable[list[int]]) -> Tensor:
    # By NumPy, which keeps the interpreter's lock meanwhile: to come by it again takes longer than this.
    return torch.from_numpy(np.array(list(chain.from_iterable(parts)), np.int64))
