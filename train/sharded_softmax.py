"""Full cross-entropy over item weights that a group of workers shares out; memory holds a chunk of the logits.

Shapes: P asked events, S targets and M scores of the history of one worker; G, s and m of all workers of the group;
D hidden, v item weights of this worker, C asked events of a chunk.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from seqray.errors import ConfigError
from seqray.full_softmax import bounds
from seqray.gradients import Gradients, product_type, rows_of_chunk
from seqray.losses import Loss
from seqray.models.protocol import Prediction
from seqray.negatives import Negatives
from seqray.samples import Targets
from seqray.sections import Component, SoftmaxConfig
from train.vocabulary_group import Sizes, VocabularyGroup


def sharded_loss(config: Component, group: VocabularyGroup, num_rows: int) -> Loss:
    """The loss of the config over shards; ConfigError when it has no such form. num_rows: of the whole table."""
    if not isinstance(config, SoftmaxConfig):
        raise ConfigError(f"train.vocabulary_parallel: works with loss.type softmax, not {config.type}")
    return ShardedSoftmax(config, group, num_rows)


class ShardedSoftmax:
    """`seqray.losses.Softmax` where `prediction.weights_VD` are the rows of this worker."""

    Config: type[Component] = SoftmaxConfig

    def __init__(self, config: SoftmaxConfig, group: VocabularyGroup, num_rows: int) -> None:
        self._chunk_elements, self._group, self._num_rows = config.chunk_elements, group, num_rows

    def __call__(self, prediction: Prediction, targets: Targets, negatives: Negatives) -> Tensor:
        """The loss of this worker's targets, summed over S; every worker of the group calls it."""
        width, hidden = self._group.most_rows(self._num_rows), prediction.hidden_PD.shape[1]
        chunk = rows_of_chunk(self._chunk_elements, width, hidden, prediction.hidden_PD.device)
        job = _Job(self._group, self._group.rows(self._num_rows), chunk, prediction, targets)
        values_M = None if prediction.added is None else prediction.added.values_M
        return cast(Tensor, _ShardedSoftmax.apply(prediction.hidden_PD, prediction.weights_VD, values_M, job))  # type: ignore[no-untyped-call]


class _Job(NamedTuple):
    group: VocabularyGroup
    rows: slice
    chunk: int
    prediction: Prediction
    targets: Targets


class _Asked(NamedTuple):
    """What the whole group asks for; rows ascend, places are columns of this worker's logits."""

    hidden_GD: Tensor
    rows_s: Tensor
    place_s: Tensor
    here_s: Tensor
    """Whether this worker holds the target's weights."""
    weights_s: Tensor
    rows_m: Tensor
    """Of the scores of the history that belong to items of this worker."""
    place_m: Tensor
    values_m: Tensor
    added_here: Tensor
    """Whether a score of the history of the group is one of them."""
    own: slice
    """This worker's targets among those of the group."""


class _ShardedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_PD: Tensor, weights_vD: Tensor, values_M: Tensor | None, job: _Job) -> Tensor:
        dtype = product_type(hidden_PD)
        with torch.autocast(hidden_PD.device.type, enabled=False):
            P, S, M = job.group.sizes(
                len(hidden_PD), len(job.targets.items_S), 0 if values_M is None else len(values_M)
            )
            asked = _gathered(hidden_PD.to(dtype), values_M, job, (P, S, M))
            wanted = any(ctx.needs_input_grad)
            gradients = (
                Gradients.of(asked.hidden_GD.to(hidden_PD.dtype), weights_vD, asked.values_m) if wanted else None
            )
            loss_s = _over_chunks(asked, weights_vD.to(dtype), job, gradients)
            if gradients is not None:
                gradients.hidden = job.group.sum_own(gradients.hidden, P)
                if values_M is not None and gradients.values_M is not None:
                    slope_m = gradients.values_M.new_zeros(len(asked.added_here))
                    slope_m[asked.added_here] = gradients.values_M
                    gradients.values_M = job.group.sum_own(slope_m, M)
                else:
                    gradients.values_M = None
        ctx.gradients = gradients
        return loss_s[asked.own] @ asked.weights_s[asked.own]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.gradients.times(upstream[0]), None


def _gathered(hidden_PD: Tensor, values_M: Tensor | None, job: _Job, sizes: tuple[Sizes, Sizes, Sizes]) -> _Asked:
    (P, S, M), group, targets, added = sizes, job.group, job.targets, job.prediction.added
    wide = torch.promote_types(hidden_PD.dtype, torch.float32)
    rows_S = torch.arange(len(targets.items_S), device=hidden_PD.device) if targets.rows_S is None else targets.rows_S
    weights_S = torch.ones_like(rows_S, dtype=wide) if targets.weights_S is None else targets.weights_S.to(wide)
    rows_s, items_s = group.gather(torch.stack([rows_S + P.own.start, targets.items_S], 1), S).unbind(1)
    if added is None or values_M is None:
        rows_m = items_m = rows_s.new_empty(0)
        values_m = weights_S.new_empty(0)
    else:
        rows_m, items_m = group.gather(torch.stack([added.rows_M + P.own.start, added.items_M], 1), M).unbind(1)
        values_m = group.gather(values_M, M)
    here_s, here_m = ((items >= job.rows.start) & (items < job.rows.stop) for items in (items_s, items_m))
    return _Asked(
        group.gather(hidden_PD, P), rows_s.contiguous(), (items_s - job.rows.start).masked_fill(~here_s, 0), here_s,
        group.gather(weights_S, S), rows_m[here_m], items_m[here_m] - job.rows.start, values_m[here_m], here_m, S.own,
    )  # fmt: skip


def _over_chunks(asked: _Asked, weights_vD: Tensor, job: _Job, gradients: Gradients | None) -> Tensor:
    """loss_s of the whole group; fills the slopes, those of the hidden states and of the history's scores in parts."""
    G, chunk = len(asked.hidden_GD), job.chunk
    targets, added = bounds(asked.rows_s, G, chunk), bounds(asked.rows_m, G, chunk)
    losses = [asked.weights_s.new_empty(0)]
    for index, start in enumerate(range(0, G, chunk)):
        part = slice(start, min(start + chunk, G))
        some, history = slice(*targets[index : index + 2]), slice(*added[index : index + 2])
        hidden_CD = asked.hidden_GD[part]
        scores_Cv = (hidden_CD @ weights_vD.T).to(asked.weights_s.dtype)
        history_cells = asked.rows_m[history] - start, asked.place_m[history]
        scores_Cv.index_put_(history_cells, asked.values_m[history].to(scores_Cv.dtype), accumulate=True)
        if job.rows.start == 0:
            scores_Cv[:, 0] = float("-inf")
        rows_s, here_s = asked.rows_s[some] - start, asked.here_s[some]
        loss_s, slope_Cv = _slope(scores_Cv, rows_s, asked.place_s[some], here_s, asked.weights_s[some], job.group)
        losses.append(loss_s)
        if gradients is not None:
            gradients.values_M[history] = slope_Cv[history_cells].to(asked.values_m.dtype)  # type: ignore[index]
            slope_Cv = slope_Cv.to(hidden_CD.dtype)
            gradients.hidden[part] = slope_Cv @ weights_vD
            gradients.add_product(slope_Cv, hidden_CD)
    return torch.cat(losses)


def _slope(
    scores_Cv: Tensor, rows_s: Tensor, place_s: Tensor, here_s: Tensor, weights_s: Tensor, group: VocabularyGroup
) -> tuple[Tensor, Tensor]:
    """(loss of each target, slopes of the scores, in their memory), from the largest score, the sum of the
    exponentials and the targets' scores of all workers.
    """
    C = len(scores_Cv)
    scores_Cv -= group.max_(scores_Cv.amax(1)).unsqueeze(1)
    target_s = scores_Cv[rows_s, place_s].masked_fill_(~here_s, 0)
    sums = group.sum_(torch.cat([scores_Cv.exp_().sum(1), target_s]))
    loss_s = sums[:C].log()[rows_s] - sums[C:]
    weight_C = weights_s.new_zeros(C).index_add_(0, rows_s, weights_s)
    scores_Cv *= (weight_C / sums[:C]).unsqueeze(1)
    # An item that is bought twice stands there twice.
    scores_Cv.index_put_((rows_s, place_s), -weights_s * here_s, accumulate=True)
    return loss_s, scores_Cv
