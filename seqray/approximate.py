"""Approximate retrieval by faiss: an index finds candidates, and these are scored exactly.

The largest inner products are found as the nearest vectors: each item vector gets one more number, so that all have the
same length (Bachrach et al., Speeding Up the Xbox Recommender System Using a Euclidean Transformation for Inner-Product
Spaces, 2014, section 3).

Shapes: B queries, D hidden, V items + padding, C candidates, K top-k.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seqray.errors import ConfigError
from seqray.models.protocol import Prediction
from seqray.retrieval import ExactRetrieval, Limits, Ranked, best_of_candidates
from seqray.serve_config import RetrievalConfig

FEW = 20_000
"""Items that a filter leaves, up to which all of them are scored."""
CODE_BYTES = 32
"""ivfpq: bytes of an item, at the most."""
TRAINING_ITEMS = 200_000
"""ivfpq: items that the compression is learnt from."""

FloatArray = npt.NDArray[np.float32]


class ApproximateRetrieval:
    """Looks at the candidates of an index; at all items where the index does not find enough."""

    def __init__(self, index: Any, weights_VD: Tensor, config: RetrievalConfig, exact: ExactRetrieval) -> None:
        """index: what `build_index` made of weights_VD, the float32 item weights on the CPU."""
        self._index, self._config, self._exact = index, config, exact
        self._weights_VD = weights_VD

    @property
    def queries_at_a_time(self) -> int:
        """See Retrieval."""
        return self._exact.queries_at_a_time

    def best(self, prediction: Prediction, limits: Sequence[Limits]) -> list[Ranked]:
        """See Retrieval: the k best of what the index finds, by their exact scores."""
        found: list[Ranked | None] = [None] * len(limits)
        plain = [row for row, one in enumerate(limits) if one.allowed_V is None]
        if plain:
            hidden = prediction.hidden_PD[plain].float().numpy()
            wanted = max(self._wanted(limits[row]) for row in plain)
            for row, candidates in zip(plain, self._search(hidden, wanted, None), strict=True):
                found[row] = self._of(prediction, row, limits[row], candidates)
        for row, one in enumerate(limits):
            if one.allowed_V is not None:
                found[row] = self._filtered(prediction, row, one, one.allowed_V)
        missing = [row for row, ranked in enumerate(found) if ranked is None]
        for row in missing:
            [found[row]] = self._exact.best(prediction.row(row), [limits[row]])
        return [ranked for ranked in found if ranked is not None]

    def _wanted(self, limits: Limits) -> int:
        return max(self._config.candidates, limits.k + len(limits.excluded))

    def _filtered(self, prediction: Prediction, row: int, limits: Limits, allowed_V: Tensor) -> Ranked | None:
        items = allowed_V.nonzero().flatten()
        if len(items) <= FEW:
            return best_of_candidates(prediction.row(row), limits.among(items.tolist()))
        hidden = prediction.hidden_PD[row : row + 1].float().numpy()
        [candidates] = self._search(hidden, self._wanted(limits), np.packbits(allowed_V.numpy(), bitorder="little"))
        return self._of(prediction, row, limits, candidates)

    def _of(self, prediction: Prediction, row: int, limits: Limits, candidates: list[int]) -> Ranked | None:
        """None when the index found too few, which a search through all items has to make good."""
        one = prediction.row(row)
        if one.added is not None:  # what the model adds for items of the history may bring them to the top
            candidates = [*candidates, *one.added.items_M.tolist()]
        ranked = best_of_candidates(one, limits.among(item for item in candidates if item > 0))
        return ranked if len(ranked[0]) == limits.k else None

    def _search(self, hidden_BD: FloatArray, wanted: int, allowed: npt.NDArray[np.uint8] | None) -> list[list[int]]:
        import faiss

        selector = None if allowed is None else faiss.IDSelectorBitmap(allowed)
        if self._config.type == "hnsw":
            effort = max(self._config.effort, wanted)
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=effort)
        else:
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=min(self._config.probes, self._index.nlist))
        lengthened = np.concatenate([hidden_BD, np.zeros((len(hidden_BD), self._index.d - hidden_BD.shape[1]))], 1)
        count = min(wanted, self._index.ntotal)
        _, index_BC = self._index.search(lengthened.astype(np.float32), count, params=parameters)
        return [[item for item in row if item >= 0] for row in index_BC.tolist()]


def build_index(weights_VD: Tensor, config: RetrievalConfig) -> Any:
    """A faiss index over the item weights; ConfigError without the package faiss-cpu."""
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(f"serve.retrieval.type: {config.type} needs the package faiss-cpu") from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    vectors = _of_one_length(weights_VD.numpy())
    width = vectors.shape[1]
    if config.type == "hnsw":
        index = faiss.IndexHNSWFlat(width, config.neighbours)
        index.hnsw.efConstruction = config.effort
    else:
        lists = min(config.lists or round(4 * math.sqrt(len(vectors))), max(1, len(vectors) // 40))
        codes = max(part for part in range(1, CODE_BYTES + 1) if width % part == 0)
        bits = 8 if len(vectors) >= 10_000 else 4
        index = faiss.IndexIVFPQ(faiss.IndexFlatL2(width), width, lists, codes, bits)
        chosen = np.random.default_rng(0).permutation(len(vectors))[:TRAINING_ITEMS]
        index.train(vectors[chosen])
    index.add(vectors)
    return index


def recall(
    index: ApproximateRetrieval, exact: ExactRetrieval, prediction: Prediction, limits: Sequence[Limits]
) -> float:
    """Share of the exact answers' items that the index finds too."""
    pairs = zip(index.best(prediction, limits), exact.best(prediction, limits), strict=True)
    hits = [(len(set(found[0]) & set(wanted[0])), len(wanted[0])) for found, wanted in pairs]
    return sum(hit for hit, _ in hits) / max(1, sum(of for _, of in hits))


def _of_one_length(weights_VD: FloatArray) -> FloatArray:
    """The vectors with one more number that gives all the length of the longest, then zeros to a multiple of 8."""
    squares = np.square(weights_VD, dtype=np.float64).sum(1)
    V, D = weights_VD.shape
    vectors = np.zeros((V, -(-(D + 1) // 8) * 8), np.float32)
    vectors[:, :D] = weights_VD
    vectors[:, D] = np.sqrt(np.maximum(squares.max() - squares, 0))
    return vectors
