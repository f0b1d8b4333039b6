"""Each loss against a float64 reference by autograd or by hand, in value and gradient."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqray.catalogue import Catalogue
from seqray.errors import ConfigError
from seqray.losses import build_loss
from seqray.models.protocol import HistoryScores, Prediction
from seqray.negatives import Negatives, Popularity, Sampler
from seqray.samples import Targets
from seqray.sections import BCEConfig, Component, GBCEConfig, SampledSoftmaxConfig, SoftmaxConfig

P, V, D = 37, 23, 8
POPULARITY = Popularity([(item + 1) ** 2 for item in range(V - 1)])
Reference = Callable[[Tensor, Targets, Negatives], Tensor]


class Parts(NamedTuple):
    """Inputs of a loss; the last three are what gradients are compared over."""

    targets: Targets
    hidden: Tensor
    weights: Tensor
    values: Tensor | None
    added: HistoryScores | None

    @property
    def prediction(self) -> Prediction:
        return Prediction(self.hidden, self.weights, self.added)

    @property
    def negatives(self) -> Negatives:
        return Negatives((1, 2, 3), V - 1, self.targets, POPULARITY)


def parts(case: str = "", dtype: torch.dtype = torch.float32, rows: int = P) -> Parts:
    """Cases: baskets (several targets of a row or none, one of them twice), history, weighted; or several."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    items, rows_S = torch.randint(1, V, (rows,), generator=generator), None
    if "baskets" in case:
        rows_S = torch.randint(0, rows, (2 * rows,), generator=generator).sort().values
        items = torch.randint(1, V, (2 * rows,), generator=generator)
        rows_S[:2], items[:2] = rows_S[0], items[0]
    weights_S = torch.rand(len(items), generator=generator) * 2 if "weighted" in case else None
    targets = Targets(items, rows_S, torch.arange(len(items)), weights_S)
    if "history" not in case:
        return Parts(targets, hidden, weights, None, None)
    pairs = (torch.rand(rows, V, generator=generator) < 0.3).nonzero()
    pairs = pairs[pairs[:, 1] > 0]
    values = torch.randn(len(pairs), generator=generator).to(dtype).requires_grad_()
    return Parts(targets, hidden, weights, values, HistoryScores(pairs[:, 0], pairs[:, 1], values))


def scores(given: Parts) -> Tensor:
    """scores_PV in the parts' own type, with nothing for padding."""
    found = given.hidden @ given.weights.T
    if given.added is not None and given.values is not None:
        found = found.index_put((given.added.rows_M, given.added.items_M), given.values, accumulate=True)
    return found


def of_targets(given: Parts) -> Tensor:
    found = scores(given)
    return found if given.targets.rows_S is None else found[given.targets.rows_S]


def weighted(loss_S: Tensor, targets: Targets) -> Tensor:
    return loss_S.sum() if targets.weights_S is None else loss_S @ targets.weights_S.to(loss_S.dtype)


def plain_softmax(score_SV: Tensor, targets: Targets, negatives: Negatives) -> Tensor:
    return weighted(F.cross_entropy(score_SV[:, 1:], targets.items_S - 1, reduction="none"), targets)


def plain_sampled(sampler: Sampler, log_q: bool) -> Reference:
    def loss(score_SV: Tensor, targets: Targets, negatives: Negatives) -> Tensor:
        positive_S, negative_SN, drawn_SN = candidates(sampler, score_SV, targets, negatives)
        if log_q:
            negative_SN = negative_SN - negatives.log_expected(sampler, drawn_SN)
        return weighted(negative_SN.logsumexp(1).logaddexp(positive_S) - positive_S, targets)

    return loss


def plain_bce(sampler: Sampler, beta: float) -> Reference:
    def loss(score_SV: Tensor, targets: Targets, negatives: Negatives) -> Tensor:
        positive_S, negative_SN, _ = candidates(sampler, score_SV + math.log(beta / sampler.count), targets, negatives)
        return weighted(-beta * positive_S.sigmoid().log() - (1 - negative_SN.sigmoid()).log().sum(1), targets)

    return loss


def candidates(
    sampler: Sampler, score_SV: Tensor, targets: Targets, negatives: Negatives
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of targets and of negatives, -inf where a negative is the target, and the negatives."""
    drawn = negatives.per_target(sampler) if sampler.own else negatives.shared(sampler).expand(len(score_SV), -1)
    hit_SN = drawn == targets.items_S.unsqueeze(1)
    assert bool(hit_SN.any()), "no accidental hit, so that leaving them out is not tested"
    positive_S = score_SV.gather(1, targets.items_S.unsqueeze(1)).squeeze(1)
    return positive_S, score_SV.gather(1, drawn).masked_fill(hit_SN, -math.inf), drawn


BETA = 6 / 21 * (0.75 * (1 - 21 / 6) + 21 / 6)
SAMPLED: dict[str, tuple[Component, Reference]] = {
    "uniform": (SampledSoftmaxConfig(num_negatives=6), plain_sampled(Sampler(6), False)),
    "uniform, own": (SampledSoftmaxConfig(num_negatives=6, per="position"), plain_sampled(Sampler(6, own=True), False)),
    "uniform, log_q": (SampledSoftmaxConfig(num_negatives=6, log_q=True), plain_sampled(Sampler(6), True)),
    "popularity": (
        SampledSoftmaxConfig(num_negatives=6, negatives="popularity", popularity_power=0.5),
        plain_sampled(Sampler(6, "popularity", power=0.5), True),
    ),
    "in_batch": (
        SampledSoftmaxConfig(num_negatives=99, negatives="in_batch"),
        plain_sampled(Sampler(99, "in_batch"), True),
    ),
    "in_batch, own": (
        SampledSoftmaxConfig(num_negatives=6, negatives="in_batch", per="position", log_q=False),
        plain_sampled(Sampler(6, "in_batch", own=True), False),
    ),
    "mixed": (
        SampledSoftmaxConfig(num_negatives=8, negatives="mixed", uniform_share=0.25),
        plain_sampled(Sampler(8, "mixed", uniform_share=0.25), True),
    ),
    "mixed, own": (
        SampledSoftmaxConfig(num_negatives=8, negatives="mixed", per="position"),
        plain_sampled(Sampler(8, "mixed", own=True), True),
    ),
    "bce": (BCEConfig(num_negatives=6), plain_bce(Sampler(6, own=True), 1.0)),
    "bce, shared": (BCEConfig(num_negatives=6, per="batch"), plain_bce(Sampler(6), 1.0)),
    "gbce": (GBCEConfig(num_negatives=6), plain_bce(Sampler(6, own=True), BETA)),
    "gbce, t=0": (GBCEConfig(num_negatives=6, t=0), plain_bce(Sampler(6, own=True), 1.0)),
}  # fmt: skip


def compare(config: Component, reference: Reference, case: str, rows: int = P) -> None:
    """Loss and gradients in float32 against `reference` in float64."""
    given, exact = parts(case, rows=rows), parts(case, torch.float64, rows)
    loss = build_loss(config)(given.prediction, given.targets, given.negatives)
    expected = reference(of_targets(exact), exact.targets, exact.negatives)
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, its in ((given.hidden, exact.hidden), (given.weights, exact.weights), (given.values, exact.values)):
        if mine is not None and its is not None:
            assert mine.grad is not None and its.grad is not None
            torch.testing.assert_close(mine.grad.double(), its.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["", "baskets", "history", "baskets history weighted", "weighted"])
@pytest.mark.parametrize("chunk_elements", [1, 5 * V, P * V, None])
def test_softmax_equals_the_plain_form(chunk_elements: int | None, case: str) -> None:
    compare(SoftmaxConfig(chunk_elements=chunk_elements), plain_softmax, case)


@pytest.mark.parametrize("case", ["", "baskets history weighted"])
@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_losses_equal_their_plain_forms(name: str, case: str) -> None:
    compare(*SAMPLED[name], case)


@pytest.mark.parametrize("chunk_elements", [1, 100])
@pytest.mark.parametrize("name", ["uniform", "in_batch", "mixed, own", "gbce"])
def test_sampled_losses_do_not_depend_on_their_chunks(
    name: str, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, reference = SAMPLED[name]
    config = config.model_copy(update={"chunk_elements": chunk_elements})
    compare(config, reference, "baskets history")
    monkeypatch.setattr("seqray.sampled.DENSE", 0)  # vectors are gathered, as of a large catalogue
    compare(config, reference, "baskets history")


CONFIGS = [SoftmaxConfig(), *(config for config, _ in SAMPLED.values())]


@pytest.mark.parametrize("config", CONFIGS, ids=["softmax", *SAMPLED])
def test_under_bf16_autocast_losses_stay_within_its_tolerance(config: Component) -> None:
    given, exact = parts("history"), parts("history", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = build_loss(config)(given.prediction, given.targets, given.negatives)
    expected = build_loss(config)(exact.prediction, exact.targets, exact.negatives)
    loss.backward()
    expected.backward()
    assert abs(float(loss.detach()) / float(expected.detach()) - 1) < 5e-3
    for mine, its in ((given.hidden, exact.hidden), (given.weights, exact.weights), (given.values, exact.values)):
        assert mine is not None and its is not None and mine.grad is not None and its.grad is not None
        assert mine.grad.dtype == torch.float32
        assert float((mine.grad.double() - its.grad).norm() / its.grad.norm()) < 2e-2


@pytest.mark.parametrize("config", CONFIGS, ids=["softmax", *SAMPLED])
def test_a_step_may_have_one_target_or_none(config: Component) -> None:
    for case, rows in (("", 1), ("", 0), ("history", 0)):
        given = parts(case, rows=rows)
        loss = build_loss(config)(given.prediction, given.targets, given.negatives)
        loss.backward()
        assert math.isfinite(float(loss.detach())) and (rows or not float(loss.detach()))
        assert given.hidden.grad is not None and given.hidden.grad.isfinite().all()
    given = parts()
    nothing = Targets(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0).long())
    loss = build_loss(config)(given.prediction, nothing, Negatives((1, 2, 3), V - 1, nothing, POPULARITY))
    loss.backward()
    assert float(loss.detach()) == 0
    assert given.weights.grad is not None and not given.weights.grad.any()


def test_softmax_of_a_hopeless_target_is_finite() -> None:
    hidden, weights = torch.full((1, 1), 1000.0, requires_grad=True), torch.tensor([[0.0], [1.0], [-1.0]])
    targets = Targets(torch.tensor([2]), None, torch.tensor([0]))
    loss = build_loss(SoftmaxConfig())(Prediction(hidden, weights), targets, Negatives((0, 0, 0), 2, targets))
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert hidden.grad is not None and float(hidden.grad) == 2.0


def test_a_loss_says_so_when_backward_is_called_twice() -> None:
    given = parts()
    loss = build_loss(SoftmaxConfig())(given.prediction, given.targets, given.negatives)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward can be called once"):
        loss.backward()


def test_sampled_softmax_by_hand() -> None:
    given = parts(dtype=torch.float64)
    loss = build_loss(SampledSoftmaxConfig(num_negatives=6))(given.prediction, given.targets, given.negatives)
    drawn, weights, expected = given.negatives.shared(Sampler(6)).tolist(), given.weights.detach(), 0.0
    for h, target in zip(given.hidden.detach(), given.targets.items_S.tolist(), strict=True):
        found = [float(h @ weights[target])] + [float(h @ weights[n]) for n in drawn if n != target]
        expected += math.log(sum(math.exp(s) for s in found)) - found[0]
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9)


def test_gbce_by_hand() -> None:
    given = parts(dtype=torch.float64)
    loss = build_loss(GBCEConfig(num_negatives=3, t=0.5))(given.prediction, given.targets, given.negatives)
    alpha = 3 / (V - 2)  # 22 items
    beta = alpha * (0.5 * (1 - 1 / alpha) + 1 / alpha)
    drawn, weights, expected = given.negatives.per_target(Sampler(3, own=True)), given.weights.detach(), 0.0
    for h, target, own in zip(given.hidden.detach(), given.targets.items_S.tolist(), drawn.tolist(), strict=True):
        expected += beta * math.log1p(math.exp(-float(h @ weights[target])) * 3 / beta)
        expected += sum(math.log1p(math.exp(float(h @ weights[n])) * beta / 3) for n in own if n != target)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("negatives", "per"), [("popularity", "batch"), ("popularity", "position"), ("uniform", "batch")]
)
def test_log_q_makes_the_estimate_that_of_the_full_softmax(negatives: str, per: str) -> None:
    given = parts(dtype=torch.float64)
    full = float(plain_softmax(scores(given), given.targets, given.negatives).detach())
    config = SampledSoftmaxConfig.model_validate({"num_negatives": 20_000, "negatives": negatives, "per": per})
    found = {
        log_q: float(
            build_loss(config.model_copy(update={"log_q": log_q}))(
                given.prediction, given.targets, given.negatives
            ).detach()
        )
        for log_q in (True, False)
    }
    assert found[True] == pytest.approx(full, rel=0.02)
    assert abs(found[False] / full - 1) > 0.5


def test_mixed_negatives_have_the_expected_counts() -> None:
    popular = torch.from_numpy(np.repeat(np.arange(1, V), np.arange(1, V) ** 2))
    targets = Targets(popular, None, torch.arange(len(popular)))
    for sampler in (Sampler(2000, "mixed", uniform_share=0.5), Sampler(2000, "mixed", own=True)):
        negatives = Negatives((0, 0, 0), V - 1, targets, POPULARITY)
        drawn = negatives.per_target(sampler, slice(0, 20)) if sampler.own else negatives.shared(sampler).unsqueeze(0)
        counts = torch.bincount(drawn.flatten(), minlength=V)[1:] / len(drawn)
        expected = negatives.log_expected(sampler, torch.arange(1, V)).exp()
        assert float(expected.sum()) == pytest.approx(2000, rel=1e-3)
        assert float((counts - expected).abs().max()) < 5 * float(expected.max()) ** 0.5


@pytest.mark.parametrize("name", ["softmax", *(name for name in SAMPLED if not name.startswith(("in_batch", "mixed")))])
def test_the_loss_of_a_step_does_not_depend_on_who_holds_which_target(name: str) -> None:
    given = parts(dtype=torch.float64)
    loss = build_loss(SoftmaxConfig() if name == "softmax" else SAMPLED[name][0])
    whole = loss(given.prediction, given.targets, given.negatives)
    halves = torch.zeros((), dtype=torch.float64)
    for half in (torch.arange(0, P, 2), torch.arange(1, P, 2)):
        targets = Targets(given.targets.items_S[half], None, half)
        negatives = Negatives((1, 2, 3), V - 1, targets, POPULARITY)
        halves = halves + loss(Prediction(given.hidden[half], given.weights), targets, negatives)
    torch.testing.assert_close(whole, halves, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["uniform", "popularity"])
def test_negatives_are_a_function_of_seed_epoch_and_step(name: str) -> None:
    def drawn(key: tuple[int, int, int], own: bool) -> Tensor:
        sampler = Sampler(50, "popularity" if name == "popularity" else "uniform", own)
        negatives = Negatives(key, V - 1, parts().targets, POPULARITY)
        return negatives.per_target(sampler) if own else negatives.shared(sampler)

    for own in (False, True):
        assert torch.equal(drawn((1, 2, 3), own), drawn((1, 2, 3), own))
        for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3), (1, 3, 2)):
            assert not torch.equal(drawn((1, 2, 3), own), drawn(other, own))


def test_random_numbers_are_even_and_unrelated() -> None:
    negatives = Negatives((1, 2, 3), V - 1, parts().targets)
    number = negatives.random(0, torch.arange(1000), 50)
    assert float(number.min()) >= 0 and float(number.max()) < 1
    assert torch.bincount((number * 10).long().flatten()).sub(5000).abs().max() < 350
    for other in (negatives.random(1, torch.arange(1000), 50), number.roll(1, 0), number.roll(1, 1)):
        together = torch.corrcoef(torch.stack([number.flatten(), other.flatten()]))[0, 1]
        assert abs(float(together)) < 0.02
    drawn = negatives.per_target(Sampler(500, own=True))
    assert (int(drawn.min()), int(drawn.max())) == (1, V - 1)


def test_popularity_comes_from_the_item_table() -> None:
    items = pa.table({"item_id": ["a", "b", "c"], "train_events": [6, 0, 3]})
    popularity = Popularity.of(Catalogue(3, items))
    assert popularity is not None
    chance_V = popularity.chances(1.0, torch.device("cpu"))
    torch.testing.assert_close(chance_V, torch.tensor([0, 0.6, 0.1, 0.3], dtype=torch.float64))
    uniform = torch.tensor([0.0, 0.59, 0.61, 0.69, 0.71, 1 - 1e-16], dtype=torch.float64)
    assert popularity.items(uniform, 1.0).tolist() == [1, 1, 2, 2, 3, 3]
    assert Popularity.of(Catalogue(3)) is None
    with pytest.raises(ConfigError, match="train_events"):
        Negatives((0, 0, 0), 3, parts().targets).shared(Sampler(5, "popularity"))
