"""Popularity: the items with most events in training, for contexts that a model knows nothing of."""

from typing import Any

import numpy as np
import numpy.typing as npt

from seqray.retrieval import Limits, Ranked


class Popularity:
    """Items by their training events, equal ones by lower item_index."""

    def __init__(self, events: npt.NDArray[Any]) -> None:
        """events: of each item in index order, padding not among them."""
        self._events_V = np.concatenate([[0], events.astype(np.int64)])
        self._order = np.argsort(-self._events_V[1:], kind="stable") + 1

    def best(self, limits: Limits) -> Ranked:
        """The k most popular items that are allowed; their score is the number of events."""
        order = self._order if limits.candidates is None else self._sorted(limits.candidates)
        if limits.allowed_V is not None:
            order = order[limits.allowed_V.cpu().numpy()[order]]
        order = order[: limits.k + len(limits.excluded)]
        index = order[~np.isin(order, limits.excluded)][: limits.k].tolist()
        return index, self._events_V[index].astype(float).tolist()

    def _sorted(self, candidates: tuple[int, ...]) -> npt.NDArray[np.int64]:
        items = np.array(candidates, np.int64)
        return items[np.lexsort((items, -self._events_V[items]))]
