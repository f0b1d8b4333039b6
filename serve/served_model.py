"""ServedModel: one version of the model, ready to rank behind its batcher."""

import copy
import math
from typing import Literal

from seqray.errors import BundleError
from seqray.recommender import Query, Recommendation, Recommender, SimilarQuery
from serve.batcher import Batcher
from serve.client import Client
from serve.item_search import ItemSearch
from serve.record import current

Variant = Literal["champion", "challenger"]


class ServedModel:
    """A recommender, and what an answer says of it."""

    def __init__(
        self,
        recommender: Recommender,
        name: str,
        variant: Variant,
        max_batch_size: int,
        version: str | None = None,
    ) -> None:
        """version: its number in the registry; without one the run that made the bundle names it."""
        self.recommender = recommender
        self.version = version or recommender.bundle.version
        self.about = {"name": name, "version": self.version, "variant": variant}
        """`model` of an answer."""
        self.search = ItemSearch(recommender.bundle.items)
        self._max_batch_size = max_batch_size
        self._batcher: Batcher[Query | SimilarQuery, Recommendation] = Batcher(recommender.recommend, max_batch_size)

    async def recommend(
        self, query: Query | SimilarQuery, client: Client | None = None, seconds: float | None = None
    ) -> Recommendation:
        """The answer, from the next batch; TimeoutError after `seconds`, ClientLeft when nobody waited any more."""
        found = await self._batcher.submit(query, client, seconds)
        current().answered(found.fallback_used, len(found.unknown_items))
        return found

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their batch now."""
        return self._batcher.num_waiting

    def warm_up(self) -> None:
        """Answers requests of several sizes and checks that one was ranked by the model, or BundleError."""
        [popular] = self.recommender.recommend([Query((), k=1)])
        history = tuple(item.item_id for item in popular.items)
        query = Query(history, k=10, exclude_seen=False)
        for size in {1, min(4, self._max_batch_size), self._max_batch_size}:
            answers = self.recommender.recommend([query] * size)
        items = answers[0].items
        if not items or not all(item.source == "model" and math.isfinite(item.score) for item in items):
            raise BundleError(f"{self.recommender.bundle.folder}: the model did not rank the warm-up request: {items}")

    def as_variant(self, variant: Variant) -> "ServedModel":
        """The same model behind the same batcher under another alias."""
        other = copy.copy(self)
        other.about = {**self.about, "variant": variant}
        return other

    def close(self) -> None:
        """Ends the batcher's thread after the batch that runs."""
        self._batcher.close()
