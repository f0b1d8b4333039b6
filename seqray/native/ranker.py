"""From histories of ids to the best items in one call of a kernel. Shapes: N ids, B histories, K top-k."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqray.native.library import operators
from seqray.native.top_items import TopItems, limits_for_kernel
from seqray.native.transformer import TransformerKernel

SEPARATOR = "\0"


class Ranker:
    """The items of a shop by their ids, the model that reads histories of them, and the catalogue that it ranks."""

    def __init__(self, item_ids: Iterable[Any], transformer: TransformerKernel, top_items: TopItems) -> None:
        """item_ids: in index order; each is known by its text. The kernels are at hand: the other two have them."""
        assert operators(build=False) is not None
        encoded = [_encoded(str(item_id)) for item_id in item_ids]
        ends = np.array([len(item_id) for item_id in encoded], np.int64).cumsum()
        settings = (_bytes(b"".join(encoded)), torch.from_numpy(ends), *transformer.settings, *top_items.catalogue)
        self._kernel = torch.classes.seqray.Ranker(*settings)

    def best(
        self, histories: Sequence[Sequence[Any]], k: Sequence[int], hides_seen: Sequence[bool],
        excluded: Sequence[Sequence[int]], allowed: Sequence[Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
        """(item_index_N of each id, 0 where it is unknown; item_index_BK and score_BK as TopItems.best has them).

        hides_seen: whether the items of the history are left out. The row of a history without a known id holds zeros
        and -inf. None where an id holds a NUL, which stands between the ids here.
        """
        ids = list(chain.from_iterable(histories))
        try:
            text = SEPARATOR.join(ids)
        except TypeError:  # numbers
            text = SEPARATOR.join(map(str, ids))
        if text.count(SEPARATOR) >= max(1, len(ids)):
            return None
        counts = torch.from_numpy(np.array([len(history) for history in histories], np.int64))
        k_B, *limits = limits_for_kernel(k, excluded, allowed)
        hides_B = torch.from_numpy(np.array(hides_seen, np.bool_))
        found: tuple[Tensor, Tensor, Tensor] = self._kernel.best(_bytes(_encoded(text)), counts, k_B, hides_B, *limits)
        return found


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))  # a bytearray: PyTorch warns of what is read-only
