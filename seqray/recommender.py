"""Recommender: history in, top-k out. The only path from a bundle to recommendations, offline and over HTTP.

Shapes: B queries, V items + padding.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from seqray.bundle import Bundle
from seqray.cache import Cache
from seqray.explanation import influences
from seqray.histories import HistoryReader, KnownHistory
from seqray.index_file import open_retrieval
from seqray.item_filter import Filter, read_filter
from seqray.item_masks import ItemMasks
from seqray.models.protocol import Prediction, predict, prepare
from seqray.one_call import OneCall
from seqray.popularity import Popularity
from seqray.query import Influence, Query, RankedItem, Recommendation, SimilarQuery, Source
from seqray.retrieval import ExactRetrieval, Limits, Ranked, Retrieval, best_of_candidates, best_of_scores
from seqray.serve_config import RetrievalConfig

__all__ = ["Influence", "Query", "RankedItem", "Recommendation", "Recommender", "SimilarQuery"]

_BY_MODEL: Iterable[Source] = repeat("model")


class _Asked(NamedTuple):
    """A query in item indices."""

    query: Query | SimilarQuery
    unknown: tuple[Hashable, ...]
    limits: Limits
    history: KnownHistory | None = None
    """Of a Query."""
    item: int = 0
    """Of a SimilarQuery; 0: unknown."""

    @property
    def has_context(self) -> bool:
        """Whether the model has anything to go by."""
        return bool(self.item if self.history is None else self.history.items)


class Recommender:
    """Ranks the items of a bundle in float32; what can be done once is done here."""

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        num_threads: int | None = None,
        *,
        build_kernels: bool = False,
        retrieval: RetrievalConfig | None = None,
        index_folder: Path | None = None,
    ) -> None:
        """num_threads: of PyTorch in this whole process; unchanged when None.

        build_kernels: compile the CPU kernels of `seqray.native` if this machine has not got them yet. retrieval: exact
        when not given; index_folder: where an index is kept that it asks for, in the user's cache when not given.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.bundle = bundle
        self._device = torch.device(device)
        with torch.inference_mode():
            self._model = prepare(bundle.model().to(self._device, torch.float32), build_kernels)
        self._histories = HistoryReader(bundle, self._model.max_length)
        self._exclude_seen = bundle.config.evaluate.exclude_seen
        self._index = bundle.vocabulary.index
        self._item_ids: list[Any] = [None, *bundle.items.column("item_id").to_pylist()]
        with torch.inference_mode():
            self._weights_VD = self._model.item_weights().float().contiguous()
            self._inverse_norm_V = 1 / self._weights_VD.norm(dim=1).clamp_min(1e-12)
            self._retrieval = self._retrieval_of(retrieval, index_folder, build_kernels)
            self._masks = ItemMasks(bundle.items, self._device)
            self._one_call = OneCall.of(
                self._model, self._retrieval, bundle.vocabulary, self._item_ids[1:], self._masks, self._exclude_seen
            )
        self._popularity = Popularity(bundle.items.column("train_events").to_numpy())

    def _retrieval_of(self, config: RetrievalConfig | None, folder: Path | None, build_kernels: bool) -> Retrieval:
        exact = ExactRetrieval(self._weights_VD, build_kernels)
        if config is None or config.type == "exact":
            return exact
        folder = folder or Cache().index_folder
        return open_retrieval(self.bundle, self._model, self._histories, self._weights_VD, exact, config, folder)

    def recommend(self, queries: Sequence[Query | SimilarQuery]) -> list[Recommendation]:
        """The answer to each query. It depends on the other queries by no more than float rounding."""
        if self._one_call is None:
            return self._recommend(queries)
        answers: list[Recommendation | None] = [None] * len(queries)
        usual = [place for place, query in enumerate(queries) if OneCall.takes(query)]
        if usual:
            rankings = self._one_call.rank(cast(list[Query], [queries[place] for place in usual]))
            for place, ranking in zip(usual, rankings, strict=True):
                if ranking is not None:
                    items = self._ranked_items(ranking.ranked)
                    answers[place] = Recommendation(items, ranking.unknown, items_json=ranking.items_json)
        rest = [place for place, answer in enumerate(answers) if answer is None]
        for place, answer in zip(rest, self._recommend([queries[place] for place in rest]), strict=True):
            answers[place] = answer
        return cast(list[Recommendation], answers)

    def _recommend(self, queries: Sequence[Query | SimilarQuery]) -> list[Recommendation]:
        asked = [self._look_up(query) for query in queries]
        answers = [Recommendation(()) if one.has_context else self._fall_back(one) for one in asked]
        groups: dict[Callable[[list[_Asked]], list[Ranked]], list[int]] = {}
        for place, one in enumerate(asked):
            if one.has_context:
                groups.setdefault(self._way(one), []).append(place)
        step = self._retrieval.queries_at_a_time
        for rank, places in groups.items():
            for start in range(0, len(places), step):
                part = places[start : start + step]
                with torch.inference_mode():
                    for place, ranked in zip(part, rank([asked[place] for place in part]), strict=True):
                        answers[place] = self._answer(asked[place], ranked)
        return answers

    def read_filter(self, data: Any) -> Filter:
        """The `filter` of a query from its JSON form (see `seqray.item_filter`); FilterError names what is wrong."""
        return read_filter(data, self._masks.kinds)

    def metadata(self, item_ids: Iterable[Any]) -> list[dict[str, Any]]:
        """The user's columns of each item (ids of this bundle), such as its title."""
        columns = [name for name in self.bundle.items.column_names if name not in ("item_id", "train_events")]
        rows = self.bundle.vocabulary.indices(item_ids) - 1
        found: list[dict[str, Any]] = self.bundle.items.select(columns).take(rows).to_pylist()
        return found if columns else [{} for _ in rows]

    def _look_up(self, query: Query | SimilarQuery) -> _Asked:
        excluded = [item for item in map(self._index, query.exclude_items) if item]
        allowed_V = None if query.filter is None else self._masks.mask(query.filter)
        if isinstance(query, SimilarQuery):
            item = self._index(query.item_id)
            return _Asked(
                query, () if item else (query.item_id,), Limits(query.k, [*excluded, item], allowed_V), item=item
            )
        history = self._histories.read(query)
        if self._exclude_seen if query.exclude_seen is None else query.exclude_seen:
            excluded += history.seen
        limits = Limits(query.k, excluded, allowed_V)
        if query.candidates is None:
            return _Asked(query, history.unknown, limits, history)
        found = {item_id: self._index(item_id) for item_id in query.candidates}
        unknown = tuple(dict.fromkeys([*history.unknown, *(one for one, item in found.items() if not item)]))
        return _Asked(query, unknown, limits.among(item for item in found.values() if item), history)

    def _way(self, asked: _Asked) -> Callable[[list[_Asked]], list[Ranked]]:
        if asked.history is None:
            return self._rank_similar
        return self._rank_catalogue if asked.limits.candidates is None else self._rank_candidates

    def _rank_catalogue(self, asked: list[_Asked]) -> list[Ranked]:
        return self._retrieval.best(self._predict(asked), [one.limits for one in asked])

    def _rank_candidates(self, asked: list[_Asked]) -> list[Ranked]:
        prediction = self._predict(asked)
        return [best_of_candidates(prediction.row(row), one.limits) for row, one in enumerate(asked)]

    def _rank_similar(self, asked: list[_Asked]) -> list[Ranked]:
        items_B = torch.tensor([one.item for one in asked], device=self._device)
        scale_B1 = self._inverse_norm_V[items_B].unsqueeze(1)
        scores_BV = (self._weights_VD[items_B] * scale_B1) @ self._weights_VD.T * self._inverse_norm_V
        return best_of_scores(scores_BV, [one.limits for one in asked])

    def _predict(self, asked: list[_Asked]) -> Prediction:
        batch = self._histories.batch([one.history for one in asked if one.history is not None])
        return predict(self._model, batch.to(self._device), self._weights_VD)

    def _answer(self, asked: _Asked, ranked: Ranked) -> Recommendation:
        explanations: tuple[tuple[Influence, ...], ...] = ()
        if isinstance(asked.query, Query) and asked.query.explain and asked.history is not None:
            shown = asked.query.history
            explanations = influences(self._model, self._histories, self._weights_VD, shown, asked.history, ranked[0])
        return Recommendation(self._ranked_items(ranked), asked.unknown, explanations=explanations)

    def _ranked_items(self, ranked: Ranked) -> tuple[RankedItem, ...]:
        index, scores = ranked
        item_ids = self._item_ids
        return tuple(map(RankedItem, [item_ids[item] for item in index], scores, _BY_MODEL))

    def _fall_back(self, asked: _Asked) -> Recommendation:
        if asked.query.fallback == "none":
            return Recommendation((), asked.unknown)
        index, events = self._popularity.best(asked.limits)
        items = tuple(RankedItem(self._item_ids[item], n, "popular") for item, n in zip(index, events, strict=True))
        return Recommendation(items, asked.unknown, fallback_used=True)
