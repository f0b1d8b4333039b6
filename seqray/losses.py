"""Losses over the catalogue, summed over tokens; the caller divides by the tokens of the global batch.

Shapes: T tokens, D hidden, V items + padding, N negatives, C tokens of a chunk.
"""

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from seqray.component import component_class
from seqray.negatives import Negatives
from seqray.sections import BCEConfig, Component, SampledSoftmaxConfig, SoftmaxConfig


class Loss(Protocol):
    """A loss is built from its own section and called once a step."""

    Config: type[Component]

    def __call__(self, hidden_TD: Tensor, targets_T: Tensor, weights_VD: Tensor, negatives: Negatives) -> Tensor:
        """The loss summed over T, a float32 scalar."""
        ...


def build_loss(config: Component) -> Loss:
    """The loss that `config.type` names."""
    return cast(Loss, component_class("loss", config.type)(config))


class Softmax:
    """Full cross-entropy: -log softmax(hidden @ weights.T)[target] over all items, padding left out."""

    Config = SoftmaxConfig

    def __init__(self, config: SoftmaxConfig) -> None:
        self._chunk_elements = config.chunk_elements

    def __call__(self, hidden_TD: Tensor, targets_T: Tensor, weights_VD: Tensor, negatives: Negatives) -> Tensor:
        """Summed over T; memory holds chunk_elements logits and never T x V."""
        chunk = max(1, self._chunk_elements // len(weights_VD))
        return cast(Tensor, _FullCrossEntropy.apply(hidden_TD, targets_T, weights_VD, chunk))  # type: ignore[no-untyped-call]


class SampledSoftmax:
    """Cross-entropy over the target and shared uniform negatives; a negative that is the target does not count."""

    Config = SampledSoftmaxConfig

    def __init__(self, config: SampledSoftmaxConfig) -> None:
        self._num_negatives = config.num_negatives

    def __call__(self, hidden_TD: Tensor, targets_T: Tensor, weights_VD: Tensor, negatives: Negatives) -> Tensor:
        """Summed over T."""
        negative_N = negatives.shared(self._num_negatives)
        positive_T = (hidden_TD * F.embedding(targets_T, weights_VD)).sum(1).float()
        negative_TN = (hidden_TD @ F.embedding(negative_N, weights_VD).T).float()
        negative_TN = negative_TN.masked_fill(targets_T.unsqueeze(1) == negative_N, float("-inf"))
        everything = torch.cat([positive_T.unsqueeze(1), negative_TN], 1)
        return (everything.logsumexp(1) - positive_T).sum()


class BCE:
    """Binary cross-entropy, -log s(positive) - sum log(1 - s(negative)) (SASRec, equation 7)."""

    Config = BCEConfig

    def __init__(self, config: BCEConfig) -> None:
        self._num_negatives = config.num_negatives

    def __call__(self, hidden_TD: Tensor, targets_T: Tensor, weights_VD: Tensor, negatives: Negatives) -> Tensor:
        """Summed over T and negatives; a negative that is the target does not count."""
        negative_TN = negatives.per_token(self._num_negatives)
        positive_T = (hidden_TD * F.embedding(targets_T, weights_VD)).sum(1).float()
        score_TN = (hidden_TD.unsqueeze(1) * F.embedding(negative_TN, weights_VD)).sum(2).float()
        counts_TN = negative_TN != targets_T.unsqueeze(1)
        return F.softplus(-positive_T).sum() + (F.softplus(score_TN) * counts_TN).sum()


class _FullCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of tokens: each chunk's logits live only until its gradients do.

    Products and softmax run in autocast's type where autocast is on (softmax adds up in float32 all the same), the
    loss in float32.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, targets_T: Tensor, weights_VD: Tensor, chunk: int) -> Tensor:
        device = hidden_TD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
        with torch.autocast(device, enabled=False):
            hidden, weights = hidden_TD.to(dtype), weights_VD.to(dtype)
            wants_gradient = any(ctx.needs_input_grad)
            loss = torch.zeros((), device=hidden_TD.device)
            grad_hidden = torch.empty_like(hidden_TD) if wants_gradient else None
            grad_weights = torch.zeros_like(weights_VD) if wants_gradient else None
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                slope_CV, part_loss = _softmax_slope(hidden[part] @ weights.T, targets_T[part])
                loss += part_loss
                if grad_hidden is not None and grad_weights is not None:
                    grad_hidden[part] = slope_CV @ weights
                    grad_weights += slope_CV.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weights)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weights = ctx.saved_tensors
        return grad_hidden * upstream[0], None, grad_weights * upstream[0], None


def _softmax_slope(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax minus one-hot of the target, the slope of the loss over the logits; summed loss)."""
    logits_CV[:, 0] = float("-inf")
    slope_CV = torch.softmax(logits_CV, 1)
    target_C1 = target_C.unsqueeze(1)
    chance_C1 = slope_CV.gather(1, target_C1)
    slope_CV.scatter_(1, target_C1, chance_C1 - 1)
    smallest = torch.finfo(torch.float32).tiny
    return slope_CV, -chance_C1.float().clamp_min(smallest).log().sum()
