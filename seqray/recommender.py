"""Recommender: history in, top-k out. The only path from a bundle to recommendations, offline and over HTTP.

Shapes: B queries, T packed events, D hidden, V items + padding, K top-k, P pairs (query, item_index).
"""

import math
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from seqray.bundle import Bundle
from seqray.models.protocol import predict
from seqray.ranking import NEVER, mask_scores, top_k
from seqray.sequences import UNKNOWN_TIME, Batch

SCORES_AT_A_TIME = 2**25
"""Scores held at a time (128 MiB in float32); a larger list of queries is ranked in parts."""
FARTHEST = 4e12
"""Seconds from 1970, some 127,000 years; times beyond are taken for this one, so that differences fit in 64 bits."""

Source = Literal["model", "popular"]


@dataclass(frozen=True, slots=True)
class Query:
    """One history to continue: item ids, oldest first; the newest `max_length` of the model are read."""

    history: tuple[Hashable, ...]
    k: int = 20
    exclude_items: tuple[Hashable, ...] = ()
    exclude_seen: bool | None = None
    """Leave the history's items out; None: as the bundle was evaluated."""
    fallback: Literal["popular", "none"] = "popular"
    """Answer to a history without a known item: most popular items, or an empty list."""
    events: tuple[str | None, ...] = ()
    """What happened at each event of the history; empty: not known. Other values than the bundle's are as None."""
    timestamps: tuple[float | None, ...] = ()
    """When each event happened, seconds since 1970; empty: not known. They count when every event read has one."""
    now: float | None = None
    """Time of the query, seconds since 1970; None: the present moment."""

    def __post_init__(self) -> None:
        """ValueError when `events` or `timestamps` are not parallel to the history."""
        for name, values in (("events", self.events), ("timestamps", self.timestamps)):
            if values and len(values) != len(self.history):
                raise ValueError(f"{name} has {len(values)} values for {len(self.history)} events of the history")


class RankedItem(NamedTuple):
    """One recommended item; the score is the model's, or the training events of a popular item."""

    item_id: Any
    score: float
    source: Source


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer to a Query, best item first; fewer than k when fewer items are left."""

    items: tuple[RankedItem, ...]
    unknown_items: tuple[Hashable, ...] = ()
    """Ids of the history that the bundle does not know, each once."""
    fallback_used: bool = False
    """No item of the history was known."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A query in item indices."""

    query: Query
    unknown: tuple[Hashable, ...]
    excluded: list[int]
    history: list[int]
    """The events that the model reads."""
    event_types: list[int]
    """Of each event of `history`; empty: the log had none."""
    times: list[int]
    """Microseconds since 1970 of each event of `history` and then of the query; empty: not known."""


class Recommender:
    """Ranks the items of a bundle in float32; what can be done once is done here."""

    def __init__(self, bundle: Bundle, device: str = "cpu", num_threads: int | None = None) -> None:
        """num_threads: of PyTorch in this whole process; unchanged when None."""
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.bundle = bundle
        self._device = torch.device(device)
        self._model = bundle.model().to(self._device, torch.float32)
        self._max_length = self._model.max_length
        self._exclude_seen = bundle.config.evaluate.exclude_seen
        self._vocabulary = bundle.vocabulary
        data = bundle.config.data
        self._event_types: dict[str | None, int] = {name: n for n, name in enumerate(data.event_types, start=1)}
        self._has_times = data.columns.timestamp is not None
        self._item_ids: list[Any] = [None, *bundle.items.column("item_id").to_pylist()]
        with torch.inference_mode():
            self._weights_VD = self._model.item_weights().float().contiguous()
        events = bundle.items.column("train_events").to_numpy()
        order = np.argsort(-events.astype(np.int64), kind="stable")
        self._popular = [(int(row) + 1, float(events[row])) for row in order]

    def recommend(self, queries: Sequence[Query]) -> list[Recommendation]:
        """The answer to each query. It depends on the other queries by no more than float rounding."""
        known = [self._look_up(query) for query in queries]
        ranked = [position for position, one in enumerate(known) if one.history]
        answers = [self._fall_back(one) for one in known]
        part = max(1, SCORES_AT_A_TIME // len(self._weights_VD))
        for start in range(0, len(ranked), part):
            positions = ranked[start : start + part]
            for position, answer in zip(positions, self._rank([known[p] for p in positions]), strict=True):
                answers[position] = answer
        return answers

    def metadata(self, item_ids: Iterable[Any]) -> list[dict[str, Any]]:
        """The user's columns of each item (ids of this bundle), such as its title."""
        columns = [name for name in self.bundle.items.column_names if name not in ("item_id", "train_events")]
        rows = self._vocabulary.indices(item_ids) - 1
        found: list[dict[str, Any]] = self.bundle.items.select(columns).take(rows).to_pylist()
        return found if columns else [{} for _ in rows]

    def _look_up(self, query: Query) -> _Known:
        index = self._vocabulary.index
        items = [index(item_id) for item_id in query.history]
        unknown = tuple(dict.fromkeys(i for i, item in zip(query.history, items, strict=True) if not item))
        excluded = [item for item in map(index, query.exclude_items) if item]
        if self._exclude_seen if query.exclude_seen is None else query.exclude_seen:
            excluded += [item for item in items if item]
        places = [place for place, item in enumerate(items) if item][-self._max_length :]
        history = [items[place] for place in places]
        return _Known(query, unknown, excluded, history, self._types(query, places), self._times(query, places))

    def _types(self, query: Query, places: list[int]) -> list[int]:
        if not self._event_types:
            return []
        return (
            [self._event_types.get(query.events[place], 0) for place in places] if query.events else [0] * len(places)
        )

    def _times(self, query: Query, places: list[int]) -> list[int]:
        moments = [query.timestamps[place] for place in places] if query.timestamps and self._has_times else []
        known = [moment for moment in moments if moment is not None and math.isfinite(moment)]
        if not known or len(known) < len(moments):
            return []
        now = time.time() if query.now is None else query.now
        return [round(max(-FARTHEST, min(moment, FARTHEST)) * 1e6) for moment in (*known, now)]

    def _fall_back(self, known: _Known) -> Recommendation:
        if known.history:
            return Recommendation(())
        if known.query.fallback == "none":
            return Recommendation((), known.unknown)
        excluded = set(known.excluded)
        items: list[RankedItem] = []
        for item, events in self._popular:
            if len(items) == known.query.k:
                break
            if item not in excluded:
                items.append(RankedItem(self._item_ids[item], events, "popular"))
        return Recommendation(tuple(items), known.unknown, fallback_used=True)

    @torch.inference_mode()
    def _rank(self, known: list[_Known]) -> list[Recommendation]:
        scores_BV = predict(self._model, self._batch(known), self._weights_VD).scores()
        query_P = torch.tensor([row for row, one in enumerate(known) for _ in one.excluded], dtype=torch.int64)
        item_P = torch.tensor([item for one in known for item in one.excluded], dtype=torch.int64)
        mask_scores(scores_BV, query_P.to(self._device), item_P.to(self._device))
        index_BK, values_BK = top_k(scores_BV, max(one.query.k for one in known))
        return [
            Recommendation(self._items(index[: one.query.k], values), one.unknown)
            for one, index, values in zip(known, index_BK.tolist(), values_BK.tolist(), strict=True)
        ]

    def _batch(self, known: list[_Known]) -> Batch:
        """Histories with what the log of the bundle had too: event types and times, where the queries have them."""
        times_T = next_times_T = None
        if any(one.times for one in known):
            times = [one.times or [UNKNOWN_TIME] * (len(one.history) + 1) for one in known]
            times_T, next_times_T = _packed(one[:-1] for one in times), _packed(one[1:] for one in times)
        events_T = _packed(one.event_types for one in known) if self._event_types else None
        lengths_B = torch.tensor([len(one.history) for one in known])
        items_T = _packed(one.history for one in known)
        return Batch(items_T, lengths_B, None, times_T, next_times_T, events_T).ask_last().to(self._device)

    def _items(self, index: list[int], values: list[float]) -> tuple[RankedItem, ...]:
        found = zip(index, values, strict=False)
        return tuple(RankedItem(self._item_ids[item], score, "model") for item, score in found if score != NEVER)


def _packed(parts: Iterable[list[int]]) -> Tensor:
    return torch.tensor([value for part in parts for value in part], dtype=torch.int64)
