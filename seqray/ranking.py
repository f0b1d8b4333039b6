"""Ranking scores over the catalogue, with ties by lower item_index, the same everywhere.

Shapes: B queries, V items + padding, K top-k, P pairs (query, item).
"""

import torch
from torch import Tensor

NEVER = float("-inf")
UNRANKED = torch.iinfo(torch.int64).max
"""Rank of a target that is masked or not among the best."""


def mask_scores(scores_BV: Tensor, query_P: Tensor, item_P: Tensor) -> Tensor:
    """Takes padding and the given pairs out of the ranking, in place."""
    scores_BV[:, 0] = NEVER
    scores_BV[query_P, item_P] = NEVER
    return scores_BV


def top_k(scores_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(item_index_BK, score_BK) of the k best, best first; where fewer remain, item_index 0 with score -inf."""
    V = scores_BV.shape[1]
    k = min(k, V)
    values_BK, index_BK = torch.topk(scores_BV, min(k + 1, V), dim=1)
    # Only where the next one is as good is it open which of the equal ones belong to the k best.
    open_B = (values_BK[:, k - 1] == values_BK[:, -1]) & (values_BK[:, -1] > NEVER)
    values_BK, index_BK = values_BK[:, :k], index_BK[:, :k].contiguous()
    last_B1 = values_BK[:, -1:]
    for row in torch.nonzero(open_B).flatten().tolist() if k < V else ():
        candidates = torch.nonzero(scores_BV[row] >= last_B1[row]).flatten()
        best = torch.sort(scores_BV[row, candidates], descending=True, stable=True).indices[:k]
        index_BK[row] = candidates[best]
    index_BK = index_BK.sort(1).values
    values_BK, order_BK = scores_BV.gather(1, index_BK).sort(dim=1, descending=True, stable=True)
    index_BK = index_BK.gather(1, order_BK)
    return torch.where(values_BK > NEVER, index_BK, 0), values_BK


def ranks_among(best_BK: Tensor, query_P: Tensor, item_P: Tensor) -> Tensor:
    """Rank of each pair in the answer of `top_k`, from 0; UNRANKED where it is not among the K best."""
    found_PK = best_BK[query_P] == item_P.unsqueeze(1)
    return torch.where(found_PK.any(1), found_PK.int().argmax(1), UNRANKED)
