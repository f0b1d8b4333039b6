"""Gradients that a loss finds while it goes forward over chunks, and the sizes of these chunks.

Shapes: R rows of hidden states, D hidden, V items + padding, C rows of a chunk, M scores of the history.
"""

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
CPU_ELEMENTS, ACCELERATOR_ELEMENTS = 2**22, 2**28
PRODUCT_ELEMENTS = 2**22


class Gradients:
    """Slopes of the loss over the inputs, filled chunk by chunk; they are spent by one backward pass."""

    def __init__(self, hidden: Tensor, weights_VD: Tensor, values_M: Tensor | None, weights_type: torch.dtype) -> None:
        self.hidden, self.weights_VD, self.values_M, self._weights_type = hidden, weights_VD, values_M, weights_type

    @classmethod
    def of(cls, hidden_RD: Tensor, weights_VD: Tensor, values_M: Tensor | None) -> "Gradients":
        """Slopes over these inputs, to be filled."""
        wide = torch.promote_types(weights_VD.dtype, torch.float32)
        values = None if values_M is None else torch.zeros_like(values_M)
        return cls(torch.empty_like(hidden_RD), torch.zeros_like(weights_VD, dtype=wide), values, weights_VD.dtype)

    def add_product(self, slope_CV: Tensor, hidden_CD: Tensor) -> None:
        """Adds slope_CV.T @ hidden_CD to the slopes over the weights, in their type."""
        if slope_CV.dtype == self.weights_VD.dtype:
            self.weights_VD.addmm_(slope_CV.T, hidden_CD)
            return
        # A CPU adds up a product of another type through a copy, so the product is made in parts.
        block = PRODUCT_ELEMENTS // hidden_CD.shape[1] + 1 if slope_CV.device.type == "cpu" else len(self.weights_VD)
        for start in range(0, len(self.weights_VD), block):
            part = slice(start, start + block)
            self.weights_VD[part] += slope_CV[:, part].T @ hidden_CD

    def times(self, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The slopes times `upstream`, in place; they are let go, so that autograd takes them over without a copy."""
        if not hasattr(self, "weights_VD"):
            raise RuntimeError("this loss keeps no graph: backward can be called once")
        hidden, weights_VD, values_M = self.hidden, self.weights_VD, self.values_M
        del self.hidden, self.weights_VD, self.values_M
        values_M = None if values_M is None else values_M.mul_(upstream)
        return hidden.mul_(upstream), weights_VD.mul_(upstream).to(self._weights_type), values_M


def product_type(hidden: Tensor) -> torch.dtype:
    """What products with `hidden` run in: autocast's type where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def minus_log(chance: Tensor) -> Tensor:
    """-log of chances in float32; finite where a chance is too small to be written."""
    return -chance.to(torch.promote_types(chance.dtype, torch.float32)).clamp_min(TINY).log()


def rows_of_chunk(elements: int | None, row: int, least: int, device: torch.device) -> int:
    """How many rows of `row` numbers are held at a time.

    Without a wish: as many as a cache likes or an accelerator needs to be busy, and at least `least`, under which
    adding up the chunks' gradients would cost more than the chunks.
    """
    if elements is not None:
        return max(1, elements // max(1, row))
    usual = CPU_ELEMENTS if device.type == "cpu" else ACCELERATOR_ELEMENTS
    return max(least, usual // max(1, row))
