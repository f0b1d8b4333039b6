"""Ranks, top-k and metrics against brute force and hand-computed values."""

import math

import pytest
import torch

from seqray.metrics import RankCounts, rank_metrics
from seqray.ranking import NEVER, UNRANKED, mask_scores, ranks_among, top_k


def scores_with_ties() -> torch.Tensor:
    scores = torch.randint(0, 4, (25, 30), generator=torch.Generator().manual_seed(0)).double()
    return mask_scores(scores, torch.tensor([0, 0, 3]), torch.tensor([5, 7, 1]))


def order(row: torch.Tensor) -> list[int]:
    """All unmasked items, best first, ties by lower index."""
    return sorted((i for i in range(len(row)) if row[i] > NEVER), key=lambda i: (-float(row[i]), i))


def test_top_k_and_ranks_equal_a_plain_sort() -> None:
    scores = scores_with_ties()
    items, values = top_k(scores, 8)
    for row in range(len(scores)):
        expected = order(scores[row])
        assert items[row].tolist() == expected[:8]
        assert values[row].tolist() == [float(scores[row, i]) for i in expected[:8]]
        query = torch.full((len(expected),), row)
        ranks = ranks_among(items, query, torch.tensor(expected)).tolist()
        assert ranks == [*range(8), *[UNRANKED] * (len(expected) - 8)]


def test_masked_targets_rank_last_and_missing_answers_are_padding() -> None:
    scores = scores_with_ties()
    masked = ranks_among(top_k(scores, 30)[0], torch.tensor([0, 3]), torch.tensor([5, 1]))
    assert masked.tolist() == [UNRANKED, UNRANKED]
    items, values = top_k(torch.tensor([[NEVER, 2.0, NEVER]]), 3)
    assert items.tolist() == [[1, 0, 0]]
    assert values.tolist() == [[2.0, NEVER, NEVER]]


def test_metrics_of_single_targets_by_hand() -> None:
    counts = RankCounts.empty(10, 1)
    counts.add(torch.tensor([0, 2, 9, 10, 500]), torch.arange(5), 5)
    metrics = rank_metrics(counts, (5, 10))
    assert metrics["hit_rate@5"] == pytest.approx(2 / 5)
    assert metrics["hit_rate@10"] == pytest.approx(3 / 5)
    assert metrics["ndcg@10"] == pytest.approx((1 + 1 / math.log2(4) + 1 / math.log2(11)) / 5)
    assert metrics["mrr@10"] == pytest.approx((1 + 1 / 3 + 1 / 10) / 5)
    assert "recall@10" not in metrics


def test_metrics_of_baskets_by_hand() -> None:
    counts = RankCounts.empty(2, 3)
    counts.add(torch.tensor([1, 0, 7, 5]), torch.tensor([0, 1, 1, 1]), 2)
    metrics = rank_metrics(counts, (2,), baskets=True)
    assert metrics["recall@2"] == pytest.approx((1 + 1 / 3) / 2)
    assert metrics["hit_rate@2"] == 1.0
    assert metrics["mrr@2"] == pytest.approx((1 / 2 + 1) / 2)
    ideal = 1 + 1 / math.log2(3)
    assert metrics["ndcg@2"] == pytest.approx((1 / math.log2(3) + 1 / ideal) / 2)


def test_no_queries_are_zero_and_not_an_error() -> None:
    assert set(rank_metrics(RankCounts.empty(5, 1), (5,)).values()) == {0.0}


def test_a_masked_target_is_a_miss_even_when_k_is_above_the_catalogue() -> None:
    scores = mask_scores(torch.tensor([[0.0, 3.0, 2.0]]), torch.tensor([0]), torch.tensor([1]))
    counts = RankCounts.empty(20, 1)
    counts.add(ranks_among(top_k(scores, 20)[0], torch.tensor([0]), torch.tensor([1])), torch.tensor([0]), 1)
    assert rank_metrics(counts, (20,))["hit_rate@20"] == 0.0
