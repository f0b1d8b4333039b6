"""Each loss against a float64 or hand-computed reference, in value and gradient."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqray.losses import build_loss
from seqray.negatives import Negatives
from seqray.sections import BCEConfig, Component, SampledSoftmaxConfig, SoftmaxConfig

T, V, D = 37, 23, 8


def parts(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(1, V, (T,), generator=generator), weights


def negatives(key: tuple[int, int, int] = (1, 2, 3), tokens: Tensor | None = None, total: int = T) -> Negatives:
    return Negatives(key, V - 1, torch.arange(T) if tokens is None else tokens, total)


def plain_softmax(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weights[1:].T, targets - 1, reduction="sum")


@pytest.mark.parametrize("chunk_elements", [1, 5 * V, 10**6])
def test_softmax_equals_the_plain_form(chunk_elements: int) -> None:
    hidden, targets, weights = parts()
    loss = build_loss(SoftmaxConfig(chunk_elements=chunk_elements))(hidden, targets, weights, negatives())
    (3 * loss).backward()
    reference_hidden, _, reference_weights = parts(torch.float64)
    reference = plain_softmax(reference_hidden, targets, reference_weights)
    (3 * reference).backward()
    assert hidden.grad is not None and weights.grad is not None
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), reference_hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.grad.double(), reference_weights.grad, rtol=1e-4, atol=1e-5)


def test_softmax_under_bf16_autocast_stays_within_its_tolerance() -> None:
    hidden, targets, weights = parts()
    with torch.autocast("cpu", torch.bfloat16):
        loss = build_loss(SoftmaxConfig(chunk_elements=5 * V))(hidden, targets, weights, negatives())
    loss.backward()
    reference_hidden, _, reference_weights = parts(torch.float64)
    reference = plain_softmax(reference_hidden, targets, reference_weights)
    reference.backward()
    assert hidden.grad is not None and weights.grad is not None and reference_weights.grad is not None
    assert hidden.grad.dtype == torch.float32
    assert abs(float(loss.detach()) / float(reference.detach()) - 1) < 5e-3
    assert float((weights.grad.double() - reference_weights.grad).norm() / reference_weights.grad.norm()) < 2e-2


def test_softmax_of_a_hopeless_target_is_finite() -> None:
    hidden, weights = torch.full((1, 1), 1000.0, requires_grad=True), torch.tensor([[0.0], [1.0], [-1.0]])
    loss = build_loss(SoftmaxConfig())(hidden, torch.tensor([2]), weights, negatives())
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert hidden.grad is not None and float(hidden.grad) == 2.0


def test_sampled_softmax_by_hand() -> None:
    hidden, targets, weights = parts(torch.float64)
    loss = build_loss(SampledSoftmaxConfig(num_negatives=6))(hidden, targets, weights, negatives())
    drawn = negatives().shared(6).tolist()
    weights, expected = weights.detach(), 0.0
    for h, target in zip(hidden.detach(), targets.tolist(), strict=True):
        scores = [float(h @ weights[target])] + [float(h @ weights[n]) for n in drawn if n != target]
        expected += math.log(sum(math.exp(s) for s in scores)) - scores[0]
    assert any(target in drawn for target in targets.tolist()), "no accidental hit, so its masking is not tested"
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_bce_by_hand() -> None:
    hidden, targets, weights = parts(torch.float64)
    loss = build_loss(BCEConfig(num_negatives=2))(hidden, targets, weights, negatives())
    weights, expected = weights.detach(), 0.0
    for h, target, drawn in zip(hidden.detach(), targets.tolist(), negatives().per_token(2).tolist(), strict=True):
        expected += math.log1p(math.exp(-float(h @ weights[target])))
        expected += sum(math.log1p(math.exp(float(h @ weights[n]))) for n in drawn if n != target)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", [SoftmaxConfig(), SampledSoftmaxConfig(num_negatives=5), BCEConfig()])
def test_the_loss_of_a_step_does_not_depend_on_who_holds_which_token(config: Component) -> None:
    hidden, targets, weights = parts(torch.float64)
    loss = build_loss(config)
    whole = loss(hidden, targets, weights, negatives())
    halves = [torch.arange(0, T, 2), torch.arange(1, T, 2)]
    split = sum(loss(hidden[half], targets[half], weights, negatives(tokens=half)) for half in halves)
    torch.testing.assert_close(whole, split, rtol=1e-6, atol=1e-4)


def test_negatives_are_a_function_of_seed_epoch_and_step() -> None:
    assert torch.equal(negatives().shared(50), negatives().shared(50))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not torch.equal(negatives().shared(50), negatives(other).shared(50))
    drawn = negatives().shared(5000)
    assert int(drawn.min()) == 1
    assert int(drawn.max()) == V - 1
