"""Full cross-entropy in C++ against a float64 reference."""

import pytest
import torch
from kernels import needs_kernels_of_training
from torch import Tensor
from torch.nn import functional as F

from seqray.losses import build_loss
from seqray.models.protocol import Prediction
from seqray.negatives import Negatives
from seqray.samples import Targets
from seqray.sections import SoftmaxConfig


def loss_parts(case: str, rows: int, items: int, D: int) -> tuple[Tensor, Tensor, Targets]:
    """Hidden states, weights and targets: several a row or none, weighted."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=generator).requires_grad_()
    weights = torch.randn(items, D, generator=generator).requires_grad_()
    count = 2 * rows if "baskets" in case else rows
    rows_S = torch.randint(0, rows, (count,), generator=generator).sort().values if "baskets" in case else None
    weights_S = torch.rand(count, generator=generator) * 2 if "weighted" in case else None
    items_S = torch.randint(1, items, (count,), generator=generator)
    return hidden, weights, Targets(items_S, rows_S, torch.arange(count), weights_S)


def softmax(hidden: Tensor, weights: Tensor, targets: Targets, chunk_elements: int | None = None) -> Tensor:
    loss = build_loss(SoftmaxConfig(chunk_elements=chunk_elements))
    with torch.autocast("cpu", torch.bfloat16):
        return loss(Prediction(hidden, weights), targets, Negatives((0, 0, 0), len(weights) - 1, targets))


def plain_loss(hidden: Tensor, weights: Tensor, targets: Targets) -> Tensor:
    score_SV = hidden @ weights.T
    score_SV = score_SV if targets.rows_S is None else score_SV[targets.rows_S]
    loss_S = F.cross_entropy(score_SV[:, 1:], targets.items_S - 1, reduction="none")
    return loss_S.sum() if targets.weights_S is None else loss_S @ targets.weights_S.double()


@needs_kernels_of_training
@pytest.mark.parametrize("case", ["", "baskets", "baskets weighted", "weighted"])
@pytest.mark.parametrize("chunk_elements", [1, None])
@pytest.mark.parametrize(
    ("rows", "items", "D"), [(37, 23, 8), (1, 2, 1), (200, 600, 64), (64, 256, 50), (65, 513, 130)]
)
def test_cross_entropy_equals_the_plain_form(
    case: str, chunk_elements: int | None, rows: int, items: int, D: int
) -> None:
    hidden, weights, targets = loss_parts(case, rows, items, D)
    exact = [part.detach().bfloat16().double().requires_grad_() for part in (hidden, weights)]
    expected = plain_loss(*exact, targets)
    loss = softmax(hidden, weights, targets, chunk_elements)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    slopes, exact_slopes = torch.autograd.grad(3 * loss, (hidden, weights)), torch.autograd.grad(3 * expected, exact)
    for mine, its in zip(slopes, exact_slopes, strict=True):
        assert float((mine.double() - its).norm()) <= 5e-3 * float(its.norm()) + 2e-2


@needs_kernels_of_training
def test_cross_entropy_of_logits_that_rise_and_fall_far() -> None:
    hidden, weights, targets = loss_parts("", 100, 1000, 16)
    with torch.no_grad():
        weights[700] *= 60  # far above the first tile for some rows, far below for others
        weights[30] *= 40
    exact = [part.detach().bfloat16().double().requires_grad_() for part in (hidden, weights)]
    loss, expected = softmax(hidden, weights, targets), plain_loss(*exact, targets)
    assert float((hidden @ weights[700]).detach().abs().max()) > 150
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-3)
    for mine, its in zip(
        torch.autograd.grad(loss, (hidden, weights)), torch.autograd.grad(expected, exact), strict=True
    ):
        assert float((mine.double() - its).norm() / its.norm()) < 1e-2


@needs_kernels_of_training
def test_cross_entropy_does_not_depend_on_threads_and_passes_nan_on() -> None:
    hidden, weights, targets = loss_parts("baskets", 500, 2000, 32)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        loss = softmax(hidden, weights, targets, 2000 * 128)
        results.append([loss, *torch.autograd.grad(loss, (hidden, weights))])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    with torch.no_grad():
        hidden[3, 3] = torch.nan
    assert softmax(hidden, weights, targets).isnan()


@needs_kernels_of_training
def test_cross_entropy_refuses_a_target_beyond_the_catalogue() -> None:
    hidden, weights, _ = loss_parts("", 4, 8, 4)
    with pytest.raises(RuntimeError, match="a target beyond the logits"):
        softmax(hidden, weights, Targets(torch.tensor([1, 2, 3, 99]), None, torch.arange(4)))
