"""Model and loss as one module, so that DDP sees the whole forward pass."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from seqray.full_softmax import ROWS
from seqray.losses import Loss
from seqray.models.protocol import Prediction, SequentialModel, predict
from seqray.native.library import operators_of_training
from seqray.negatives import Popularity, step_negatives
from seqray.samples import Step
from seqray.sequences import Batch

WIDE = 128
"""From this many hidden dimensions on, bf16 pays on a CPU inside a model without kernels too."""


class Objective(nn.Module):
    """Step -> the loss summed over this worker's targets, under bf16 autocast where that was asked for."""

    def __init__(
        self, model: SequentialModel, loss: Loss, num_items: int, precision: Literal["auto", "bf16", "fp32"],
        popularity: Popularity | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self._loss, self._num_items, self._precision = model, loss, num_items, precision
        self._popularity = popularity
        self._bf16_pays = precision == "bf16" or model.item_weights().shape[1] >= WIDE

    def forward(self, step: Step, key: tuple[int, int, int]) -> Tensor:
        """key: (seed, epoch, step), from which the negatives are drawn."""
        return self.loss(self.prediction(step.batch), step, key)

    def prediction(self, batch: Batch) -> Prediction:
        """What the model says of the batch."""
        device = batch.items_T.device.type
        kernels = device == "cpu" and getattr(self.model, "kernels", False)
        kernels = kernels and operators_of_training(build=True) is not None
        bf16 = uses_bf16(self._precision, device) and (device != "cpu" or kernels or self._bf16_pays)
        if bf16 and device == "cpu" and not kernels:
            # Each new shape of a bf16 product costs more than the product there, so that few shapes have to do.
            batch = batch.rounded(ROWS, self.model.max_length)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return predict(self.model, batch)

    def answer(self, batch: Batch, weights_VD: Tensor | None) -> Prediction:
        """What evaluation asks, in float32; `weights_VD`: the item weights of an earlier answer."""
        return predict(self.model, batch, weights_VD)

    def loss(self, prediction: Prediction, step: Step, key: tuple[int, int, int]) -> Tensor:
        """Summed over the targets of the step."""
        device = step.batch.items_T.device.type
        negatives = step_negatives(key, self._num_items, step, self._popularity)
        targets = step.targets
        if not step.weight:
            targets = replace(targets, weights_S=torch.zeros_like(targets.items_S, dtype=torch.float32))
        with torch.autocast(device, torch.bfloat16, enabled=uses_bf16(self._precision, device)):
            return self._loss(prediction, targets, negatives)


def uses_bf16(precision: Literal["auto", "bf16", "fp32"], device: str) -> bool:
    """Whether the matrix products run in bf16; auto: where the hardware multiplies bf16."""
    if precision != "auto":
        return precision == "bf16"
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
