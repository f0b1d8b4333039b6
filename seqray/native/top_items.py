"""The best items of a catalogue by our kernel. Shapes: B queries, D hidden, V items + padding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqray.native.library import operators

_EVERY_ITEM = torch.empty(0, dtype=torch.bool)


class TopItems:
    """A catalogue on the CPU, rounded once to int8 beside its float32 weights."""

    def __init__(self, kernels: Any, weights_VD: Tensor) -> None:
        self._kernels = kernels
        self._weights_VD = weights_VD
        self._rounded = kernels.pack_items(weights_VD)

    @classmethod
    def of(cls, weights_VD: Tensor, build: bool) -> "TopItems | None":
        """None where the kernels are not at hand; they are compiled only if `build`. weights_VD: float32."""
        kernels = operators(build) if weights_VD.device.type == "cpu" else None
        return None if kernels is None else cls(kernels, weights_VD.contiguous())

    def best(
        self, hidden_BD: Tensor, k: Sequence[int], excluded: Sequence[Sequence[int]], allowed: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """(item_index, score) of the k[b] best items of each query b, best first, then 0 and -inf.

        Exact in float32, equal scores by lower item_index, the same in any batch. excluded: item_index of items that
        are left out, may name one twice; allowed: bool_V, or None for every item.
        """
        ascending = [sorted(items) for items in excluded]
        ends_B = torch.tensor([len(items) for items in ascending]).cumsum(0)
        items_P = torch.tensor([item for items in ascending for item in items], dtype=torch.int64)
        masks = [_EVERY_ITEM if mask is None else mask for mask in allowed]
        hidden_BD = hidden_BD.float().contiguous()
        found: tuple[Tensor, Tensor] = self._kernels.top_items(
            hidden_BD, self._weights_VD, *self._rounded, torch.tensor(k), items_P, ends_B, masks
        )
        return found
