"""ItemVocabulary: the ids of the shop outside, item indices inside. Index 0 is padding and stands for no item."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


class ItemVocabulary:
    """Item ids in index order: the first id has item_index 1.

    An id is found by its own value or by its text, so that 17 and "17" are one item.
    """

    def __init__(self, item_ids: Sequence[Any] | pa.Array | pa.ChunkedArray) -> None:
        values = item_ids.to_pylist() if isinstance(item_ids, pa.Array | pa.ChunkedArray) else list(item_ids)
        self._ids: list[Any] = values
        self._index = {str(item_id): index for index, item_id in enumerate(values, start=1)}
        if len(self._index) != len(values):
            raise ValueError("two items have the same id")

    def __len__(self) -> int:
        """Number of items, padding not counted."""
        return len(self._ids)

    def index(self, item_id: Any) -> int:
        """The item_index of an id, 0 when it is unknown."""
        return self._index.get(str(item_id), 0)

    def index_list(self, item_ids: Iterable[Any]) -> list[int]:
        """The item_index of each id, 0 where it is unknown."""
        index = self._index.get
        return [index(item_id if type(item_id) is str else str(item_id), 0) for item_id in item_ids]

    def indices(self, item_ids: Iterable[Any]) -> npt.NDArray[np.int64]:
        """The item_index of each id, 0 where it is unknown."""
        return np.array(self.index_list(item_ids), np.int64)

    def item_id(self, item_index: int) -> Any:
        """The id at an item_index from 1 to len(self)."""
        if not 1 <= item_index <= len(self._ids):
            raise IndexError(f"item_index {item_index} is not between 1 and {len(self._ids)}")
        return self._ids[item_index - 1]
