"""ItemMasks: which items a filter lets through, from columns that were indexed once.

Shapes: V items + padding, N values of a column (lists laid end to end), U distinct values of a column in order.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from seqray.item_filter import ArrowSequence, Condition, Filter, Kind, code_range, kind_of
from seqray.table_files import as_array, flat_values

CACHED_BYTES = 64 * 2**20

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Column:
    values_U: ArrowSequence
    code_N: npt.NDArray[np.int32]
    """Place in values_U."""
    item_N: npt.NDArray[np.int64]
    """item_index that has the value."""


class ItemMasks:
    """Masks of the items of a table; the newest ones are kept, up to CACHED_BYTES."""

    def __init__(self, items: pa.Table, device: torch.device) -> None:
        """items: in index order, row 0 is item_index 1; its columns but train_events are the fields."""
        self._num_items = items.num_rows
        self._device = device
        self._columns: dict[str, _Column] = {}
        self.kinds: dict[str, Kind] = {}
        """The fields, and how each is compared."""
        for name in items.column_names:
            kind: Kind | None = "text" if name == "item_id" else kind_of(items.schema.field(name).type)
            if name != "train_events" and kind is not None:
                self.kinds[name] = kind
                self._columns[name] = _index(as_array(items.column(name)), kind)
        self._masks: OrderedDict[Filter, Tensor] = OrderedDict()

    def mask(self, wanted: Filter) -> Tensor:
        """allowed_V, bool on the device; padding is never allowed."""
        found = self._masks.get(wanted)
        if found is None:
            allowed_V = self._evaluate(wanted)
            allowed_V[0] = False
            found = torch.from_numpy(allowed_V).to(self._device)
            while self._masks and (len(self._masks) + 1) * len(found) > CACHED_BYTES:
                self._masks.popitem(last=False)
            self._masks[wanted] = found
        else:
            self._masks.move_to_end(wanted)
        return found

    def _evaluate(self, wanted: Filter) -> BoolArray:
        if isinstance(wanted, Condition):
            return self._meets(wanted)
        masks = [self._evaluate(part) for part in wanted.parts]
        if wanted.how == "not":
            return ~masks[0]
        combine: Any = np.logical_and if wanted.how == "all" else np.logical_or
        found: BoolArray = combine.reduce(masks)
        return found

    def _meets(self, condition: Condition) -> BoolArray:
        column = self._columns[condition.field]
        U = len(column.values_U)
        wanted_U = np.ones(U, np.bool_)
        has_value = True
        for name, value in condition.tests:
            if name == "exists":
                has_value = bool(value)
                wanted_U &= has_value
                continue
            met_U = np.zeros(U, np.bool_)
            for one in value if isinstance(value, tuple) else (value,):
                start, stop = code_range("eq" if name == "in" else name, one, column.values_U)
                met_U[start:stop] = True
            wanted_U &= met_U
        met_V = np.zeros(self._num_items + 1, np.bool_)
        if not has_value and len(condition.tests) == 1:
            met_V[column.item_N] = True
            return ~met_V
        met_V[column.item_N[wanted_U[column.code_N]]] = True
        return met_V


def _index(column: pa.Array, kind: Kind) -> _Column:
    rows_N, column = flat_values(column)
    item_N = rows_N + 1
    if kind == "text":
        column = column.cast(pa.large_string())
    elif kind == "time":
        column = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    elif pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    known = pc.is_valid(column)
    column, item_N = column.filter(known), item_N[known.to_numpy(zero_copy_only=False)]
    distinct = pc.unique(column)
    if kind == "boolean":
        distinct = distinct.cast(pa.int8())
        column = column.cast(pa.int8())
    distinct = distinct.take(pc.sort_indices(distinct))
    code_N = pc.index_in(column, distinct).to_numpy(zero_copy_only=False).astype(np.int32)
    return _Column(ArrowSequence(distinct), code_N, item_N)
