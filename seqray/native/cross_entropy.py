"""Full cross-entropy by our kernel. Shapes: P asked events, S targets, D hidden, V items + padding."""

from typing import NamedTuple

import torch
from torch import Tensor

from seqray.native.library import operators_of_training


class LossAndSlopes(NamedTuple):
    """The loss summed over S, and float32 slopes over hidden states and weights, empty where nobody wants them."""

    loss: Tensor
    hidden_PD: Tensor
    weights_VD: Tensor


def by_kernel(
    hidden_PD: Tensor, weights_VD: Tensor, items_S: Tensor, rows_S: Tensor | None, weights_S: Tensor | None,
    chunk: int, slopes: bool,
) -> LossAndSlopes | None:  # fmt: skip
    """-log softmax(hidden @ weights.T)[target], products in bf16, the rest in float32; None where the kernel is not at
    hand. rows_S, ascending, and weights_S as in `Targets`; memory holds the logits of `chunk` asked events.
    """
    kernels = operators_of_training(build=slopes) if hidden_PD.device.type == "cpu" else None
    if kernels is None or not len(hidden_PD):
        return None
    rows_S, weights_S = (None if part is None else part.contiguous() for part in (rows_S, weights_S))
    loss, of_hidden, of_weights = kernels.cross_entropy(
        *(part.float().contiguous() for part in (hidden_PD, weights_VD)), items_S.contiguous(), rows_S, weights_S,
        chunk, slopes,
    )  # fmt: skip
    return LossAndSlopes(torch.tensor(loss, dtype=torch.float32), of_hidden, of_weights[: len(weights_VD)])
