"""OneCall: the usual query, answered by one call of a kernel from its ids to the best items."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from seqray.item_masks import ItemMasks
from seqray.models.protocol import SequentialModel
from seqray.models.sasrec import PreparedSASRec
from seqray.native.ranker import Ranker
from seqray.query import Query, SimilarQuery
from seqray.retrieval import ExactRetrieval, Ranked, Retrieval, without_never
from seqray.vocabulary import ItemVocabulary

NOTHING: Ranked = ([], [])


class Ranking(NamedTuple):
    """What came of a query with a known item in its history."""

    ranked: Ranked
    unknown: tuple[Hashable, ...]
    """Ids of the history that nobody knows, each once."""
    items_json: bytes | None
    """In the place of `ranked` where the query asked for it."""


class OneCall:
    """Ranks the whole catalogue after plain histories; the answers are those of the longer way."""

    def __init__(self, ranker: Ranker, vocabulary: ItemVocabulary, masks: ItemMasks, exclude_seen: bool) -> None:
        self._ranker, self._index, self._masks, self._exclude_seen = ranker, vocabulary.index, masks, exclude_seen

    @classmethod
    def of(
        cls, model: SequentialModel, retrieval: Retrieval, vocabulary: ItemVocabulary, item_ids: Sequence[Any],
        masks: ItemMasks, exclude_seen: bool,
    ) -> "OneCall | None":  # fmt: skip
        """None where there is no kernel for the model or the retrieval. item_ids: in index order."""
        if not isinstance(model, PreparedSASRec) or not model.reads_items_alone:
            return None
        if not isinstance(retrieval, ExactRetrieval) or retrieval.top_items is None:
            return None
        return cls(Ranker(item_ids, model.kernel, retrieval.top_items), vocabulary, masks, exclude_seen)

    @staticmethod
    def takes(query: Query | SimilarQuery) -> bool:
        """Whether `rank` can be asked this."""
        return type(query) is Query and bool(query.history) and query.candidates is None and not query.explain

    def rank(self, queries: Sequence[Query]) -> list[Ranking | None]:
        """Of each query, None where no item of its history is known, and where the longer way has to be gone."""
        default = self._exclude_seen
        found = self._ranker.best(
            [query.history for query in queries],
            [query.as_json for query in queries],
            [query.k for query in queries],
            [default if query.exclude_seen is None else query.exclude_seen for query in queries],
            [[item for item in map(self._index, query.exclude_items) if item] for query in queries],
            [None if query.filter is None else self._masks.mask(query.filter) for query in queries],
        )
        if found is None:
            return [None] * len(queries)
        items_N, index_BK, scores_BK, pieces = found[0].numpy(), found[1].numpy(), found[2].numpy(), found[3]
        stops = np.cumsum([len(query.history) for query in queries])
        rankings: list[Ranking | None] = [
            Ranking(NOTHING, (), pieces[row])
            if query.as_json
            else Ranking(without_never(index_BK[row].tolist(), scores_BK[row].tolist()), (), None)
            for row, query in enumerate(queries)
        ]
        for place in set(np.searchsorted(stops, np.flatnonzero(items_N == 0), side="right").tolist()):
            history = queries[place].history
            known = items_N[stops[place] - len(history) : stops[place]] > 0
            unknown = tuple(dict.fromkeys(item for item, is_known in zip(history, known, strict=True) if not is_known))
            ranking = rankings[place]
            assert ranking is not None
            rankings[place] = ranking._replace(unknown=unknown) if known.any() else None
        return rankings
