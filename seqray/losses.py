"""Losses over the catalogue, summed over targets; the caller divides by the targets of the global batch.

Shapes: P asked events, S targets, D hidden, V items + padding, N negatives, C targets of a chunk, K = 1 + N candidates.
"""

import math
from typing import Protocol, cast

from torch import Tensor, sigmoid, softmax
from torch.nn import functional as F

from seqray.component import component_class
from seqray.full_softmax import full_cross_entropy
from seqray.gradients import minus_log, rows_of_chunk
from seqray.models.protocol import Prediction
from seqray.negatives import Negatives, Sampler
from seqray.sampled import Draws, sampled_loss
from seqray.samples import Targets
from seqray.sections import BCEConfig, Component, GBCEConfig, SampledSoftmaxConfig, SoftmaxConfig


class Loss(Protocol):
    """A loss is built from its own section and called once a step."""

    Config: type[Component]

    def __call__(self, prediction: Prediction, targets: Targets, negatives: Negatives) -> Tensor:
        """The loss summed over S, a float32 scalar."""
        ...


def build_loss(config: Component) -> Loss:
    """The loss that `config.type` names."""
    return cast(Loss, component_class("loss", config.type)(config))


class Softmax:
    """Full cross-entropy: -log softmax(hidden @ weights.T)[target] over all items, padding left out."""

    Config = SoftmaxConfig

    def __init__(self, config: SoftmaxConfig) -> None:
        self._chunk_elements = config.chunk_elements

    def __call__(self, prediction: Prediction, targets: Targets, negatives: Negatives) -> Tensor:
        """Summed over S; memory holds a chunk of the logits and never P x V."""
        V, D = prediction.weights_VD.shape
        chunk = rows_of_chunk(self._chunk_elements, V, D, prediction.hidden_PD.device)
        return full_cross_entropy(prediction, targets, chunk)


class SampledSoftmax:
    """Cross-entropy over the target and its negatives: -s(t) + log(exp s(t) + sum over negatives j of exp s'(j)).

    A negative that is the target does not count. With log_q, s'(j) = s(j) - log of the expected count of j, so that the
    sum is an unbiased estimate of the full softmax's over all items but the target: importance sampling of the
    negative part (Bengio & Senecal 2008, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic
    Language Model"; for in-batch negatives Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling for Large Corpus
    Item Recommendations", s - log p). The target is there for certain and keeps its score, as Khrylchenko et al. 2025,
    "Correcting the LogQ Correction", argue.
    """

    Config = SampledSoftmaxConfig

    def __init__(self, config: SampledSoftmaxConfig) -> None:
        self._sampler = Sampler(
            config.num_negatives, config.negatives, config.per == "position", config.popularity_power,
            config.uniform_share,
        )  # fmt: skip
        self._correct = config.negatives != "uniform" if config.log_q is None else config.log_q
        self._chunk_elements = config.chunk_elements

    def __call__(self, prediction: Prediction, targets: Targets, negatives: Negatives) -> Tensor:
        """Summed over S."""
        draws = Draws(negatives, self._sampler, self._correct)
        return sampled_loss(prediction, targets, draws, _softmax, self._chunk_elements)


class BCE:
    """Binary cross-entropy, -log s(target) - sum log(1 - s(negative)) (SASRec, equation 7).

    s(x) is sigmoid(x + log(1 / N)): a score of 0 is the chance that a target has among its N negatives. Without that
    constant, which changes no ranking, all items must first learn to score far below 0, and with the output tied to the
    input embedding they become nearly the same vector on the way (with 256 negatives next to nothing was learnt after
    that). Lin et al. 2017, "Focal Loss for Dense Object Detection", section 3.3, start from such a prior too.
    """

    Config: type[Component] = BCEConfig

    def __init__(self, config: BCEConfig | GBCEConfig) -> None:
        self._sampler = Sampler(config.num_negatives, own=config.per == "position")
        self._chunk_elements = config.chunk_elements

    def __call__(self, prediction: Prediction, targets: Targets, negatives: Negatives) -> Tensor:
        """Summed over S and negatives; a negative that is the target does not count."""
        beta = self._beta(len(prediction.weights_VD) - 1)
        prior = math.log(beta / self._sampler.count)

        def criterion(score_CK: Tensor) -> tuple[Tensor, Tensor]:
            score_CK = score_CK + prior
            slope_CK = sigmoid(score_CK)
            slope_CK[:, 0] = beta * (slope_CK[:, 0] - 1)
            return beta * F.softplus(-score_CK[:, 0]) + F.softplus(score_CK[:, 1:]).sum(1), slope_CK

        return sampled_loss(
            prediction, targets, Draws(negatives, self._sampler, False), criterion, self._chunk_elements
        )

    def _beta(self, num_items: int) -> float:
        return 1.0


class GBCE(BCE):
    """Generalised binary cross-entropy, -log s(target)^beta - sum log(1 - s(negative)).

    Petrov & Macdonald 2023, "gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with Negative
    Sampling": beta = alpha (t (1 - 1 / alpha) + 1 / alpha), alpha = N / (num_items - 1). Their factor 1 / (N + 1) is
    left out, as in `bce`, whose prior is log(beta / N) here. The paper raises s to beta in float64; beta times log s
    says the same in float32.
    """

    Config: type[Component] = GBCEConfig

    def __init__(self, config: GBCEConfig) -> None:
        super().__init__(config)
        self._t = config.t

    def _beta(self, num_items: int) -> float:
        alpha = min(1.0, self._sampler.count / max(1, num_items - 1))
        return alpha * (self._t * (1 - 1 / alpha) + 1 / alpha)


def _softmax(score_CK: Tensor) -> tuple[Tensor, Tensor]:
    chance_CK = softmax(score_CK, 1)
    loss_C = minus_log(chance_CK[:, 0])
    chance_CK[:, 0] -= 1
    return loss_C, chance_CK
