"""The kernel that finds the best items, against float64; skipped where it cannot run."""

import pytest
import torch
from kernels import needs_kernels
from torch import Tensor

from seqray.native.top_items import TopItems
from seqray.ranking import NEVER, top_k

pytestmark = needs_kernels


def expected(hidden_BD: Tensor, weights_VD: Tensor, k: list[int], excluded: list, allowed: list) -> list:
    """By all scores in float64."""
    scores_BV = hidden_BD.double() @ weights_VD.double().T
    scores_BV[:, 0] = NEVER
    found = []
    for row, (count, items, mask) in enumerate(zip(k, excluded, allowed, strict=True)):
        scores_BV[row, items] = NEVER
        if mask is not None:
            scores_BV[row][~mask] = NEVER
        index, values = top_k(scores_BV[row : row + 1], count)
        found.append((index[0].tolist(), values[0]))
    return found


def check(hidden_BD: Tensor, weights_VD: Tensor, k: list[int], excluded: list, allowed: list) -> None:
    top = TopItems.of(weights_VD, build=True)
    assert top is not None
    index_BK, values_BK = top.best(hidden_BD, k, excluded, allowed)
    for row, (index, values) in enumerate(expected(hidden_BD, weights_VD, k, excluded, allowed)):
        assert index_BK[row, : len(index)].tolist() == index
        torch.testing.assert_close(values_BK[row, : len(index)].double(), values, rtol=1e-4, atol=1e-4)
        assert not index_BK[row, len(index) :].any()
        assert (values_BK[row, len(index) :] == NEVER).all()


@pytest.mark.parametrize("V", [2, 31, 256, 257, 5000])
@pytest.mark.parametrize("D", [1, 16, 48, 64])
def test_the_best_items_are_those_of_float64(V: int, D: int) -> None:
    torch.manual_seed(V * D)
    B = 5
    excluded = [torch.randint(1, V, (n,)).tolist() for n in range(B)]
    allowed = [None, torch.rand(V) < 0.5, None, torch.rand(V) < 0.02, torch.zeros(V, dtype=torch.bool)]
    check(torch.randn(B, D), torch.randn(V, D), [1, 7, 20, 500, 3], excluded, allowed)


def test_equal_scores_are_in_the_order_of_the_catalogue() -> None:
    torch.manual_seed(0)
    weights_VD = torch.randn(20, 32)[torch.randint(20, (3000,))]  # 150 of each score
    check(torch.randn(3, 32), weights_VD, [500, 10, 151], [[1, 1, 2], [], []], [None] * 3)


@pytest.mark.parametrize("D", [64, 200])
def test_sums_of_the_largest_codes_have_room(D: int) -> None:
    torch.manual_seed(D)
    weights_VD = torch.ones(3000, D) - 2.0 * torch.randint(2, (3000, D))
    weights_VD[7], weights_VD[8] = 1.0, -1.0
    check(
        torch.stack([weights_VD[7], weights_VD[8], weights_VD[9]]), weights_VD, [20, 3000, 1], [[], [8], []], [None] * 3
    )


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-30, 1e15])
def test_weights_of_any_size_are_ranked(scale: float) -> None:
    torch.manual_seed(0)
    top = TopItems.of(scale * torch.randn(300, 24), build=True)
    assert top is not None
    for hidden_D in (torch.randn(24), torch.zeros(24), 1e-44 * torch.randn(24)):
        index_BK, values_BK = top.best(hidden_D[None], [250], [[3]], [None])
        assert sorted({*index_BK[0].tolist()} - {0, 3}) == sorted(index_BK[0].tolist())
        assert (values_BK[0].diff() <= 0).all()


def test_scores_that_differ_by_less_than_the_rounding_are_told_apart() -> None:
    torch.manual_seed(0)
    weights_VD = torch.randn(1, 64) + 1e-2 * torch.randn(4000, 64)
    check(weights_VD[7:8], weights_VD, [20], [[]], [None])


def test_rows_of_very_different_sizes() -> None:
    torch.manual_seed(0)
    sizes_V1 = 10 ** torch.linspace(-20, 3, 3000)[torch.randperm(3000)].unsqueeze(1)
    weights_VD = torch.randn(3000, 24) * sizes_V1
    weights_VD[1:200] = 0
    hidden_BD = torch.randn(4, 24) * torch.tensor([[1e-20], [1.0], [1e3], [0.0]])
    check(hidden_BD, weights_VD, [30, 2000, 100, 5], [[]] * 4, [None, None, torch.arange(3000) < 150, None])


def test_a_query_that_is_no_number_has_no_items_and_harms_no_other() -> None:
    torch.manual_seed(0)
    weights_VD, hidden_BD = torch.randn(300, 16), torch.randn(3, 16)
    hidden_BD[0, 3], hidden_BD[2, 0] = float("nan"), float("inf")
    top = TopItems.of(weights_VD, build=True)
    assert top is not None
    index_BK, values_BK = top.best(hidden_BD, [5] * 3, [[]] * 3, [None] * 3)
    assert not index_BK[[0, 2]].any()
    assert (values_BK[[0, 2]] == NEVER).all()
    assert index_BK[1].tolist() == expected(hidden_BD[1:2], weights_VD, [5], [[]], [None])[0][0]


def test_an_answer_is_the_same_in_any_batch_and_on_any_threads() -> None:
    torch.manual_seed(0)
    weights_VD, hidden_BD = torch.randn(3000, 64), torch.randn(9, 64)
    top = TopItems.of(weights_VD, build=True)
    assert top is not None
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            whole = top.best(hidden_BD, [10] * 9, [[]] * 9, [None] * 9)
            alone = [top.best(hidden_BD[row : row + 1], [10], [[]], [None]) for row in range(9)]
            answers += [whole, tuple(torch.cat(part) for part in zip(*alone, strict=True))]
    finally:
        torch.set_num_threads(before)
    for index_BK, values_BK in answers[1:]:
        assert torch.equal(index_BK, answers[0][0])
        assert torch.equal(values_BK, answers[0][1])
