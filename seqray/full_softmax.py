"""Full cross-entropy whose memory holds a chunk of the logits: loss and gradients in one pass over asked events.

Shapes: P asked events, S targets, D hidden, V items + padding, C asked events of a chunk, M scores of the history.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from seqray.gradients import Gradients, minus_log, product_type
from seqray.models.protocol import Prediction
from seqray.native.cross_entropy import by_kernel
from seqray.samples import Targets

ROWS = 64
"""Multiple of the rows of bf16 products on a CPU."""


def full_cross_entropy(prediction: Prediction, targets: Targets, chunk: int) -> Tensor:
    """-log softmax(scores)[target] over all items but padding, summed over S; `chunk` asked events at a time.

    Products and softmax run in autocast's type where autocast is on (softmax adds up in float32 all the same), the
    loss in float32.
    """
    added = prediction.added
    places = Places(
        targets.items_S, targets.rows_S, targets.weights_S, None if added is None else added.rows_M,
        None if added is None else added.items_M, chunk,
    )  # fmt: skip
    values = None if added is None else added.values_M
    return cast(Tensor, _FullCrossEntropy.apply(prediction.hidden_PD, prediction.weights_VD, values, places))  # type: ignore[no-untyped-call]


class Places(NamedTuple):
    """Where in the logits (P, V) targets and scores of the history stand; rows ascend."""

    items_S: Tensor
    rows_S: Tensor | None
    weights_S: Tensor | None
    added_rows_M: Tensor | None
    added_items_M: Tensor | None
    chunk: int


def bounds(rows: Tensor | None, total: int, chunk: int) -> list[int]:
    """Where each chunk begins among ascending `rows`, and the end; without rows there is one for each asked event."""
    starts = torch.arange(0, total + chunk, chunk).clamp(max=total)
    if rows is None:
        return cast(list[int], starts.tolist())
    return cast(list[int], torch.searchsorted(rows.contiguous(), starts.to(rows.device)).tolist())


def _even(hidden: Tensor, chunk: int) -> tuple[int, Tensor]:
    """(chunk, hidden) for bf16 on a CPU in multiples of ROWS; the rows of zeros at the end count nowhere.

    There each new shape of a product costs more than the product, so that few shapes have to do.
    """
    if hidden.device.type != "cpu" or hidden.dtype != torch.bfloat16:
        return chunk, hidden
    return max(ROWS, chunk // ROWS * ROWS), F.pad(hidden, (0, 0, 0, -len(hidden) % ROWS))


class _FullCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_PD: Tensor, weights_VD: Tensor, values_M: Tensor | None, places: Places) -> Tensor:
        dtype = product_type(hidden_PD)
        wanted = any(ctx.needs_input_grad)
        with torch.autocast(hidden_PD.device.type, enabled=False):
            if dtype == torch.bfloat16 and values_M is None:
                found = by_kernel(hidden_PD, weights_VD, *places[:3], places.chunk, wanted)
                if found is not None:
                    loss, of_hidden, of_weights = found
                    ctx.gradients = Gradients(of_hidden.to(hidden_PD.dtype), of_weights, None, weights_VD.dtype)
                    return loss
            ctx.gradients = Gradients.of(hidden_PD, weights_VD, values_M) if wanted else None
            return _over_chunks(hidden_PD.to(dtype), weights_VD.to(dtype), values_M, places, ctx.gradients)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.gradients.times(upstream[0]), None


def _over_chunks(
    hidden: Tensor, weights: Tensor, values_M: Tensor | None, places: Places, gradients: Gradients | None
) -> Tensor:
    P, V = len(hidden), len(weights)
    chunk, hidden = _even(hidden, places.chunk)
    loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    targets, added = (bounds(rows, P, chunk) for rows in (places.rows_S, places.added_rows_M))
    # Buffers for all chunks: fresh memory for each would cost as much as the products. On a CPU softmax reads a row
    # before it writes it, so that one buffer serves.
    logits_buffer = hidden.new_empty(min(chunk, len(hidden)), V)
    slope_buffer = logits_buffer if hidden.device.type == "cpu" else torch.empty_like(logits_buffer)
    for index, start in enumerate(range(0, P, chunk)):
        part = slice(start, min(start + chunk, P))
        hidden_CD = hidden[start : start + chunk]
        logits_CV, slope_CV = logits_buffer[: len(hidden_CD)], slope_buffer[: len(hidden_CD)]
        torch.mm(hidden_CD, weights.T, out=logits_CV)
        some, history = slice(*targets[index : index + 2]), slice(*added[index : index + 2])
        cells_M = None
        if values_M is not None and places.added_rows_M is not None and places.added_items_M is not None:
            cells_M = (places.added_rows_M[history] - start) * V + places.added_items_M[history]
            logits_CV.view(-1).index_add_(0, cells_M, values_M[history].to(logits_CV.dtype))
        rows_S = None if places.rows_S is None else places.rows_S[some] - start
        weights_S = None if places.weights_S is None else places.weights_S[some]
        loss += _slope(logits_CV, slope_CV, places.items_S[some], rows_S, weights_S)
        if gradients is not None:
            gradients.hidden[part] = (slope_CV @ weights)[: part.stop - start]
            gradients.add_product(slope_CV, hidden_CD)
            if cells_M is not None and gradients.values_M is not None:
                gradients.values_M[history] = slope_CV.view(-1)[cells_M].to(gradients.values_M.dtype)
    return loss


def _slope(
    logits_CV: Tensor, slope_CV: Tensor, items_S: Tensor, rows_S: Tensor | None, weights_S: Tensor | None
) -> Tensor:
    """Fills slope_CV with softmax times the weight of the row's targets, less each target's; gives the summed loss."""
    logits_CV[:, 0] = float("-inf")
    torch.softmax(logits_CV, 1, out=slope_CV)
    plain = rows_S is None and weights_S is None
    if rows_S is None:
        rows_S = torch.arange(len(items_S), device=slope_CV.device)
    loss_S = minus_log(slope_CV[rows_S, items_S])
    weight_S = torch.ones_like(loss_S) if weights_S is None else weights_S.to(loss_S.dtype)
    if not plain:
        weight_C = loss_S.new_zeros(len(slope_CV)).index_add_(0, rows_S, weight_S)
        slope_CV *= weight_C.to(slope_CV.dtype).unsqueeze(1)
    cells_S = rows_S * slope_CV.shape[1] + items_S  # an item that is bought twice stands there twice
    slope_CV.view(-1).index_add_(0, cells_S, weight_S.to(slope_CV.dtype), alpha=-1)
    return loss_S @ weight_S
