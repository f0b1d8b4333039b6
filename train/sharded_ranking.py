"""Ranking over item weights that a group of workers shares out: each finds the best of its own, and these are merged.

Shapes: B queries, the same on all workers of the group, v item weights of this worker, K top-k, W workers.
"""

import torch
from torch import Tensor

from seqray.evaluation import Best, Predictor, Ranker
from seqray.models.protocol import HistoryScores, Prediction
from seqray.ranking import NEVER, top_k
from seqray.sequences import Queries
from train.vocabulary_group import VocabularyGroup


def sharded_ranker(predictor: Predictor, max_length: int, group: VocabularyGroup, num_rows: int) -> Ranker:
    """The ranker of a model whose item weights are `group.rows(num_rows)`."""
    rows, weights_vD = group.rows(num_rows), None

    def rank(queries: Queries, k: int, exclude_seen: bool) -> Best:
        nonlocal weights_vD
        prediction = predictor(queries.history(max_length).to(group.device), weights_vD)
        if weights_vD is None:
            weights_vD = prediction.weights_VD.float()
        scores_Bv = Prediction(prediction.hidden_PD, weights_vD, _here(prediction.added, rows)).scores()
        bad = group.sum_((~scores_Bv.sum().isfinite()).long())
        if rows.start == 0:
            scores_Bv[:, 0] = NEVER
        if exclude_seen:
            query_P, item_P = (pair.to(group.device) for pair in queries.seen())
            here_P = (item_P >= rows.start) & (item_P < rows.stop)
            scores_Bv[query_P[here_P], item_P[here_P] - rows.start] = NEVER
        return Best(_merged(scores_Bv, k, rows, group), not bool(bad))

    return rank


def _here(added: HistoryScores | None, rows: slice) -> HistoryScores | None:
    """The scores of the history that belong to this worker's items, by the place of the item among them."""
    if added is None:
        return None
    here_M = (added.items_M >= rows.start) & (added.items_M < rows.stop)
    return HistoryScores(added.rows_M[here_M], added.items_M[here_M] - rows.start, added.values_M[here_M])


def _merged(scores_Bv: Tensor, k: int, rows: slice, group: VocabularyGroup) -> Tensor:
    """item_index_BK of the k best of all workers, best first; equal scores by item_index, as `top_k` has them."""
    place_Bk, value_Bk = top_k(scores_Bv, k)
    items_BK = place_Bk.new_zeros(len(scores_Bv), k)
    values_BK = value_Bk.new_full((len(scores_Bv), k), NEVER)
    items_BK[:, : place_Bk.shape[1]], values_BK[:, : value_Bk.shape[1]] = place_Bk + rows.start, value_Bk
    items_BWK, values_BWK = (group.stack(part).transpose(0, 1).flatten(1) for part in (items_BK, values_BK))
    values_BK, best_BK = torch.sort(values_BWK, dim=1, descending=True, stable=True)
    return torch.where(values_BK > NEVER, items_BWK.gather(1, best_BK), 0)[:, :k]
