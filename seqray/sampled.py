"""Losses over a target and its negatives: loss and gradients in one pass, a chunk of the targets at a time.

Shapes: P asked events, S targets, D hidden, V items + padding, N negatives, C targets of a chunk, M scores of the
history, K = 1 + N candidates: the target, then its negatives.
"""

from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from seqray.gradients import Gradients, product_type, rows_of_chunk
from seqray.models.protocol import HistoryScores, Prediction
from seqray.negatives import Negatives, Sampler
from seqray.samples import Targets

DENSE = 64
"""Up to this many items for each negative, products over the catalogue cost less than gathering and scattering."""


class Criterion(Protocol):
    """From scores to a loss."""

    def __call__(self, score_CK: Tensor) -> tuple[Tensor, Tensor]:
        """(loss_C, slope_CK); a score of -inf does not count."""
        ...


class Draws(NamedTuple):
    """Which negatives, and what is known of them."""

    negatives: Negatives
    sampler: Sampler
    correct: bool
    """Whether each negative's score is lowered by the log of its expected count."""


def sampled_loss(
    prediction: Prediction, targets: Targets, draws: Draws, criterion: Criterion, chunk_elements: int | None = None
) -> Tensor:
    """`criterion` over targets and negatives, summed over S; a negative that is the target has no part."""
    hidden, rows_S = prediction.hidden_PD, targets.rows_S
    if rows_S is None:
        rows_S = torch.arange(len(hidden), device=hidden.device)
    else:
        hidden = hidden.index_select(0, rows_S)
    added = None if prediction.added is None else Added(prediction.added, len(prediction.weights_VD))
    job = _Job(targets.items_S, rows_S, targets.weights_S, added, draws, criterion, chunk_elements)
    values_M = None if prediction.added is None else prediction.added.values_M
    return cast(Tensor, _SampledLoss.apply(hidden, prediction.weights_VD, values_M, job))  # type: ignore[no-untyped-call]


class There(NamedTuple):
    """Which of some pairs have a score of the history, and its place among M for each that has."""

    found: Tensor
    place: Tensor


class Added:
    """Finds the scores of the history that belong to any pairs (asked event, item)."""

    def __init__(self, added: HistoryScores, width: int) -> None:
        self._key_M, self._width = added.rows_M * width + added.items_M, width

    def find(self, rows: Tensor, items: Tensor) -> There:
        """Of the pairs that `rows` and `items` make when broadcast."""
        key = rows * self._width + items
        if not len(self._key_M):
            return There(torch.zeros_like(key, dtype=torch.bool), key.new_empty(0))
        place = torch.searchsorted(self._key_M, key).clamp_(max=len(self._key_M) - 1)
        found = self._key_M[place] == key
        return There(found, place[found])


class _Job(NamedTuple):
    items_S: Tensor
    rows_S: Tensor
    weights_S: Tensor | None
    added: Added | None
    draws: Draws
    criterion: Criterion
    chunk_elements: int | None


class _SampledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, weights_VD: Tensor, values_M: Tensor | None, job: _Job) -> Tensor:
        dtype = product_type(hidden_SD)
        with torch.autocast(hidden_SD.device.type, enabled=False):
            gradients = Gradients.of(hidden_SD, weights_VD, values_M) if any(ctx.needs_input_grad) else None
            loss = _over_chunks(hidden_SD.to(dtype), weights_VD, values_M, job, gradients)
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.gradients.times(upstream[0]), None


def _over_chunks(
    hidden_SD: Tensor, weights_VD: Tensor, values_M: Tensor | None, job: _Job, gradients: Gradients | None
) -> Tensor:
    wide = torch.promote_types(hidden_SD.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=hidden_SD.device)
    products, chunk = _products(hidden_SD, weights_VD, job)
    for start in range(0, len(hidden_SD), chunk):
        part = slice(start, start + chunk)
        hidden_CD, item_C1 = hidden_SD[part], job.items_S[part].unsqueeze(1)
        negative = products.negatives(part)
        score_CK = products.scores(hidden_CD, item_C1, negative).to(wide)
        there = None
        if job.added is not None and values_M is not None:
            item_CK = torch.cat([item_C1, negative.expand(len(item_C1), -1)], 1)
            there = job.added.find(job.rows_S[part].unsqueeze(1), item_CK)
            score_CK[there.found] += values_M[there.place].to(wide)
        if job.draws.correct:
            score_CK[:, 1:] -= job.draws.negatives.log_expected(job.draws.sampler, negative)
        score_CK[:, 1:].masked_fill_(negative == item_C1, float("-inf"))
        loss_C, slope_CK = job.criterion(score_CK)
        if job.weights_S is not None:
            weight_C = job.weights_S[part].to(wide)
            loss_C, slope_CK = loss_C * weight_C, slope_CK.mul_(weight_C.unsqueeze(1))
        loss += loss_C.sum()
        if gradients is not None:
            gradients.hidden[part] = products.learn(slope_CK.to(hidden_SD.dtype), hidden_CD, gradients)
            if there is not None and gradients.values_M is not None:
                gradients.values_M.index_add_(0, there.place, slope_CK[there.found].to(gradients.values_M.dtype))
    if gradients is not None:
        products.finish(gradients)
    return loss


class _Products(Protocol):
    def negatives(self, part: slice) -> Tensor: ...

    def scores(self, hidden_CD: Tensor, item_C1: Tensor, negative: Tensor) -> Tensor:
        """score_CK, and remembers what `learn` needs."""
        ...

    def learn(self, slope_CK: Tensor, hidden_CD: Tensor, gradients: Gradients) -> Tensor:
        """Slopes over hidden_CD; those over the weights are added up."""
        ...

    def finish(self, gradients: Gradients) -> None: ...


def _products(hidden_SD: Tensor, weights_VD: Tensor, job: _Job) -> tuple[_Products, int]:
    """How the scores are multiplied out, and the targets of a chunk."""
    draws, (V, D) = job.draws, weights_VD.shape
    count = draws.sampler.count
    if not draws.sampler.own:
        return _Shared(hidden_SD, weights_VD, draws), _rows(job, count, D, hidden_SD)
    if DENSE * count >= V:
        return _Dense(weights_VD.to(hidden_SD.dtype), draws), _rows(job, V, D, hidden_SD)
    return _Gathered(hidden_SD.dtype, weights_VD, draws), _rows(job, (count + 1) * D, 1, hidden_SD)


def _rows(job: _Job, row: int, least: int, hidden_SD: Tensor) -> int:
    return rows_of_chunk(job.chunk_elements, row, least, hidden_SD.device)


class _Shared:
    """All targets have the same negatives: two small products."""

    def __init__(self, hidden_SD: Tensor, weights_VD: Tensor, draws: Draws) -> None:
        self._item_N = draws.negatives.shared(draws.sampler)
        self._weights_VD, self._rows_ND = weights_VD, F.embedding(self._item_N, weights_VD).to(hidden_SD.dtype)
        wide = torch.promote_types(weights_VD.dtype, torch.float32)
        self._slope_ND = torch.zeros_like(self._rows_ND, dtype=wide)

    def negatives(self, part: slice) -> Tensor:
        return self._item_N

    def scores(self, hidden_CD: Tensor, item_C1: Tensor, negative: Tensor) -> Tensor:
        self._item_C = item_C1.squeeze(1)
        self._target_CD = F.embedding(self._item_C, self._weights_VD).to(hidden_CD.dtype)
        wide = torch.promote_types(hidden_CD.dtype, torch.float32)
        score_CK = hidden_CD.new_empty(len(hidden_CD), 1 + len(self._item_N), dtype=wide)
        score_CK[:, 0] = (hidden_CD * self._target_CD).sum(1)
        score_CK[:, 1:] = hidden_CD @ self._rows_ND.T
        return score_CK

    def learn(self, slope_CK: Tensor, hidden_CD: Tensor, gradients: Gradients) -> Tensor:
        positive_C1, negative_CN = slope_CK[:, :1], slope_CK[:, 1:]
        self._slope_ND += negative_CN.T @ hidden_CD
        gradients.weights_VD.index_add_(0, self._item_C, (positive_C1 * hidden_CD).to(gradients.weights_VD.dtype))
        return negative_CN @ self._rows_ND + positive_C1 * self._target_CD

    def finish(self, gradients: Gradients) -> None:
        gradients.weights_VD.index_add_(0, self._item_N, self._slope_ND)


class _Dense:
    """Scores of the whole catalogue, of which the candidates are picked."""

    def __init__(self, weights_VD: Tensor, draws: Draws) -> None:
        self._weights_VD, self._draws = weights_VD, draws
        self._slope_CV: Tensor | None = None

    def negatives(self, part: slice) -> Tensor:
        return self._draws.negatives.per_target(self._draws.sampler, part)

    def scores(self, hidden_CD: Tensor, item_C1: Tensor, negative: Tensor) -> Tensor:
        self._item_CK = torch.cat([item_C1, negative], 1)
        self._logits_CV = hidden_CD @ self._weights_VD.T
        return self._logits_CV.gather(1, self._item_CK)

    def learn(self, slope_CK: Tensor, hidden_CD: Tensor, gradients: Gradients) -> Tensor:
        slope_CV = self._logits_CV.zero_().scatter_add_(1, self._item_CK, slope_CK)
        gradients.add_product(slope_CV, hidden_CD)
        return slope_CV @ self._weights_VD

    def finish(self, gradients: Gradients) -> None:
        pass


class _Gathered:
    """The candidates' weight vectors, gathered for each target."""

    def __init__(self, dtype: torch.dtype, weights_VD: Tensor, draws: Draws) -> None:
        self._dtype, self._weights_VD, self._draws = dtype, weights_VD, draws

    def negatives(self, part: slice) -> Tensor:
        return self._draws.negatives.per_target(self._draws.sampler, part)

    def scores(self, hidden_CD: Tensor, item_C1: Tensor, negative: Tensor) -> Tensor:
        self._item_CK = torch.cat([item_C1, negative], 1)
        self._rows_CKD = F.embedding(self._item_CK, self._weights_VD).to(self._dtype)
        return torch.bmm(self._rows_CKD, hidden_CD.unsqueeze(2)).squeeze(2)

    def learn(self, slope_CK: Tensor, hidden_CD: Tensor, gradients: Gradients) -> Tensor:
        slope_hidden_CD = torch.bmm(slope_CK.unsqueeze(1), self._rows_CKD).squeeze(1)
        torch.mul(slope_CK.unsqueeze(2), hidden_CD.unsqueeze(1), out=self._rows_CKD)
        source = self._rows_CKD.flatten(0, 1).to(gradients.weights_VD.dtype)
        gradients.weights_VD.index_add_(0, self._item_CK.flatten(), source)
        return slope_hidden_CD

    def finish(self, gradients: Gradients) -> None:
        pass
