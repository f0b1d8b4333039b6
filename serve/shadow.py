"""Shadow: the challenger is asked what the champion answered, beside the requests; its answers are never returned."""

import asyncio
import contextvars
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from seqray.recommender import Query, Recommendation, Recommender
from serve.journal import MODELS_LOGGER, event_line
from serve.measures import Labels
from serve.served_model import ServedModel

CAPACITY = 64
"""Comparisons at a time; more are dropped and counted, so that a slow challenger costs the champion no memory."""

Ask = Callable[[Recommender], Query]
"""What a request asks a model; a filter is read with the columns of the model's own items."""


@dataclass(frozen=True)
class ShadowCounts:
    """What was compared since the replica started."""

    compared: int = 0
    dropped: int = 0
    """Not compared, because too many waited."""
    failed: int = 0
    """The challenger gave no answer."""
    overlap: float = 0.0
    """Mean of overlap@k."""
    score_difference: float = 0.0
    """Mean absolute difference of the scores of items that both rank."""


@dataclass(frozen=True)
class Comparison:
    """Two answers to one query."""

    overlap: float
    """Share of the longer answer's items that the other has too; 1 when both are empty."""
    score_difference: float | None
    """Mean absolute difference of the scores of the items in both; None without any."""


def compare(one: Recommendation, other: Recommendation) -> Comparison:
    """How far two answers are apart."""
    scores = {item.item_id: item.score for item in one.items}
    differences = [abs(scores[item.item_id] - item.score) for item in other.items if item.item_id in scores]
    most = max(len(one.items), len(other.items))
    mean = sum(differences) / len(differences) if differences else None
    return Comparison(len(differences) / most if most else 1.0, mean)


class Shadow:
    """Asks the challenger through its own batcher; logs a line for each comparison, without ids of users or items.

    To be used from one event loop.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.counts = ShadowCounts()
        self._capacity = capacity
        self._differences = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def offer(
        self, challenger: ServedModel, champion: str, ask: Ask, found: Recommendation, recommendation_id: str
    ) -> None:
        """Has an answer compared when there is room; never waits. champion: the version that gave `found`."""
        if len(self._tasks) >= self._capacity:
            self.counts = replace(self.counts, dropped=self.counts.dropped + 1)
            return
        about = {"recommendation_id": recommendation_id, "champion": champion, "challenger": challenger.version}
        task = asyncio.get_running_loop().create_task(
            self._compare(challenger, ask, found, about),
            context=contextvars.Context(),  # not the request's, whose times these are not
        )
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)

    def outcomes(self) -> Mapping[Labels, float]:
        """Comparisons by what became of them, for metrics."""
        counts = self.counts
        return {("compared",): counts.compared, ("dropped",): counts.dropped, ("failed",): counts.failed}

    def mean_overlap(self) -> Mapping[Labels, float]:
        """The same of the overlap; nothing before the first comparison."""
        counts = self.counts
        return {(): counts.overlap} if counts.compared else {}

    async def _compare(self, challenger: ServedModel, ask: Ask, found: Recommendation, about: dict[str, str]) -> None:
        try:
            query = replace(ask(challenger.recommender), explain=False)
            answer = await challenger.recommend(query)
        except Exception as error:  # noqa: BLE001 - whatever the challenger does, the champion answers on
            self.counts = replace(self.counts, failed=self.counts.failed + 1)
            MODELS_LOGGER.warning(event_line("shadow failed", {**about, "error": type(error).__name__}))
            return
        comparison = compare(found, answer)
        self._count(comparison)
        MODELS_LOGGER.info(event_line("shadow", {**about, "k": query.k, **asdict(comparison)}))

    def _count(self, found: Comparison) -> None:
        counts = self.counts
        compared, difference = counts.compared + 1, counts.score_difference
        if found.score_difference is not None:
            self._differences += 1
            difference += (found.score_difference - difference) / self._differences
        overlap = counts.overlap + (found.overlap - counts.overlap) / compared
        self.counts = replace(counts, compared=compared, overlap=overlap, score_difference=difference)
