"""Metrics as pure functions of integer histograms of ranks, so that they do not depend on who counted what.

Shapes: R = largest k + 1 buckets (rank 0, 1, ...; the last bucket holds all ranks from k on), S targets of a query.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RankCounts:
    """first_R: queries by the rank of their best target; all_SR: targets by the query's number of targets and rank."""

    first_R: Tensor
    all_SR: Tensor

    @classmethod
    def empty(cls, largest_k: int, most_targets: int) -> "RankCounts":
        """No query counted yet; `most_targets` is the largest number of targets that a query has."""
        buckets = largest_k + 1
        return cls(torch.zeros(buckets, dtype=torch.int64), torch.zeros(most_targets + 1, buckets, dtype=torch.int64))

    def add(self, rank_P: Tensor, query_P: Tensor, num_queries: int) -> None:
        """Counts the ranks of pairs (query, target); every query from 0 to num_queries - 1 has at least one."""
        last = len(self.first_R) - 1
        rank_P = rank_P.cpu().clamp(max=last)
        best_B = torch.full((num_queries,), last).scatter_reduce(0, query_P, rank_P, "amin")
        self.first_R += torch.bincount(best_B, minlength=last + 1)
        size_P = torch.bincount(query_P, minlength=num_queries)[query_P]
        cells = torch.bincount(size_P * (last + 1) + rank_P, minlength=self.all_SR.numel())
        self.all_SR += cells.view_as(self.all_SR)


def rank_metrics(counts: RankCounts, ks: Sequence[int], *, baskets: bool = False) -> dict[str, float]:
    """hit_rate, ndcg and mrr at each k; recall too where the targets are `baskets`.

    hit_rate@k: share of queries with a target in the top k. recall@k: mean share of a query's targets in the top k
    (for one target the same as hit_rate). ndcg@k: gain 1 / log2(rank + 2), divided by the best that min(S, k) targets
    can reach. mrr@k: mean of 1 / (rank + 1) of the best target, 0 below the top k. All 0 when nothing was counted.
    """
    queries = max(1, int(counts.first_R.sum()))
    size_S = torch.arange(len(counts.all_SR), dtype=torch.float64)
    found: dict[str, float] = {}
    for k in ks:
        first_k, all_Sk = counts.first_R[:k].double(), counts.all_SR[:, :k].double()
        rank_k = torch.arange(k, dtype=torch.float64)
        discount_k = 1 / torch.log2(rank_k + 2)
        best_S = torch.cat([discount_k.new_ones(1), discount_k.cumsum(0)])[size_S.clamp(max=k).long()]
        found[f"hit_rate@{k}"] = float(first_k.sum() / queries)
        found[f"ndcg@{k}"] = float(((all_Sk @ discount_k) / best_S).sum() / queries)
        found[f"mrr@{k}"] = float((first_k / (rank_k + 1)).sum() / queries)
        if baskets:
            found[f"recall@{k}"] = float((all_Sk.sum(1) / size_S.clamp(min=1)).sum() / queries)
    return found
