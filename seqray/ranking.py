"""Ranking scores over the catalogue, with ties by lower item_index, the same everywhere.

Shapes: B queries, V items + padding, K top-k, P pairs (query, item).
"""

import torch
from torch import Tensor

NEVER = float("-inf")
UNRANKED = torch.iinfo(torch.int64).max
"""Rank of a target that is masked, or whose score is no number."""


def mask_scores(scores_BV: Tensor, query_P: Tensor, item_P: Tensor) -> Tensor:
    """Takes padding and the given pairs out of the ranking, in place."""
    scores_BV[:, 0] = NEVER
    scores_BV[query_P, item_P] = NEVER
    return scores_BV


def target_ranks(scores_BV: Tensor, query_P: Tensor, item_P: Tensor) -> Tensor:
    """Rank of each pair, from 0: items scored strictly higher, plus equal ones of lower index; masked: UNRANKED."""
    score_P1 = scores_BV[query_P, item_P].unsqueeze(1)
    rows_PV = scores_BV if len(query_P) == len(scores_BV) and _is_arange(query_P) else scores_BV[query_P]
    higher_P = (rows_PV > score_P1).sum(1)
    equal_PV = rows_PV == score_P1
    tied = equal_PV.sum(1) > 1
    if tied.any():
        columns = torch.arange(scores_BV.shape[1], device=scores_BV.device)
        higher_P[tied] += (equal_PV[tied] & (columns < item_P[tied].unsqueeze(1))).sum(1)
    return torch.where(score_P1.squeeze(1) > NEVER, higher_P, UNRANKED)


def top_k(scores_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(item_index_BK, score_BK) of the k best, best first; where fewer remain, item_index 0 with score -inf."""
    k = min(k, scores_BV.shape[1])
    values_BK, index_BK = torch.topk(scores_BV, k, dim=1)
    last_B1 = values_BK[:, -1:]
    at_least = (scores_BV >= last_B1).sum(1)
    for row in torch.nonzero((at_least > k) & (last_B1.squeeze(1) > NEVER)).flatten().tolist():
        candidates = torch.nonzero(scores_BV[row] >= last_B1[row]).flatten()
        best = torch.sort(scores_BV[row, candidates], descending=True, stable=True).indices[:k]
        index_BK[row] = candidates[best]
    index_BK = index_BK.sort(1).values
    values_BK, order_BK = scores_BV.gather(1, index_BK).sort(dim=1, descending=True, stable=True)
    index_BK = index_BK.gather(1, order_BK)
    return torch.where(values_BK > NEVER, index_BK, 0), values_BK


def _is_arange(query_P: Tensor) -> bool:
    return bool((query_P == torch.arange(len(query_P), device=query_P.device)).all())
