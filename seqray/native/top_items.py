"""The best items of a catalogue by our kernel. Shapes: B queries, D hidden, V items + padding."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqray.native.library import operators

_EVERY_ITEM = torch.empty(0, dtype=torch.bool)


class TopItems:
    """A catalogue on the CPU, rounded once to whole numbers beside its float32 weights."""

    def __init__(self, kernels: Any, weights_VD: Tensor) -> None:
        self._kernels = kernels
        self.catalogue = (weights_VD, *kernels.pack_items(weights_VD))
        """As the kernels want it."""

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
        if hidden_BD.dtype != torch.float32 or not hidden_BD.is_contiguous():
            hidden_BD = hidden_BD.float().contiguous()
        limits = limits_for_kernel(k, excluded, allowed)
        found: tuple[Tensor, Tensor] = self._kernels.top_items(hidden_BD, *self.catalogue, *limits)
        return found


def limits_for_kernel(
    k: Sequence[int], excluded: Sequence[Sequence[int]], allowed: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """What `TopItems.best` is told of the queries, as the kernels want it."""
    # By NumPy, which keeps the interpreter's lock meanwhile: to come by it again takes longer than this.
    ends = np.array([len(items) for items in excluded], np.int64).cumsum()
    items = np.array(list(chain.from_iterable(excluded)), np.int64)
    masks = [_EVERY_ITEM if mask is None else mask for mask in allowed]
    return torch.from_numpy(np.array(k, np.int64)), torch.from_numpy(items), torch.from_numpy(ends), masks
