"""Retrieval: the best items after each history, out of the whole catalogue or of given candidates.

Shapes: B queries, V items + padding, C candidates, P pairs (query, item_index).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from seqray.models.protocol import Prediction
from seqray.native.top_items import TopItems
from seqray.ranking import NEVER, mask_scores, top_k

SCORES_AT_A_TIME = 2**25
"""Scores held at a time (128 MiB in float32)."""


class Limits(NamedTuple):
    """What one query may be answered with."""

    k: int
    excluded: Sequence[int]
    """item_index of each item that may not be returned; may hold one twice."""
    allowed_V: Tensor | None = None
    """bool; None: every item."""
    candidates: tuple[int, ...] | None = None
    """Only these, each once; None: every item."""

    def among(self, candidates: Iterable[int]) -> "Limits":
        """The same limits for given candidates alone."""
        return self._replace(candidates=tuple(dict.fromkeys(candidates)))


Ranked = tuple[list[int], list[float]]
"""item_index and score of the items of one answer, best first, equal scores by lower item_index."""


class Retrieval(Protocol):
    """Finds the best items of the catalogue."""

    def best(self, prediction: Prediction, limits: Sequence[Limits]) -> list[Ranked]:
        """The k best of each query (row of the prediction), fewer where fewer are allowed."""
        ...

    @property
    def queries_at_a_time(self) -> int:
        """Queries that should be put at a time at the most, so that their scores fit in memory."""
        ...


class ExactRetrieval:
    """Scores every item: by the kernel where it is at hand, else by one product over the catalogue."""

    def __init__(self, weights_VD: Tensor, build_kernels: bool = False) -> None:
        """weights_VD: float32. build_kernels: compile them if they are not there yet."""
        self._num_rows = len(weights_VD)
        self.top_items = TopItems.of(weights_VD, build_kernels)
        """The kernel, where it is at hand."""

    @property
    def queries_at_a_time(self) -> int:
        """As many as have SCORES_AT_A_TIME scores."""
        return max(1, SCORES_AT_A_TIME // self._num_rows)

    def best(self, prediction: Prediction, limits: Sequence[Limits]) -> list[Ranked]:
        """See Retrieval."""
        if self.top_items is None or prediction.added is not None:
            return best_of_scores(prediction.scores(), limits)
        index_BK, values_BK = self.top_items.best(
            prediction.hidden_PD, [one.k for one in limits], [one.excluded for one in limits],
            [one.allowed_V for one in limits],
        )  # fmt: skip
        rows = zip(index_BK.tolist(), values_BK.tolist(), strict=True)
        return [without_never(index, values) for index, values in rows]


def best_of_scores(scores_BV: Tensor, limits: Sequence[Limits]) -> list[Ranked]:
    """The k best of each row, by scores that are written over."""
    query_P = torch.tensor([row for row, one in enumerate(limits) for _ in one.excluded], dtype=torch.int64)
    item_P = torch.tensor([item for one in limits for item in one.excluded], dtype=torch.int64)
    mask_scores(scores_BV, query_P.to(scores_BV.device), item_P.to(scores_BV.device))
    for row, one in enumerate(limits):
        if one.allowed_V is not None:
            scores_BV[row].masked_fill_(~one.allowed_V, NEVER)
    index_BK, values_BK = top_k(scores_BV, max(one.k for one in limits))
    rows = zip(limits, index_BK.tolist(), values_BK.tolist(), strict=True)
    return [without_never(index[: one.k], values[: one.k]) for one, index, values in rows]


def best_of_candidates(prediction: Prediction, limits: Limits) -> Ranked:
    """The k best of the candidates for the one query of the prediction."""
    excluded = set(limits.excluded)
    candidates = sorted(item for item in limits.candidates or () if item not in excluded)
    items_C = torch.tensor(candidates, dtype=torch.int64, device=prediction.hidden_PD.device)
    if limits.allowed_V is not None:
        items_C = items_C[limits.allowed_V[items_C]]
    values_C, order_C = prediction.scores_of(items_C)[0].sort(descending=True, stable=True)
    return items_C[order_C[: limits.k]].tolist(), values_C[: limits.k].tolist()


def without_never(index: list[int], values: list[float]) -> Ranked:
    """The items before the first that may not be returned."""
    if values and values[-1] == NEVER:
        left = values.index(NEVER)
        return index[:left], values[:left]
    return index, values
