"""From histories of ids to the best items in one call of a kernel. Shapes: N ids, B histories, K top-k."""

import json
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
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
        item_ids = list(item_ids)
        ids = _texts(_encoded(str(item_id)) for item_id in item_ids)
        encode = json.JSONEncoder(ensure_ascii=False).encode
        names = _texts(_encoded(encode(one if isinstance(one, int) else str(one))) for one in item_ids)
        self._kernel = torch.classes.seqray.Ranker(*ids, *names, *transformer.settings, *top_items.catalogue)

    def best(
        self, histories: Sequence[Sequence[Any]], as_json: Sequence[bool], k: Sequence[int],
        hides_seen: Sequence[bool], excluded: Sequence[Sequence[int]], allowed: Sequence[Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor, list[bytes]] | None:  # fmt: skip
        """(item_index_N of each id, 0 where it is unknown; item_index_BK and score_BK as TopItems.best has them; JSON).

        as_json: whether JSON is wanted of the items, see `Recommendation.items_json`; b"" where not. hides_seen:
        whether the items of the history are left out. The row of a history without a known id holds zeros and -inf.
        None where an id holds a NUL, which stands between the ids here.
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
        json_B, hides_B = (torch.from_numpy(np.array(flag, np.bool_)) for flag in (as_json, hides_seen))
        items_N, index_BK, score_BK, letters, ends_B = self._kernel.best(
            _bytes(_encoded(text)), counts, json_B, k_B, hides_B, *limits
        )
        texts = letters.numpy().tobytes()
        pieces = [texts[start:stop] for start, stop in pairwise([0, *ends_B.tolist()])]
        return items_N, index_BK, score_BK, pieces


def _texts(texts: Iterable[bytes]) -> tuple[Tensor, Tensor]:
    """All of them, and where each ends."""
    texts = list(texts)
    ends = np.array([len(text) for text in texts], np.int64).cumsum()
    return _bytes(b"".join(texts)), torch.from_numpy(ends)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))  # a bytearray: PyTorch warns of what is read-only
